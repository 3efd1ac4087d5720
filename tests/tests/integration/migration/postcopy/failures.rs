//! The table of failures of a guest that goes on without its memory: each message that is said then, each thing that can happen
//! at it.

use std::thread;
use std::time::{Duration, Instant};

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::matrix::{Cell, Matrix};
use coracle_tests::monitor::{Ended, Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use coracle_vmm::migration::wire::Kind;
use rustix::process::Signal;
use serde_json::json;

use super::super::failures::{kind_of, names_with_the_last};
use super::super::middle::{Middle, Then};
use super::super::place::Place;
use super::super::{Hosts, PERIOD, SOON, merge};
use super::{Journey, WAIT_S};

/// Those that are said in such a migration alone.
pub(in super::super) const MESSAGES: [Kind; 4] = [Kind::Absent, Kind::Rejoin, Kind::Want, Kind::Whole];

/// What happens at a message.
const FAULTS: &[&str] = &[
    "the source is killed",
    "the target is killed",
    "the source is frozen",
    "the target is frozen",
    "the connection is cut",
    "nothing passes any more",
    "a bit is flipped",
    "everything is slow",
];

/// What becomes of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It goes on where it was.
    Stays,
    /// It goes on at the target, with all of its memory.
    Goes,
    /// It is lost, and boots from its disk.
    Lost,
}

pub(in super::super) fn survives_every_failure(context: &Context) -> Outcome {
    let names = names_with_the_last(&MESSAGES);
    let matrix = Matrix::new("post-copy")
        .axis("message", &names)
        .axis("fault", FAULTS)
        .axis("disk", &["a file", "NFS"]);
    let mut seed = context.seed.clone();
    let report = matrix.run(context.extent, 8, &mut seed, |cell| one_cell(context, cell))?;
    print!("{report}");
    report.expect_passed()
}

fn one_cell(context: &Context, cell: &Cell) -> Outcome {
    let (kind, fault, disk) = (kind_of(cell)?, cell.value("fault")?, cell.value("disk")?);
    let directory = tempfile::tempdir()?;
    let place = Place::new(disk, directory.path(), 4)?;
    let hosts = Hosts::new(directory.path())?;
    let source = Launch::new(&context.environment)?.start()?;
    let words = "do=hello do=pattern-write:mib=4,seed=5 do=flush do=dirty:mib=8,ms=5000,seed=3 do=pattern-verify:mib=4,seed=5";
    source.configure(
        &Machine::unikernel(&context.environment, words)
            .memory_mib(32)
            .drive(place.drive("d"))
            .config(),
    )?;
    source.start_instance()?;
    source.console.wait_for("dirty: ready", SOON)?;
    // Whoever is frozen comes back in time.
    let wait_s = u64::from(context.count(5, 15)) * WAIT_S;
    let wait = json!({ "postcopy_wait_s": wait_s });
    let (target, receiving, to) = hosts.receiver_of(context, &wait)?;
    let then = match fault {
        "the connection is cut" => Then::Cut,
        "a bit is flipped" => Then::Corrupt,
        "everything is slow" => Then::Slow,
        _ => Then::Hold,
    };
    let middle = Middle::start(&hosts.files()?, &to, kind, then)?;
    let mut body = hosts.send(&middle.address);
    merge(&mut body, &wait);
    // So slow that what the guest has written is too much to stand still for.
    merge(
        &mut body,
        &json!({
            "allow_postcopy": true, "mode": "Precopy", "timeout_s": 0, "downtime_ms": 1, "bandwidth_limit": 40_000_000,
        }),
    );
    let mut caller = source.connect()?;
    // A source that is killed gives no answer.
    let sending =
        thread::spawn(move || drop(caller.request("PUT", "/migration/send", Some(&body.to_string()))));
    middle.wait_sprung(SOON)?;
    happens(context, fault, [&source, &target])?;
    if fault != "nothing passes any more" {
        middle.let_go();
    }
    let ends = ends([source, target])?;
    let (fate, expected) = (fate(&ends)?, expected(kind, fault));
    ensure!(
        expected.contains(&fate),
        "the guest: {fate:?}, and not {expected:?}; source and target: {ends:#?}"
    );
    drop((sending.join(), receiving.join()));
    Journey::boots(context, &place)
}

fn happens(context: &Context, fault: &str, [source, target]: [&Monitor; 2]) -> Outcome {
    match fault {
        "the source is killed" => source.signal(Signal::KILL),
        "the target is killed" => target.signal(Signal::KILL),
        "the source is frozen" | "the target is frozen" => {
            let frozen = if fault == "the source is frozen" {
                source
            } else {
                target
            };
            frozen.signal(Signal::STOP)?;
            thread::sleep(Duration::from_secs(context.count(6, 30).into()));
            frozen.signal(Signal::CONT)
        }
        _ => Ok(()),
    }
}

/// Waits until both processes have come to an end, or wait for somebody who does not come.
fn ends([source, target]: [Monitor; 2]) -> Outcome<[Option<Ended>; 2]> {
    let until = Instant::now() + SOON;
    let [mut source, mut target] = [Some(source), Some(target)];
    let mut ends: [Option<Ended>; 2] = [None, None];
    while ends.iter().any(Option::is_none) {
        for (side, end) in [&mut source, &mut target].into_iter().zip(&mut ends) {
            if let Some(monitor) = side
                && !monitor.is_running()?
                && let Some(monitor) = side.take()
            {
                *end = Some(monitor.wait(SOON)?);
            }
        }
        // A target to which nothing has come waits on; what has ended by itself needs it no more.
        if let (Some(_), Some(waiting)) = (&ends[0], &target)
            && let Ok(status) = waiting.request("GET", "/migration", None)
            && let Some(instance) = waiting.request("GET", "/", None).ok().map(|answer| answer.body)
            && super::is(&status.json()?, "Idle")
            && instance.contains("Not started")
        {
            waiting.signal(Signal::KILL)?;
        }
        ensure!(
            Instant::now() < until,
            "one side does not come to an end: {ends:?}"
        );
        thread::sleep(PERIOD * 5);
    }
    Ok(ends)
}

/// What became of the guest, by what the two processes leave.
fn fate(ends: &[Option<Ended>; 2]) -> Outcome<Fate> {
    let has_worked = |ended: &Option<Ended>| {
        let shows = |word| ended.as_ref().is_some_and(|ended| ended.console.contains(word));
        shows("dirty: ok") && shows("pattern-verify: ok")
    };
    match ends.each_ref().map(has_worked) {
        [true, false] => Ok(Fate::Stays),
        [false, true] => Ok(Fate::Goes),
        [false, false] => Ok(Fate::Lost),
        [true, true] => Err("both have had the guest".into()),
    }
}

/// What may become of the guest.
fn expected(kind: Kind, fault: &str) -> &'static [Fate] {
    use Fate::{Goes, Lost, Stays};
    let is_handed_over = !matches!(kind, Kind::Absent | Kind::Loaded);
    match (fault, kind) {
        // All of the memory is there.
        ("the source is killed", Kind::Whole) => &[Goes],
        ("the source is killed" | "the target is killed", Kind::Go) => &[Lost, Stays],
        // The source calls as soon as it has let go of the guest, while the target takes the disks: what has not taken the first
        // one yet loses it to the opposing step.
        ("the target is killed", Kind::Rejoin) => &[Lost, Stays],
        ("the target is frozen", Kind::Rejoin) => &[Stays, Goes],
        ("the source is killed", _) => &[Lost],
        ("the target is killed", _) if is_handed_over => &[Lost],
        (_, Kind::Absent | Kind::Loaded | Kind::Go) => &[Stays, Goes],
        _ => &[Goes],
    }
}
