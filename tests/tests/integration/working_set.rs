//! What a restored guest asks for first is remembered beside its memory, also on a server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::Machine;
use coracle_tests::harness::nfs::server::{Plan, Server, url};
use coracle_tests::harness::proxy::Proxy;
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};

use super::snapshot::{Files, killed, loaded, saved, started};

pub(crate) const CASES: &[Case] = &[Case {
    name: "a_working_set_is_kept_on_the_server_that_has_the_memory",
    need: Need::Kvm,
    run: is_kept_on_a_server,
}];

const SOON: Duration = Duration::from_secs(60);

fn is_kept_on_a_server(context: &Context) -> Outcome {
    let server = Server::start(Plan::image(4096))?;
    Proxy::both_ways(server.address(), context.seed.clone(), |way| {
        is_kept(context, &server, way)
    })
}

fn is_kept(context: &Context, server: &Server, way: SocketAddr) -> Outcome {
    // It is in the middle of writing all of this, so it asks for what is missing as soon as it runs, however late that is.
    let words = "do=hello do=dirty:mib=160,seconds=2 do=tick:ms=5,count=100000";
    let config = Machine::unikernel(&context.environment, words)
        .memory_mib(192)
        .config();
    let monitor = started(context, &config)?;
    monitor.console.wait_for("dirty: ready", SOON)?;
    let files = Files {
        state: PathBuf::from(url(way, "export/s.state")),
        memory: PathBuf::from(url(way, "export/s.memory")),
    };
    saved(&monitor, &files, "Full")?;
    killed(monitor)?;
    let record = server.path("export/s.memory.ws");
    ensure!(!record.exists(), "nobody has gone on from it yet");

    // At this level the log says why nothing is recorded.
    let monitor = Launch::new(&context.environment)?
        .arguments(["--level", "Debug"])
        .start()?;
    monitor.must("PUT", "/snapshot/load", Some(&files.load("lazy")))?;
    monitor.console.wait_for("dirty: ok", SOON)?;
    let deadline = Instant::now() + SOON;
    while !record.exists() {
        ensure!(
            Instant::now() < deadline,
            "nothing is recorded: {}",
            monitor.log()?
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    killed(monitor)?;
    let bytes = std::fs::read(&record)?;
    ensure!(bytes.starts_with(b"CORACLWS"), "{bytes:?}");

    // It is only read the next time, here after it was damaged.
    std::fs::write(&record, b"CORACLWS, and nothing else")?;
    let monitor = loaded(context, &files, "lazy")?;
    monitor.console.wait_for("dirty: ok", SOON)?;
    killed(monitor)?;
    Ok(std::fs::remove_file(&record)?)
}
