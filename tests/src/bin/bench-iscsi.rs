//! How fast a disk on an iSCSI target is and what it costs the host, beside QEMU's own initiator on the same URL.
//!
//! The target is tgtd on loopback, its file in the page cache; it has most of the time, so what counts is the CPU time of the
//! client alone. Each figure is the median of alternating runs; the results are printed as tables and written as JSON to
//! `target/bench/iscsi.json`.
//!
//! `RUNS=`, `MS=`, `WORK=` and `ONLY=` are those of bench-disk; `IDLE=` is for how many seconds an idle disk is watched.

use std::path::Path;

use coracle_tests::Outcome;
use coracle_tests::bench::course::{self, Place};
use coracle_tests::bench::image::{Image, Pieces};
use coracle_tests::bench::remote::ISCSI;
use coracle_tests::harness::iscsi::target::{Lun, Plan, Target};

const THREADS: u32 = 4;

fn main() {
    if let Err(error) = run() {
        // The process ends with a failure, so that `make bench-iscsi` does.
        println!("bench-iscsi: {}", error.message().unwrap_or("failed"));
        std::process::exit(1);
    }
}

fn run() -> Outcome {
    let image = Image::new(Path::new("/dev/shm"), Pieces::Mebibytes)?;
    let unit = || Lun::of(image.path());
    let plan = Plan::default()
        .threads(THREADS)
        .lun(unit()?)
        .lun(unit()?.without_write_cache())
        .lun(unit()?);
    let target = Target::start(plan)?;
    course::run(&Place {
        protocol: ISCSI,
        url: &|_, unit| target.url(unit.lun()),
    })
}
