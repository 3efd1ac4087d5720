//! Disks that go along with their guest, because the other side does not reach them.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use coracle_storage::lease::{Phase, inspect};
use coracle_tests::case::{Context, text};
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::harness::oracle::Oracle;
use coracle_tests::monitor::{Ended, Launch, Monitor};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use instrument::pattern::{self, SECTOR_BYTES, SECTOR_WORDS};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::place::Place;
use super::{Hosts, PERIOD, SOON, merge};

mod failures;
mod refusals;

pub(super) use failures::{MESSAGES, survives_every_failure};
pub(super) use refusals::{are_told, does_not_fit};

const MIB: u64 = 1 << 20;
/// So slow that a disk of some MiB takes seconds.
const SLOW_BYTES_PER_S: u64 = 2 << 20;

/// What both sides are asked so that drive `id` becomes `path`.
fn along(id: &str, path: &Path) -> (Value, Value) {
    let drive = json!({ "drive_id": id, "path_on_host": path });
    (
        json!({ "overrides": { "drives": [drive] } }),
        json!({ "copy_disks": [id] }),
    )
}

fn path_of(path: &Path) -> Outcome<&str> {
    Ok(path.to_str().ok_or("a path of a test is text")?)
}

/// The last step of the lease of an image.
fn phase(path: &Path) -> Outcome<Option<Phase>> {
    Ok(inspect(path_of(path)?, None)?.newest?.map(|record| record.phase))
}

/// A disk of `mib`, the first `written` MiB of which hold the pattern of `seed`.
fn patterned(path: &Path, mib: u64, written: u64, seed: u64) -> Outcome {
    let file = File::create_new(path)?;
    file.set_len(mib * MIB)?;
    let mut words = vec![0; (1 << 20) / SECTOR_BYTES * SECTOR_WORDS];
    for number in 0..written {
        pattern::fill(&mut words, seed, number * MIB / SECTOR_BYTES as u64);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all_at(&bytes, number * MIB)?;
    }
    Ok(())
}

/// How much of a file takes space.
fn space(path: &Path) -> Outcome<u64> {
    Ok(path.metadata()?.blocks() * 512)
}

/// A drive that is written so slowly that it is written while it goes along.
fn drive(id: &str, path: &Path, bytes_per_ms: u64) -> Value {
    json!({
        "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": false, "cache_type": "Writeback",
        "rate_limiter": { "bandwidth": { "size": bytes_per_ms * 10, "refill_time": 10 } }
    })
}

/// From place to place, with one disk that is written all the while, and one that is only read.
pub(super) fn goes_along(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for round in 0..context.count(3, 100) {
        one_move(context, &mut seed).map_err(|e| format!("round {round}: {}", text(&e)))?;
    }
    Ok(())
}

fn one_move(context: &Context, seed: &mut Seed) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let at = |name: &str| directory.path().join(name);
    let number = seed.below(1 << 30);
    patterned(&at("d0"), 32, 12, number)?;
    patterned(&at("e0"), 8, 4, number)?;
    let queues = 1 + seed.below(3);
    let words = format!(
        "do=hello do=pattern-write:mib=8,seed={number}1,bs=65536,depth=8 do=discard:mib=2,offset_mib=10 do=flush \
         do=write-zeroes:mib=1,offset_mib=8,unmap=1 do=pattern-write:mib=4,seed={number}2,bs=4096,depth=32 do=flush \
         do=dirty:mib=8,ms=200,seed=3 do=pattern-verify:mib=4,seed={number}2 do=pattern-verify:mib=4,offset_mib=4,seed={number}1 \
         do=read-check-zero:mib=1,offset_mib=8 do=pattern-verify:mib=1,offset_mib=9,seed={number} \
         do=read-check-zero:offset_mib=10 do=pattern-verify:dev=1,mib=4,seed={number} do=read-check-zero:dev=1,offset_mib=4"
    );
    let written = merged(drive("d", &at("d0"), 16 << 10), &json!({ "num_queues": queues }));
    let config = Machine::unikernel(&context.environment, &words)
        .memory_mib(64)
        .drive(written)
        .drive(json!({
            "drive_id": "e", "path_on_host": at("e0"), "is_root_device": false, "is_read_only": true
        }))
        .config();
    let mut monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&config)?;
    monitor.start_instance()?;
    monitor.console.wait_for("hello", SOON)?;
    let mut said = String::new();
    for hop in 1..=2 {
        thread::sleep(Duration::from_micros(seed.below(300_000)));
        let (d, e) = (at(&format!("d{hop}")), at(&format!("e{hop}")));
        if seed.below(2) == 0 {
            // Somebody has made it for us.
            File::create(&d)?;
        }
        let drives = json!([
            { "drive_id": "d", "path_on_host": d }, { "drive_id": "e", "path_on_host": e }
        ]);
        let (receiver, call, to) =
            hosts.receiver_of(context, &json!({ "overrides": { "drives": drives } }))?;
        let body = merged(
            hosts.send(&to),
            &json!({ "copy_disks": ["e", "d"], "streams": 1 + seed.below(2) }),
        );
        let sent = monitor.request("PUT", "/migration/send", Some(&body));
        if !matches!(&sent, Ok(answer) if answer.status == 204) {
            receiver.must("DELETE", "/migration", None)?;
            ensure!(call.join().is_ok_and(|call| call.is_err()), "it has received");
            let sent = sent.map(|answer| answer.fault());
            ensure!(!monitor.is_running()?, "it was not sent, and runs: {sent:?}");
            ensure!(!e.exists(), "a copy was left");
            break;
        }
        call.join().map_err(|_| "a thread has panicked")??;
        let ended = std::mem::replace(&mut monitor, receiver).wait(SOON)?;
        ended.expect(0)?;
        said.push_str(&ended.console);
        let left = phase(&at(&format!("d{}", hop - 1)))?;
        ensure!(left == Some(Phase::Moved), "what was left behind says {left:?}");
        let taken = [space(&d)?, space(&e)?];
        ensure!(
            taken < [14 * MIB, 5 * MIB] && taken[1] < 5 * MIB,
            "they take {taken:?}"
        );
    }
    let ended = monitor.wait(SOON)?;
    has_ended_well(&ended, said, &words)
}

fn merged(mut body: Value, other: &Value) -> Value {
    merge(&mut body, other);
    body
}

/// The guest has found everything as it was to be: it ends at the first thing that is not.
fn has_ended_well(ended: &Ended, mut said: String, words: &str) -> Outcome {
    said.push_str(&ended.console);
    let verified = words.matches("pattern-verify").count();
    let found = said.matches("pattern-verify: ok").count();
    ensure!(
        ended.status.code() == Some(0) && found == verified,
        "{}: {words}: {said}{}",
        ended.status,
        ended.errors
    );
    Ok(())
}

/// What was acknowledged on either side is on the copy, and what was left behind has what was acknowledged before.
pub(super) fn loses_nothing(context: &Context) -> Outcome {
    const BLOCKS: u64 = 256;
    let mut seed = context.seed.clone();
    for _ in 0..context.count(2, 100) {
        let directory = tempfile::tempdir()?;
        let hosts = Hosts::new(directory.path())?;
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        blank_image(&from, 4)?;
        let words = format!("do=hello do=stamp:writer=1,blocks={BLOCKS},flush_every=8,ms=0");
        let source = running(context, &words, drive("d", &from, 16 << 10))?;
        source.console.wait_for("stamp: acked=", SOON)?;
        thread::sleep(Duration::from_micros(seed.below(100_000)));
        let (receive, send) = along("d", &to);
        let (target, call, address) = hosts.receiver_of(context, &receive)?;
        let body = merged(hosts.send(&address), &send);
        source.must("PUT", "/migration/send", Some(&body))?;
        call.join().map_err(|_| "a thread has panicked")??;
        let ended = source.wait(SOON)?;
        ended.expect(0)?;
        thread::sleep(Duration::from_micros(seed.below(100_000)));
        target.console.wait_for("stamp: acked=", SOON)?;
        target.signal(Signal::KILL)?;
        let after = target.wait(SOON)?;
        for (path, console) in [
            (&from, ended.console.clone()),
            (&to, ended.console + &after.console),
        ] {
            let mut oracle = Oracle::new(BLOCKS);
            oracle.granted(1)?;
            oracle.acknowledged(1, acknowledged(&console));
            oracle.look(&std::fs::read(path)?)?;
        }
        // Whoever comes next has the copy, and not what was left behind.
        let refused = started(context, &from)?;
        ensure!(refused.contains("what was left behind"), "{refused}");
        ensure!(started(context, &to)?.is_empty(), "the copy cannot be had");
    }
    Ok(())
}

/// How far the writer has come, by the last whole line that says so.
fn acknowledged(console: &str) -> u64 {
    let whole = console.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let mut numbers = whole.filter_map(|line| line.trim_end().strip_prefix("stamp: acked=")?.parse().ok());
    numbers.next_back().unwrap_or(0)
}

/// Why a machine with that disk does not start; empty if it does.
fn started(context: &Context, disk: &Path) -> Outcome<String> {
    let config = Machine::unikernel(&context.environment, "do=hello do=exit:status=3")
        .memory_mib(32)
        .disk("d", disk)
        .config();
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&config)?;
    let start = json!({ "action_type": "InstanceStart" });
    let answer = monitor.request("PUT", "/actions", Some(&start))?;
    if answer.status == 204 {
        monitor.wait(SOON)?.expect(3)?;
        return Ok(String::new());
    }
    Ok(answer.fault())
}

fn running(context: &Context, words: &str, drive: Value) -> Outcome<Monitor> {
    let config = Machine::unikernel(&context.environment, words)
        .memory_mib(32)
        .drive(drive)
        .config();
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&config)?;
    monitor.start_instance()?;
    monitor.console.wait_for("hello", SOON)?;
    Ok(monitor)
}

/// Whoever ends it in the middle, nothing of the copy is left, and a guest whose process lives runs on and can be sent again.
pub(super) fn leaves_nothing_behind(context: &Context) -> Outcome {
    type End = fn(&Monitor, &Monitor, &Path) -> Outcome;
    let ends: [(&str, End); 5] = [
        ("the source gives it up", |source, _, _| {
            source.must("DELETE", "/migration", None).map(drop)
        }),
        ("the target gives it up", |_, target, _| {
            target.must("DELETE", "/migration", None).map(drop)
        }),
        ("the target is stopped", |_, target, _| {
            target.signal(Signal::TERM)
        }),
        ("the source is killed", |source, _, _| source.signal(Signal::KILL)),
        // Without its name it could not be opened, and by then the guest would be no longer here.
        ("somebody renames it", |_, _, copy| {
            Ok(std::fs::rename(copy, copy.with_extension("away"))?)
        }),
    ];
    for (name, end) in ends {
        // Long enough for what is left to be copied.
        let ticks = if name == "somebody renames it" { 800 } else { 300 };
        given_up(context, name == "the source is killed", ticks, end)
            .map_err(|e| format!("{name}: {}", text(&e)))?;
    }
    Ok(())
}

fn given_up(
    context: &Context,
    is_lost: bool,
    ticks: u32,
    end: impl FnOnce(&Monitor, &Monitor, &Path) -> Outcome,
) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    patterned(&from, 16, 8, 5)?;
    let words = &format!("do=hello do=tick:ms=10,count={ticks} do=pattern-verify:mib=8,seed=5");
    let source = running(context, words, drive("d", &from, 16 << 10))?;
    let (receive, send) = along("d", &to);
    let (target, call, address) = hosts.receiver_of(context, &receive)?;
    let body = merged(hosts.send(&address), &send);
    let slowly = merged(body, &json!({ "bandwidth_limit": SLOW_BYTES_PER_S }));
    let mut caller = source.connect()?;
    let sending = thread::spawn(move || caller.request("PUT", "/migration/send", Some(&slowly.to_string())));
    let until = Instant::now() + SOON;
    loop {
        let status = target.must("GET", "/migration", None)?.json()?;
        let bytes = status.get("disk_sent_bytes").and_then(Value::as_u64);
        if bytes > Some(MIB) {
            break;
        }
        ensure!(Instant::now() < until, "nothing of the disk comes: {status}");
        thread::sleep(PERIOD);
    }
    ensure!(to.exists(), "there is a copy to be removed");
    let left = source.must("GET", "/migration", None)?.json()?;
    let left = left.get("disk_left_bytes").and_then(Value::as_u64);
    ensure!(left > Some(0) && left <= Some(8 * MIB), "{left:?} bytes are left");
    end(&source, &target, &to)?;
    let answer = sending.join().map_err(|_| "a thread has panicked")?;
    ensure!(
        is_lost
            || matches!(&answer, Ok(answer) if answer.status == 400 && answer.fault().contains("runs on here")),
        "{answer:?}"
    );
    ensure!(call.join().is_ok_and(|call| call.is_err()), "it has received");
    let until = Instant::now() + SOON;
    while to.exists() {
        ensure!(Instant::now() < until, "the copy was left");
        thread::sleep(PERIOD);
    }
    if is_lost {
        return Ok(());
    }
    let (target, call, address) = hosts.receiver_of(context, &receive)?;
    source.must(
        "PUT",
        "/migration/send",
        Some(&merged(hosts.send(&address), &send)),
    )?;
    call.join().map_err(|_| "a thread has panicked")??;
    let said = source.wait(SOON)?;
    said.expect(0)?;
    has_ended_well(&target.wait(SOON)?, said.console, words)
}

/// The memory is fetched later, and the disk is there at once.
pub(super) fn is_whole_before_its_memory(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    blank_image(&from, 8)?;
    let words = "do=hello do=pattern-write:mib=4,seed=5 do=flush do=dirty:mib=16,ms=3000,seed=3 do=pattern-verify:mib=4,seed=5";
    let source = running(context, words, Place::File(from.clone()).drive("d"))?;
    source.console.wait_for("dirty: ready", SOON)?;
    let (receive, send) = along("d", &to);
    let (target, call, address) = hosts.receiver_of(context, &receive)?;
    let body = merged(
        merged(hosts.send(&address), &send),
        &json!({
            "allow_postcopy": true, "mode": "Precopy", "timeout_s": 0, "downtime_ms": 1, "bandwidth_limit": 40_000_000,
        }),
    );
    source.must("PUT", "/migration/send", Some(&body))?;
    call.join().map_err(|_| "a thread has panicked")??;
    let log = source.log()?;
    ensure!(
        log.contains("the guest goes on without"),
        "its memory went first: {log}"
    );
    let said = source.wait(SOON)?;
    said.expect(0)?;
    has_ended_well(&target.wait(SOON)?, said.console, words)
}

/// What a guest has in an overlay goes along without its base, which both hosts have.
pub(super) fn takes_its_overlay_along(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for _ in 0..context.count(2, 100) {
        let directory = tempfile::tempdir()?;
        let hosts = Hosts::new(directory.path())?;
        let at = |name: &str| directory.path().join(name);
        let number = seed.below(1 << 30);
        patterned(&at("base"), 32, 32, number)?;
        std::fs::copy(at("base"), at("there"))?;
        patterned(&at("another"), 32, 1, number + 1)?;
        let words = format!(
            "do=hello do=pattern-write:mib=4,seed={number}1,bs=65536,depth=8 do=discard:mib=2,offset_mib=6 do=flush \
             do=pattern-write:mib=3,offset_mib=8,seed={number}2,bs=512,depth=32 do=flush do=dirty:mib=8,ms=200,seed=3 \
             do=pattern-verify:mib=4,seed={number}1 do=pattern-verify:mib=2,offset_mib=4,seed={number} \
             do=read-check-zero:mib=2,offset_mib=6 do=pattern-verify:mib=3,offset_mib=8,seed={number}2 \
             do=pattern-verify:offset_mib=11,seed={number}"
        );
        let overlay = merged(
            drive("d", &at("base"), 16 << 10),
            &json!({ "path_on_host": null, "overlay": { "base": at("base"), "path": at("over"), "keep": true } }),
        );
        let source = running(context, &words, overlay)?;
        let asked = |base: &str| -> Value {
            let drive = json!({ "drive_id": "d", "overlay_path": at("to"), "overlay_base": at(base) });
            json!({ "overrides": { "drives": [drive] } })
        };
        thread::sleep(Duration::from_micros(seed.below(300_000)));
        let send = json!({ "copy_disks": ["d"] });
        let (receiver, call, to) = hosts.receiver_of(context, &asked("another"))?;
        let answer = source.request("PUT", "/migration/send", Some(&merged(hosts.send(&to), &send)))?;
        ensure!(
            answer.status == 400 && answer.fault().contains("is another image or was changed since"),
            "{}",
            answer.body
        );
        drop((receiver, call.join()));
        ensure!(!at("to").exists(), "a copy was left");
        let (target, call, to) = hosts.receiver_of(context, &asked("there"))?;
        source.must("PUT", "/migration/send", Some(&merged(hosts.send(&to), &send)))?;
        call.join().map_err(|_| "a thread has panicked")??;
        let said = source.wait(SOON)?;
        said.expect(0)?;
        has_ended_well(&target.wait(SOON)?, said.console, &words)?;
        ensure!(space(&at("to"))? < 10 * MIB, "it has what its base has");
        ensure!(
            phase(&at("over"))? == Some(Phase::Moved),
            "it does not say that it is left behind"
        );
    }
    Ok(())
}
