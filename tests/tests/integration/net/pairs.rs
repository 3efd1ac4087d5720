//! Interfaces with several pairs of queues, and taps with as many.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use coracle_tests::case::Context;
use coracle_tests::guest::run;
use coracle_tests::harness::hosts::Star;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::{BYTES, END_WITHIN, HOST, Network};
use crate::snapshot::{Files, killed, saved, started, with};

/// What is in front of a command of the guest that is to run on its second processor.
const ON_THE_SECOND: &str = "taskset 2 ";
/// How long a thread is watched that has nothing to do.
const WATCHED: Duration = Duration::from_secs(3);

/// Linux uses a pair for each processor by itself; what its second one fetches goes by the second pair, also when the guest goes
/// on elsewhere.
pub(super) fn two_are_used(context: &Context) -> Outcome {
    let mut network = Network::new(context, Duration::from_millis(50), ON_THE_SECOND)?;
    // There is always something to see, however soon all of it is there.
    let asks = format!("; {ON_THE_SECOND}ping -i 0.1 {HOST}");
    network.words.push_str(&asks);
    let host = &network.star.server;
    for tap in ["tap2", "tap3"] {
        host.tap(tap, &["multi_queue"])?;
    }
    let directory = tempfile::tempdir()?;
    let config = network
        .machine(context, directory.path(), &interface("tap2", 2))?
        .vcpus(2)
        .config();
    let first = host.inside(|| started(context, &config))??;
    comes_so_far(&network, &first, BYTES / 4)?;
    second_pair_moves(&first)?;
    let shown = host.shows("tap2")?;
    ensure!(shown.contains("numqueues 2 numdisabled 0 "), "{shown}");
    let files = Files::in_directory(directory.path(), "test-net");
    saved(&first, &files, "Full")?;
    killed(first)?;
    ensure!(network.sent.load(Ordering::SeqCst) < BYTES, "it has all of it");

    let second = host.inside(|| Launch::new(&context.environment)?.start())??;
    let overrides = json!([{ "iface_id": "eth0", "host_dev_name": "tap3" }]);
    let load = with(files.load("lazy"), "", "network_overrides", overrides);
    second.must("PUT", "/snapshot/load", Some(&load))?;
    second_pair_moves(&second)?;
    let shown = host.shows("tap3")?;
    ensure!(shown.contains("numqueues 2 numdisabled 0 "), "{shown}");
    network.has_come_back()?;
    killed(second)
}

/// A guest with one processor uses one pair, and the kernel gives the other queue no frame.
pub(super) fn one_is_used(context: &Context) -> Outcome {
    let network = Network::new(context, Duration::from_millis(50), "")?;
    let host = &network.star.server;
    host.tap("tap2", &["multi_queue"])?;
    let directory = tempfile::tempdir()?;
    let machine = network.machine(context, directory.path(), &interface("tap2", 2))?;
    let monitor = host.inside(|| started(context, &machine.config()))??;
    comes_so_far(&network, &monitor, BYTES / 4)?;
    let shown = host.shows("tap2")?;
    ensure!(shown.contains("numqueues 1 numdisabled 1 "), "{shown}");
    monitor.wait(END_WITHIN)?.expect(0)?;
    network.has_come_back()
}

/// What opens a tap twice, and executes its arguments with the descriptors as numbers 9 and 10.
const HANDS_IN_TWO: &str = "\
import fcntl, os, struct, sys
tuns = [os.open('/dev/net/tun', os.O_RDWR) for _ in range(2)]
for tun in tuns: # TUNSETIFF: IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR
    fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH22x', b'tap2', 0x5102))
for number, tun in enumerate(tuns): os.dup2(tun, 9 + number)
os.execv(sys.argv[1], sys.argv[1:])
";

pub(super) fn are_handed_in(context: &Context) -> Outcome {
    let network = Network::new(context, Duration::ZERO, ON_THE_SECOND)?;
    let host = &network.star.server;
    host.tap("tap2", &["multi_queue"])?;
    let launch = Launch::new(&context.environment)?.by_way_of(["python3", "-c", HANDS_IN_TWO]);
    let machine = network
        .machine(context, launch.directory(), &interface("/dev/fd/9,/dev/fd/10", 2))?
        .vcpus(2);
    let ended = host.inside(|| run(launch, &machine, END_WITHIN))??;
    ended.expect(0)?;
    network.has_come_back()?;

    let star = Star::new(0)?;
    star.server.bridge(HOST, &[])?;
    star.server.tap("tap2", &["multi_queue"])?;
    let launch = Launch::new(&context.environment)?.by_way_of(["python3", "-c", HANDS_IN_TWO]);
    let monitor = star.server.inside(|| launch.start())??;
    for (names, pairs, words) in [
        ("/dev/fd/9", 2, "a descriptor for each of 2 pairs"),
        ("/dev/fd/9,/dev/fd/10", 1, "a descriptor for each of 1 pair"),
        ("/dev/fd/9,/dev/fd/0", 2, "no descriptor of a tap"),
        ("/dev/fd/9,tap2", 2, "no descriptor of a tap"),
    ] {
        is_refused(&monitor, names, pairs, words)?;
    }
    killed(monitor)
}

pub(super) fn what_cannot_be_had(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    star.server.bridge(HOST, &["tap0"])?;
    star.server.tap("tap2", &["multi_queue"])?;
    let monitor = star
        .server
        .inside(|| Launch::new(&context.environment)?.start())??;
    for (tap, pairs, words) in [
        ("tap2", 0, "`queue_pairs` is 1 to 8"),
        ("tap2", 9, "`queue_pairs` is 1 to 8"),
        ("tap2", 1, "without `multi_queue`"),
        ("tap0", 2, "mode tap multi_queue"),
    ] {
        is_refused(&monitor, tap, pairs, words)?;
    }
    let body = interface("tap2", 8);
    monitor.must("PUT", "/network-interfaces/eth0", Some(&body))?;
    killed(monitor)
}

/// Somebody deletes the tap of a guest that runs: the guest has no network then, and the monitor nothing to do.
pub(super) fn tap_is_deleted(context: &Context) -> Outcome {
    let network = Network::new(context, Duration::from_millis(50), "")?;
    let host = &network.star.server;
    let directory = tempfile::tempdir()?;
    let machine = network.machine(context, directory.path(), &super::interface("tap0"))?;
    let monitor = host.inside(|| started(context, &machine.config()))??;
    comes_so_far(&network, &monitor, BYTES / 8)?;
    host.remove("tap0")?;
    thread::sleep(Duration::from_millis(200));
    let before = time_of(&monitor, "net eth0")?;
    thread::sleep(WATCHED);
    let spent = time_of(&monitor, "net eth0")?.saturating_sub(before);
    ensure!(
        spent < WATCHED / 10,
        "{spent:?} in {WATCHED:?} for a tap that is not there"
    );
    monitor.set_state("Paused")?;
    killed(monitor)
}

fn interface(tap: &str, pairs: u16) -> Value {
    with(super::interface(tap), "", "queue_pairs", json!(pairs))
}

fn is_refused(monitor: &Monitor, tap: &str, pairs: u16, words: &str) -> Outcome {
    let body = interface(tap, pairs);
    let answer = monitor.request("PUT", "/network-interfaces/eth0", Some(&body))?;
    ensure!(answer.status == 400, "{tap}, {pairs}: {answer:?}");
    ensure!(answer.fault().contains(words), "{tap}, {pairs}: {answer:?}");
    Ok(())
}

/// Waits until so many bytes have left the server.
fn comes_so_far(network: &Network, monitor: &Monitor, bytes: usize) -> Outcome {
    let deadline = Instant::now() + END_WITHIN;
    while network.sent.load(Ordering::SeqCst) < bytes {
        ensure!(
            Instant::now() < deadline,
            "no more than {} bytes have been sent: {}",
            network.sent.load(Ordering::SeqCst),
            monitor.console.text()
        );
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until the thread of the second pair has worked: it would not wake by itself.
fn second_pair_moves(monitor: &Monitor) -> Outcome {
    let wakes = |name: &str| -> Outcome<u64> {
        let thread = monitor.process().thread_named(name)?;
        let path = format!("/proc/{}/task/{thread}/status", monitor.process().0);
        let status = std::fs::read_to_string(path)?;
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        Ok(line.ok_or("a thread has no count of its waits")?.trim().parse()?)
    };
    let deadline = Instant::now() + END_WITHIN;
    loop {
        let (first, second) = (wakes("net eth0")?, wakes("net eth0.1")?);
        if second > 16 {
            println!("the first pair has waited {first} times, the second one {second} times");
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the second pair has waited {second} times only"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// The processor's time that a thread has had.
fn time_of(monitor: &Monitor, name: &str) -> Outcome<Duration> {
    let times = monitor.process().thread_times()?;
    let thread = times.into_iter().find(|thread| thread.name == name);
    thread
        .map(|thread| thread.total)
        .ok_or_else(|| format!("there is no thread `{name}`").into())
}
