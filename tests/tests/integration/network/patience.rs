//! A server that is silent: what the API, the user and the guest notice of it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use coracle_tests::case::Context;
use coracle_tests::harness::proxy::Proxy;
use coracle_tests::monitor::Monitor;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::{Server, says, start, with};

const SOON: Duration = Duration::from_secs(20);
/// As the issue has them.
const ANSWER_P99_MAX: Duration = Duration::from_millis(5);
const REAPED_WITHIN: Duration = Duration::from_millis(100);
/// A jail has namespaces that the kernel takes apart before anybody is told.
const JAIL_REAPED_WITHIN: Duration = Duration::from_millis(400);
/// A server is silent for so long before the guest's requests are stuck for sure.
const STUCK_AFTER: Duration = Duration::from_millis(300);
const BYTES: u64 = 16 << 20;
/// A guest that writes all the time.
const WRITES: &str = "do=stamp:writer=1,blocks=64,flush_every=4,ms=1";

/// A guest that writes all the time, on a server that was just stopped.
struct Silent<S> {
    monitor: Monitor,
    server: S,
    _lease: tempfile::TempDir,
}

impl<S: Server> Silent<S> {
    fn new(context: &Context) -> Outcome<Self> {
        let server = S::with_image(BYTES)?;
        let lease = tempfile::tempdir()?;
        let monitor = start(context, WRITES, server.drive(server.address(), lease.path()))?;
        monitor.console.wait_for("stamp: acked=", SOON)?;
        server.stop()?;
        std::thread::sleep(STUCK_AFTER);
        Ok(Self {
            monitor,
            server,
            _lease: lease,
        })
    }

    /// The guest goes on when the server does.
    fn resume(&self) -> Outcome {
        let before = self.monitor.console.text().len();
        self.server.go_on()?;
        let more = |text: &str| (text.len() > before).then_some(());
        self.monitor.console.wait_until("another line", SOON, more)
    }
}

pub(crate) fn api<S: Server>(context: &Context) -> Outcome {
    let silent = Silent::<S>::new(context)?;
    let stopped = answer_p99(&silent.monitor)?;
    silent.resume()?;
    // On a host that is busy with other things each answer takes its time, whatever the server does.
    let limit = ANSWER_P99_MAX.max(answer_p99(&silent.monitor)? * 2);
    ensure!(
        stopped < limit,
        "p99 {stopped:?} with the server stopped, not below {limit:?}"
    );
    Ok(())
}

fn answer_p99(monitor: &Monitor) -> Outcome<Duration> {
    let paths = ["/", "/version", "/machine-config", "/vm/config"];
    let mut took = Vec::new();
    for path in paths.iter().cycle().take(1000) {
        let start = Instant::now();
        monitor.must("GET", path, None)?;
        took.push(start.elapsed());
    }
    took.sort();
    Ok(took.get(took.len() * 99 / 100).copied().unwrap_or_default())
}

pub(crate) fn pause<S: Server>(context: &Context) -> Outcome {
    let silent = Silent::<S>::new(context)?;
    let start = Instant::now();
    let paused = json!({ "state": "Paused" });
    let answer = silent.monitor.request("PATCH", "/vm", Some(&paused))?;
    ensure!(answer.status == 400, "{answer:?}");
    ensure!(start.elapsed() < SOON, "it took {:?}", start.elapsed());
    let state = silent.monitor.must("GET", "/", None)?;
    says(&state.body, "Running")?;
    silent.resume()
}

pub(crate) fn death<S: Server>(context: &Context) -> Outcome {
    let silent = Silent::<S>::new(context)?;
    let start = Instant::now();
    silent.monitor.signal(Signal::KILL)?;
    silent.monitor.wait(SOON)?;
    let took = start.elapsed();
    let limit = match context.environment.jailing {
        None => REAPED_WITHIN,
        Some(_) => JAIL_REAPED_WITHIN,
    };
    ensure!(took < limit, "reaped after {took:?} with the server stopped");
    Ok(())
}

/// With `on_error: report` the guest gets an error when the time is over, and not before.
pub(crate) fn report<S: Server>(context: &Context) -> Outcome {
    const TIMEOUT: Duration = Duration::from_millis(1500);
    let server = S::with_image(BYTES)?;
    let lease = tempfile::tempdir()?;
    let drive = server.drive(server.address(), lease.path());
    let drive = with(drive, "on_error", json!("report"));
    let timeout_ms = u64::try_from(TIMEOUT.as_millis())?;
    let monitor = start(context, WRITES, with(drive, "timeout_ms", json!(timeout_ms)))?;
    monitor.console.wait_for("stamp: acked=", SOON)?;
    server.stop()?;
    let stopped = Instant::now();
    // IOERR, virtio 1.2, 5.2.6.
    monitor.console.wait_for("found status=1", SOON)?;
    let took = stopped.elapsed();
    server.go_on()?;
    ensure!(took >= TIMEOUT, "the guest was told after {took:?}");
    ensure!(
        took < TIMEOUT + Duration::from_secs(2),
        "the guest was told after {took:?}"
    );
    Ok(())
}

/// By plain system calls, as on a host that refuses io_uring, a disk calls its server again, too, and has its lease back.
pub(crate) fn without_a_ring<S: Server>(context: &Context) -> Outcome {
    let mut server = S::with_image(BYTES)?;
    Proxy::both_ways(server.address(), context.seed.clone(), |way| {
        goes_on(context, &mut server, way)
    })
}

fn goes_on(context: &Context, server: &mut impl Server, way: SocketAddr) -> Outcome {
    let lease = tempfile::tempdir()?;
    let drive = with(server.drive(way, lease.path()), "io_engine", json!("Sync"));
    let monitor = start(context, WRITES, drive)?;
    monitor.console.wait_for("stamp: acked=", SOON)?;
    server.kill()?;
    server.restart()?;
    let before = monitor.console.text().len();
    let more = |text: &str| (text.len() > before + 200).then_some(());
    monitor.console.wait_until("more lines", SOON * 3, more)?;
    monitor.set_state("Paused")?;
    monitor.set_state("Resumed")?;
    monitor.signal(Signal::TERM)?;
    monitor.wait(SOON)?.expect(143)
}
