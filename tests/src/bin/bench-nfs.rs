//! How fast a disk on an NFS server is and what it costs the host, beside QEMU's own client on the same file.
//!
//! The server is nfs-ganesha, its file in the page cache; it has most of the time, so what counts is the CPU time of the client
//! alone. QEMU speaks version 3 only and asks rpcbind for the port, so the server has a host of its own, and so have the clients,
//! with a cable between them. The server keeps the memory that it has freed (see the harness): by NFSv4 alone it spent half its
//! time on giving it back, and that is not what is measured. Each figure is the median of alternating runs; the results are
//! printed as tables and written as JSON to `target/bench/nfs.json`.
//!
//! `RUNS=`, `MS=`, `WORK=` and `ONLY=` are those of bench-disk; `IDLE=` is for how many seconds an idle disk is watched.

use std::fs::File;
use std::net::SocketAddr;

use coracle_tests::Outcome;
use coracle_tests::bench::contender::QEMU;
use coracle_tests::bench::course::{self, Place};
use coracle_tests::bench::image::{Image, Pieces};
use coracle_tests::bench::program::Program;
use coracle_tests::bench::remote::{Client, NFS, Unit};
use coracle_tests::harness::hosts::Star;
use coracle_tests::harness::nfs::server::{Export, Plan, Server, url, url_by_rpcbind};

/// A third of this is between the renewals of a client that nobody uses: as long as between two exchanges of the control.
const LEASE_SECONDS: u32 = 15;

/// Of a disk that nobody uses.
const IDLE_BYTES: u64 = 64 << 20;

fn main() {
    if let Err(error) = run() {
        // The process ends with a failure, so that `make bench-nfs` does.
        println!("bench-nfs: {}", error.message().unwrap_or("failed"));
        std::process::exit(1);
    }
}

fn run() -> Outcome {
    let star = Star::new(1)?;
    let client = star.clients.first().ok_or("one was asked for")?;
    let plan = Plan::default().export(Export::new("export"));
    let plan = plan.lease_seconds(LEASE_SECONDS).with_v3();
    let server = Server::start_on(&star.server, plan)?;
    let image = Image::new(&server.path("export"), Pieces::Mebibytes)?;
    let name = image.path().file_name().ok_or("an image has a name")?;
    let path = |unit| match unit {
        Unit::Cached => format!("export/{}", name.display()),
        other => format!("export/idle-{}", other.lun()),
    };
    for unit in [Unit::Through, Unit::Spare] {
        File::create(server.path(&path(unit)))?.set_len(IDLE_BYTES)?;
    }
    let host = Star::server_address(0);
    let address = SocketAddr::new(host, server.address().port());
    let place = Place {
        protocol: NFS,
        url: &|client, unit| match client {
            Client::Guest(QEMU) | Client::Program(Program::QemuImg) => url_by_rpcbind(host, &path(unit)),
            Client::Guest(_) | Client::Program(Program::Storage) => url(address, &path(unit)),
        },
    };
    client.inside(|| course::run(&place))?
}
