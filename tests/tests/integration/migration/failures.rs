//! The table of failures: each message of the protocol, each thing that can happen at it.

use std::collections::BTreeSet;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::matrix::{Cell, Matrix};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use coracle_vmm::migration::wire::Kind;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::middle::{Middle, Then};
use super::place::Place;
use super::{Hosts, SOON};
use super::{copy, postcopy};

/// What happens at a message.
pub(super) const FAULTS: &[&str] = &[
    "the source is killed",
    "the target is killed",
    "the source is frozen",
    "the target is frozen",
    "the connection is cut",
    "nothing passes any more",
    "a bit is flipped",
    "everything is slow",
    RESTART,
];
pub(super) const RESTART: &str = "the server of the disk restarts";

pub(super) fn survives_every_failure(context: &Context) -> Outcome {
    let names: Vec<&'static str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
    let matrix = Matrix::new("migration")
        .axis("message", &names)
        .axis("fault", FAULTS)
        .axis("disk", Place::KINDS)
        .impossible(&[("disk", "a file"), ("fault", RESTART)], "it has no server")
        .impossible(
            &[("message", Kind::Refused.name())],
            "nobody refuses a machine that it can take",
        );
    let matrix = postcopy::MESSAGES.iter().fold(matrix, |matrix, kind| {
        matrix.impossible(
            &[("message", kind.name())],
            "the guest has all of its memory: there is a table of its own for those that do not",
        )
    });
    let matrix = copy::MESSAGES.iter().fold(matrix, |matrix, kind| {
        matrix.impossible(
            &[("message", kind.name())],
            "no disk goes along: there is a table of its own for those that do",
        )
    });
    let mut seed = context.seed.clone();
    let report = matrix.run(context.extent, 10, &mut seed, |cell| one_cell(context, cell))?;
    print!("{report}");
    report.expect_passed()
}

/// The names of these messages, and of those that every migration ends with.
pub(super) fn names_with_the_last(messages: &[Kind]) -> Vec<&'static str> {
    let last = [Kind::Loaded, Kind::Go, Kind::Running];
    messages.iter().chain(&last).map(|kind| kind.name()).collect()
}

/// The message of a cell.
pub(super) fn kind_of(cell: &Cell) -> Outcome<Kind> {
    let name = cell.value("message")?;
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
    Ok(kind.ok_or("no such message")?)
}

fn one_cell(context: &Context, cell: &Cell) -> Outcome {
    let (kind, fault, disk) = (kind_of(cell)?, cell.value("fault")?, cell.value("disk")?);
    let directory = tempfile::tempdir()?;
    let mut place = Place::new(disk, directory.path(), 1)?;
    let mut source = Launch::new(&context.environment)?.start()?;
    source.configure(&ticking(context, &place.path()))?;
    source.start_instance()?;
    source.console.wait_for("tick: n=3 ", SOON)?;
    let hosts = Hosts::new(directory.path())?;
    let mut target = thread::scope(|scope| {
        // As much as it takes for each message of the protocol to be said.
        let compression = if kind == Kind::Packed { "Lz4" } else { "None" };
        let faulty = Faulty {
            kind,
            fault,
            receive: &json!({}),
            send: &json!({ "streams": 2, "compression": compression }),
        };
        fails_at(context, scope, &hosts, (&source, Some(&mut place)), &faulty)
    })?;
    let runs = [runs(&mut source)?, runs(&mut target)?];
    let expected = expected(kind, fault);
    ensure!(
        expected.contains(&runs),
        "source and target run: {runs:?}, and not {expected:?}"
    );
    goes_on(&source, &target, runs)?;
    for mut monitor in [source, target] {
        if monitor.is_running()? {
            monitor.signal(Signal::KILL)?;
        }
        monitor.wait(SOON)?;
    }
    place.free()?;
    boots(context, &place.path())
}

fn ticking(context: &Context, disk: &Path) -> Value {
    Machine::unikernel(&context.environment, "do=hello do=tick:ms=10,count=1000000")
        .memory_mib(32)
        .disk("d", disk)
        .config()
}

/// What happens, at which message, and what else both sides are asked.
pub(super) struct Faulty<'a> {
    pub(super) kind: Kind,
    pub(super) fault: &'a str,
    pub(super) receive: &'a Value,
    pub(super) send: &'a Value,
}

/// Sends the guest, lets the fault happen at the first message of its kind, and waits until both sides have come to an end.
pub(super) fn fails_at<'scope>(
    context: &Context,
    scope: &'scope thread::Scope<'scope, '_>,
    hosts: &Hosts,
    (source, place): (&Monitor, Option<&mut Place>),
    faulty: &Faulty<'_>,
) -> Outcome<Monitor> {
    let Faulty { kind, fault, .. } = *faulty;
    let then = match fault {
        "the connection is cut" => Then::Cut,
        "a bit is flipped" => Then::Corrupt,
        "everything is slow" => Then::Slow,
        _ => Then::Hold,
    };
    let (mut target, receiving, to) = hosts.receiver_of(context, faulty.receive)?;
    let middle = Middle::start(&hosts.files()?, &to, kind, then)?;
    let mut caller = source.connect()?;
    let mut body = hosts.send(&middle.address);
    super::merge(&mut body, faulty.send);
    let body = body.to_string();
    let sending = scope.spawn(move || {
        // A source that is killed gives no answer.
        drop(caller.request("PUT", "/migration/send", Some(&body)));
    });
    middle.wait_sprung(SOON)?;
    match fault {
        "the source is killed" => source.signal(Signal::KILL)?,
        "the target is killed" => target.signal(Signal::KILL)?,
        "the source is frozen" | "the target is frozen" => {
            let frozen = if fault == "the source is frozen" {
                source
            } else {
                &target
            };
            frozen.signal(Signal::STOP)?;
            middle.let_go();
            thread::sleep(Duration::from_secs(context.count(6, 30).into()));
            frozen.signal(Signal::CONT)?;
        }
        RESTART => place.map_or(Ok(()), Place::restart)?,
        _ => {}
    }
    if fault != "nothing passes any more" {
        middle.let_go();
    }
    let until = Instant::now() + SOON;
    while !(sending.is_finished() && (receiving.is_finished() || !target.is_running()?)) {
        if kind == Kind::Hello && sending.is_finished() {
            dismiss(&mut target)?;
        }
        ensure!(Instant::now() < until, "one side does not come to an end");
        thread::sleep(super::PERIOD);
    }
    if kind == Kind::Hello {
        // Whoever waited for its answer may have given up before it was there again.
        dismiss(&mut target)?;
    }
    Ok(target)
}

/// Has a receiver wait no more to which nothing has come: whoever fails before it is trusted was never there, and it would wait
/// for the next one.
fn dismiss(target: &mut Monitor) -> Outcome {
    if !target.is_running()? {
        return Ok(());
    }
    let status = target.must("GET", "/migration", None)?.json()?;
    let is_waiting =
        status.get("state") == Some(&json!("Receiving")) && status.get("sent_bytes") == Some(&json!(0));
    if is_waiting {
        target.must("DELETE", "/migration", None)?;
    }
    Ok(())
}

/// Whether the source, and whether the target, may have the guest in the end.
pub(super) fn expected(kind: Kind, fault: &str) -> &'static [[bool; 2]] {
    match (fault, kind) {
        // What dies with the guest takes it along.
        ("the source is killed", Kind::Go | Kind::Running) => &[[false, true], [false, false]],
        ("the source is killed", _) | ("the target is killed", Kind::Running) => &[[false, false]],
        ("the source is frozen" | "the target is frozen", _) => &[[true, false], [false, true]],
        (_, Kind::Running) => &[[false, true]],
        // It may be so slow that the guest would stand still for too long.
        ("everything is slow" | RESTART, _) => &[[false, true], [true, false]],
        _ => &[[true, false]],
    }
}

/// The guest that runs goes on, and nothing that it has shown was shown twice.
pub(super) fn goes_on(source: &Monitor, target: &Monitor, runs: [bool; 2]) -> Outcome {
    if runs.contains(&true) {
        let survivor = if runs == [true, false] { source } else { target };
        let seen = ticks(&source.console.text()).last().copied().unwrap_or_default();
        let later = |text: &str| ticks(text).last().filter(|last| **last > seen + 3).copied();
        survivor.console.wait_until("the guest goes on", SOON, later)?;
    }
    let (before, after) = (ticks(&source.console.text()), ticks(&target.console.text()));
    let both: BTreeSet<&u64> = before.intersection(&after).collect();
    ensure!(both.is_empty(), "both have shown {both:?}");
    Ok(())
}

/// Whether the guest runs in this process, once that is settled.
pub(super) fn runs(monitor: &mut Monitor) -> Outcome<bool> {
    let until = Instant::now() + SOON;
    while monitor.is_running()? {
        let state = |path| -> Outcome<String> {
            let answer = monitor.must("GET", path, None)?.json()?;
            let state = answer.get("state").and_then(Value::as_str);
            Ok(state.ok_or("it has a state")?.to_owned())
        };
        match (state("/migration"), state("/")) {
            (Ok(migration), Ok(instance)) if migration == "Idle" => return Ok(instance == "Running"),
            // It is about to end, or asks the leases.
            settling => ensure!(Instant::now() < until, "it does not settle: {settling:?}"),
        }
        thread::sleep(super::PERIOD);
    }
    Ok(false)
}

fn ticks(console: &str) -> BTreeSet<u64> {
    let lines = console.lines().filter_map(|line| line.strip_prefix("tick: n="));
    lines
        // Of a line that is still being said the number may be the beginning of a longer one.
        .filter_map(|line| line.split_once(' ')?.0.parse().ok())
        .collect()
}

/// Whoever comes next can have the disk.
fn boots(context: &Context, disk: &Path) -> Outcome {
    let config = Machine::unikernel(&context.environment, "do=hello do=exit:status=3")
        .memory_mib(32)
        .disk("d", disk)
        .config();
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&config)?;
    monitor.start_instance()?;
    monitor.wait(SOON)?.expect(3)
}
