//! Guests that go on at the target before their memory is there, and what becomes of them when one side or the way is lost.

use std::net::SocketAddr;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use coracle_tests::case::{Context, text};
use coracle_tests::guest::Machine;
use coracle_tests::harness::proxy::{Direction, Fault, Proxy};
use coracle_tests::harness::receiver::Receiver;
use coracle_tests::http::Answer;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::place::Place;
use super::{Hosts, PERIOD, SOON, merge};

mod failures;

pub(super) use failures::{MESSAGES, survives_every_failure};

/// What the guest writes again and again, faster than any link here.
const WRITTEN_MIB: u64 = 16;
/// So that what is left when it goes takes seconds.
const LINK_BYTES_PER_S: u64 = 12 << 20;
/// For the first round, which nobody has to see.
const FAST_BYTES_PER_S: u64 = 200 << 20;
/// How long each side is to wait for the other where it does not come back.
const WAIT_S: u64 = 3;

/// A guest on its way that has gone on at the target, and is still fetched from the source.
struct Journey {
    source: Monitor,
    target: Monitor,
    proxy: Proxy,
    sending: JoinHandle<Outcome<Answer>>,
    receiving: JoinHandle<Outcome>,
    hosts: Hosts,
    place: Place,
    vcpus: u32,
    _directory: tempfile::TempDir,
}

/// What is asked of both sides.
#[derive(Clone, Copy)]
struct Asked<'a> {
    disk: &'a str,
    vcpus: u32,
    /// How long it writes.
    ms: u64,
    wait_s: u64,
}

const SHORT: Asked<'_> = Asked {
    disk: "a file",
    vcpus: 1,
    ms: 6000,
    wait_s: 60,
};

impl Journey {
    /// Sends a guest, and waits until it runs at the target without its memory.
    fn begin(context: &Context, asked: Asked<'_>) -> Outcome<Self> {
        let directory = tempfile::tempdir()?;
        let hosts = Hosts::new(directory.path())?;
        let place = Place::new(asked.disk, directory.path(), 4)?;
        let source = Launch::new(&context.environment)?.start()?;
        let vcpus = asked.vcpus;
        let words = format!(
            "do=hello do=vcpus:count={vcpus},ms=50 do=pattern-write:mib=4,seed=5 do=flush do=dirty:mib={WRITTEN_MIB},ms={},\
             seed=3 do=pattern-verify:mib=4,seed=5 do=checksum:mib=1",
            asked.ms
        );
        source.configure(
            &Machine::unikernel(&context.environment, &words)
                .vcpus(vcpus)
                .memory_mib(64)
                .drive(place.drive("d"))
                .config(),
        )?;
        source.start_instance()?;
        source.console.wait_for("dirty: ready", SOON)?;
        let (target, receiving, to) =
            hosts.receiver_of(context, &json!({ "postcopy_wait_s": asked.wait_s }))?;
        let server: SocketAddr = to.parse()?;
        let proxy = Proxy::start(server.ip(), server, context.seed.stream("link"))?;
        pace(&proxy, FAST_BYTES_PER_S)?;
        let mut body = hosts.send(&proxy.address().to_string());
        merge(
            &mut body,
            &json!({
                "allow_postcopy": true, "mode": "Precopy", "timeout_s": 0, "downtime_ms": 1, "postcopy_wait_s": asked.wait_s,
            }),
        );
        let mut caller = source.connect()?;
        let sending =
            thread::spawn(move || caller.request("PUT", "/migration/send", Some(&body.to_string())));
        wait_for(&source, "it stops", |status| is(status, "Sending").then_some(()))?;
        pace(&proxy, LINK_BYTES_PER_S)?;
        let journey = Self {
            source,
            target,
            proxy,
            sending,
            receiving,
            hosts,
            place,
            vcpus,
            _directory: directory,
        };
        for side in [&journey.source, &journey.target] {
            wait_for(side, "it is fetched", is_connected)?;
        }
        Ok(journey)
    }

    /// The guest has all of its memory in the end, and finds it as it was; the source has ended.
    fn arrives(self) -> Outcome {
        let how = self.target.log()?;
        let answer = self.sending.join().map_err(|_| "a thread has panicked")??;
        ensure!(answer.status == 204, "{}: {how}", answer.body);
        self.receiving.join().map_err(|_| "a thread has panicked")??;
        let sent = self.source.wait(SOON)?;
        sent.expect(0)?;
        let ended = self.target.wait(SOON)?;
        ended.expect(0)?;
        for said in ["dirty: ok", "pattern-verify: ok", "checksum: mib=1"] {
            ensure!(ended.console.contains(said), "{said}: {}", ended.console);
        }
        Ok(())
    }

    /// Whoever comes next has the disk, with all that was flushed.
    fn boots(context: &Context, place: &Place) -> Outcome {
        place.free()?;
        let words = "do=hello do=pattern-verify:mib=4,seed=5 do=exit:status=3";
        let config = Machine::unikernel(&context.environment, words)
            .memory_mib(32)
            .drive(place.drive("d"))
            .config();
        let monitor = Launch::new(&context.environment)?.start()?;
        monitor.configure(&config)?;
        monitor.start_instance()?;
        let ended = monitor.wait(SOON)?;
        ensure!(ended.console.contains("pattern-verify: ok"), "{}", ended.console);
        ended.expect(3)
    }
}

fn pace(proxy: &Proxy, bytes_per_second: u64) -> Outcome {
    proxy.set(Direction::ToServer, Fault::Rate { bytes_per_second })
}

fn is(status: &Value, state: &str) -> bool {
    status.get("state") == Some(&json!(state))
}

fn is_connected(status: &Value) -> Option<()> {
    (is(status, "PostCopy") && status.get("is_connected") == Some(&json!(true))).then_some(())
}

fn is_cut(status: &Value) -> Option<()> {
    (is(status, "PostCopy") && status.get("is_connected") == Some(&json!(false))).then_some(())
}

/// Asks how far a migration is until `found` finds what it looks for.
fn wait_for<T>(monitor: &Monitor, what: &str, found: impl Fn(&Value) -> Option<T>) -> Outcome<T> {
    let until = Instant::now() + SOON;
    loop {
        let status = monitor.must("GET", "/migration", None)?.json()?;
        if let Some(found) = found(&status) {
            return Ok(found);
        }
        ensure!(Instant::now() < until, "{what}: {status}; {}", monitor.log()?);
        thread::sleep(PERIOD);
    }
}

/// With one vCPU and with two, with a disk of each kind.
pub(super) fn goes_on_without(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for round in 0..context.count(1, 20) {
        for disk in Place::KINDS {
            let vcpus = 1 + u32::try_from(seed.below(2))?;
            // As long as it takes, whatever clock counts that.
            let wait_s = u64::MAX;
            let asked = Asked {
                disk,
                vcpus,
                wait_s,
                ..SHORT
            };
            one_journey(context, asked)
                .map_err(|e| format!("round {round}, {disk}, {vcpus} vCPUs: {}", text(&e)))?;
        }
    }
    Ok(())
}

fn one_journey(context: &Context, asked: Asked<'_>) -> Outcome {
    let journey = Journey::begin(context, asked)?;
    let (source, target) = (&journey.source, &journey.target);
    ensure!(
        source.log()?.contains("the guest goes on without"),
        "{}",
        source.log()?
    );
    // What would lose the guest is refused, and what needs all of its memory has to wait; pauses are as always.
    refused(source, "DELETE", "/migration", None, "it would be lost without")?;
    refused(target, "DELETE", "/migration", None, "still on their way")?;
    let elsewhere = json!({ "to": "127.0.0.1:1" });
    refused(
        source,
        "PUT",
        "/migration/recover",
        Some(&elsewhere),
        "nothing has to be recovered",
    )?;
    let again = journey.hosts.send("127.0.0.1:1");
    refused(
        target,
        "PUT",
        "/migration/send",
        Some(&again),
        "still being fetched",
    )?;
    target.set_state("Paused")?;
    let files = json!({ "snapshot_path": "test-s", "mem_file_path": "test-m" });
    refused(
        target,
        "PUT",
        "/snapshot/create",
        Some(&files),
        "still being fetched",
    )?;
    target.set_state("Resumed")?;
    ensure!(journey.vcpus == asked.vcpus, "it has so many");
    journey.arrives()
}

fn refused(monitor: &Monitor, method: &str, path: &str, body: Option<&Value>, why: &str) -> Outcome {
    let answer = monitor.request(method, path, body)?;
    ensure!(
        answer.status == 400 && answer.fault().contains(why),
        "{method} {path}, {why}: {} {}",
        answer.status,
        answer.body
    );
    Ok(())
}

/// Connections that are reset, a byte that is changed on the way, a source that is stopped for longer than anybody waits for it:
/// the source calls again by itself.
pub(super) fn finds_each_other_again(context: &Context) -> Outcome {
    let faults: &[&str] = match context.count(0, 1) {
        0 => &["reset", "a byte is changed"],
        _ => &[
            "reset",
            "a byte is changed",
            "nothing passes",
            "the source is frozen",
        ],
    };
    for fault in faults {
        one_loss(context, fault).map_err(|e| format!("{fault}: {}", text(&e)))?;
    }
    Ok(())
}

fn one_loss(context: &Context, fault: &str) -> Outcome {
    let journey = Journey::begin(context, Asked { vcpus: 2, ..SHORT })?;
    let connections = |monitor: &Monitor| -> Outcome<usize> {
        Ok(monitor.log()?.matches("migration: the source is there").count())
    };
    ensure!(connections(&journey.target)? == 1, "it is there once");
    match fault {
        "reset" => journey.proxy.cut()?,
        "a byte is changed" => journey
            .proxy
            .set(Direction::ToServer, Fault::Corrupt { bytes: 100_000 })?,
        "nothing passes" => {
            journey.proxy.set(Direction::ToServer, Fault::BlackHole)?;
            wait_for(&journey.target, "it is cut", is_cut)?;
        }
        _ => {
            journey.source.signal(Signal::STOP)?;
            wait_for(&journey.target, "it is cut", is_cut)?;
            thread::sleep(Duration::from_secs(20));
            journey.source.signal(Signal::CONT)?;
        }
    }
    let until = Instant::now() + SOON;
    while connections(&journey.target)? == 1 {
        ensure!(
            Instant::now() < until,
            "it is not lost: {}",
            journey.target.log()?
        );
        if fault != "a byte is changed" {
            pace(&journey.proxy, LINK_BYTES_PER_S)?;
        }
        thread::sleep(PERIOD * 10);
    }
    pace(&journey.proxy, FAST_BYTES_PER_S)?;
    journey.arrives()
}

/// The way is gone for good: each side is told of another.
pub(super) fn is_recovered_by_another_way(context: &Context) -> Outcome {
    let journey = Journey::begin(context, SHORT)?;
    let Journey {
        source,
        target,
        proxy,
        sending,
        receiving,
        hosts,
        place,
        vcpus,
        _directory,
    } = journey;
    drop(proxy);
    for side in [&source, &target] {
        wait_for(side, "it is cut", is_cut)?;
        // Whoever is asked answers, while the guest waits for its memory.
        side.must("GET", "/", None)?;
    }
    let before = wait_for(&target, "it listens", |status| status.get("listen").cloned())?;
    recover(context, &target, &["--listen", "127.0.0.1:0"])?;
    let after = wait_for(&target, "it listens", |status| status.get("listen").cloned())?;
    ensure!(before != after, "it listens where it did: {before}");
    let server: SocketAddr = after.as_str().ok_or("it is an address")?.parse()?;
    refused(
        &source,
        "PUT",
        "/migration/recover",
        Some(&json!({ "listen": "127.0.0.1:0" })),
        "say where the receiver listens",
    )?;
    let proxy = Proxy::start(server.ip(), server, context.seed.stream("another link"))?;
    recover(context, &source, &[&format!("tls://{}", proxy.address())])?;
    Journey {
        source,
        target,
        proxy,
        sending,
        receiving,
        hosts,
        place,
        vcpus,
        _directory,
    }
    .arrives()
}

/// As a user tells `side` of another way.
fn recover(context: &Context, side: &Monitor, way: &[&str]) -> Outcome {
    let mut command = Command::new(&context.environment.coraclectl);
    command
        .arg("migrate")
        .arg(side.socket())
        .args(way)
        .arg("--recover");
    let done = command.output()?;
    ensure!(done.status.success(), "{command:?}: {done:?}");
    Ok(())
}

/// A source that dies takes the guest along, and nothing else: the target says so, and the disk is as the guest has flushed it.
pub(super) fn dies_with_its_source(context: &Context) -> Outcome {
    for end in ["the time is over", "somebody ends it"] {
        let wait_s = if end == "the time is over" { WAIT_S } else { 600 };
        let asked = Asked {
            ms: 60_000,
            wait_s,
            ..SHORT
        };
        let journey = Journey::begin(context, asked)?;
        journey.source.signal(Signal::KILL)?;
        wait_for(&journey.target, "it is cut", is_cut)?;
        if end == "somebody ends it" {
            journey.target.must("DELETE", "/migration", None)?;
        }
        let ended = journey.target.wait(SOON)?;
        ended.expect(164)?;
        ensure!(
            ended.errors.contains("guest memory cannot be loaded")
                && ended.errors.contains("are at the source of the migration"),
            "{end}: {}",
            ended.errors
        );
        drop(journey.sending.join());
        Journey::boots(context, &journey.place)?;
    }
    Ok(())
}

/// A target that dies takes the guest along as well; the source says so, and does not wait for ever.
pub(super) fn dies_with_its_target(context: &Context) -> Outcome {
    let asked = Asked {
        ms: 60_000,
        wait_s: WAIT_S,
        ..SHORT
    };
    let journey = Journey::begin(context, asked)?;
    journey.target.signal(Signal::KILL)?;
    wait_for(&journey.source, "it is cut", is_cut)?;
    let ended = journey.source.wait(SOON)?;
    ended.expect(165)?;
    ensure!(
        ended.errors.contains("has not been there for 3 s"),
        "{}",
        ended.errors
    );
    drop(journey.sending.join());
    Journey::boots(context, &journey.place)
}

/// Whoever asks a source to stop that is still needed has to ask twice.
pub(super) fn is_not_stopped_by_the_way(context: &Context) -> Outcome {
    let journey = Journey::begin(context, SHORT)?;
    journey.source.signal(Signal::TERM)?;
    let log = "the process ends when they are there";
    let until = Instant::now() + SOON;
    while !journey.source.log()?.contains(log) {
        ensure!(Instant::now() < until, "{}", journey.source.log()?);
        thread::sleep(PERIOD);
    }
    journey.arrives()?;
    let asked = Asked {
        ms: 60_000,
        wait_s: WAIT_S,
        ..SHORT
    };
    let journey = Journey::begin(context, asked)?;
    journey.source.signal(Signal::TERM)?;
    thread::sleep(Duration::from_millis(200));
    journey.source.signal(Signal::TERM)?;
    journey.source.wait(SOON)?.expect(143)?;
    journey.target.wait(SOON)?.expect(164)
}

/// A target that has no userfaultfd says so, and the guest goes there as it would without being asked.
pub(super) fn goes_without_where_it_cannot(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let source = Launch::new(&context.environment)?.start()?;
    let words = format!("do=hello do=dirty:mib={WRITTEN_MIB},ms=3000,seed=3");
    source.configure(
        &Machine::unikernel(&context.environment, &words)
            .memory_mib(32)
            .config(),
    )?;
    source.start_instance()?;
    source.console.wait_for("dirty: ready", SOON)?;
    let refuses = context
        .environment
        .after_mounting("mount --bind /dev/null /dev/userfaultfd");
    let launch = Launch::new(&context.environment)?.by_way_of(refuses.iter().map(String::as_str));
    let monitor = launch.start()?;
    let body = json!({ "listen": "127.0.0.1:0", "tls": hosts.tls });
    let receiver = Receiver::of(monitor, &body)?;
    let mut body = hosts.send(receiver.to());
    merge(
        &mut body,
        &json!({ "allow_postcopy": true, "mode": "Precopy", "timeout_s": 0, "on_timeout": "Stop" }),
    );
    source.must("PUT", "/migration/send", Some(&body))?;
    let log = source.log()?;
    ensure!(
        log.contains("vm.unprivileged_userfaultfd") && !log.contains("the guest goes on without"),
        "{log}"
    );
    source.wait(SOON)?.expect(0)?;
    let ended = receiver.received()?.wait(SOON)?;
    ended.expect(0)?;
    ensure!(ended.console.contains("dirty: ok"), "{}", ended.console);
    Ok(())
}
