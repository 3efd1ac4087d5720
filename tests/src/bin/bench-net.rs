//! How fast a guest talks with its host and what that costs, beside Firecracker (`FIRECRACKER=`): by TCP over a tap, and by
//! streams of the socket device. How soon memory goes back that a Linux guest has freed. And whether frames should go to a tap
//! one by one or by io_uring.
//!
//! The guest is the unikernel, with every offload that the device has; its host is a network namespace. Each figure is the median
//! of alternating runs; the results are printed as tables and written as JSON to `target/bench/net.json`.
//!
//! `RUNS=` (7), `MIB=` of a stream (1024) and `COUNT=` of questions (10000); `ONLY=` names rows by parts of their names.

use std::path::PathBuf;

use coracle_tests::Outcome;
use coracle_tests::bench::frames::{self, Direction};
use coracle_tests::bench::measurement::{Figure, Results};
use coracle_tests::bench::net::{HOST, TAP, Talk, Way, measure};
use coracle_tests::bench::table;
use coracle_tests::bench::tally::Tally;
use coracle_tests::bench::target::{Against, Target};
use coracle_tests::bench::{self, api, balloon};
use coracle_tests::environment::Environment;
use coracle_tests::harness::hosts::Star;
use serde_json::{Map, Value, json};

const FIRECRACKER: Against = Against {
    title: "Firecracker",
    names: &["firecracker"],
};
/// The ways in which the guest waits.
const WAITS: [&str; 2] = ["poll", "irq"];

fn main() {
    if let Err(error) = run() {
        // The process ends with a failure, so that `make bench-net` does.
        println!("bench-net: {}", error.message().unwrap_or("failed"));
        std::process::exit(1);
    }
}

fn run() -> Outcome {
    let environment = Environment::read();
    let mut field: Vec<(&str, PathBuf)> = vec![("coracle", api::variable("CORACLE_BIN")?)];
    if let Some(firecracker) = &environment.firecracker {
        field.push(("firecracker", firecracker.clone()));
    }
    let (mib, count) = (bench::count("MIB", 1024)?, bench::count("COUNT", 10_000)?);
    let only = bench::words("ONLY");
    let star = Star::new(0)?;
    star.server.bridge(HOST, &[TAP])?;
    let (mut tally, mut report) = (Tally::default(), Map::new());
    for way in [Way::Tcp, Way::Vsock] {
        for talk in [Talk::Send(mib), Talk::Receive(mib), Talk::Ask(count)] {
            for wait in WAITS {
                let name = format!("{}-{}-{wait}", way.name(), talk.name());
                if !only.is_empty() && !only.iter().any(|part| name.contains(part.as_str())) {
                    continue;
                }
                println!("{name}");
                let mut results: Vec<Results> = field.iter().map(|_| Results::default()).collect();
                for round in 0..bench::count("RUNS", 7)? {
                    let mut turns: Vec<_> = field.iter().zip(&mut results).collect();
                    if round % 2 == 1 {
                        turns.reverse();
                    }
                    for ((contender, program), results) in turns {
                        let once = || measure(program, &environment, (way, talk, wait), results);
                        if let Err(failure) = star.server.inside(once)? {
                            tally.fail(&name, contender, &failure);
                        }
                    }
                }
                let row: Vec<(&str, &Results)> = field
                    .iter()
                    .zip(&results)
                    .map(|((name, _), results)| (*name, results))
                    .collect();
                table::print(&row);
                let targets = targets(way, talk);
                tally.judge(&name, &targets, &row);
                report.insert(
                    name,
                    json!({ "figures": table::report(&row), "targets": table::judged(&targets, &row) }),
                );
            }
        }
    }
    if only.is_empty() || only.iter().any(|part| BALLOON.contains(part.as_str())) {
        report.insert(BALLOON.to_owned(), returns(&environment, &mut tally)?);
    }
    if only.is_empty() || only.iter().any(|part| FRAMES.contains(part.as_str())) {
        report.insert(FRAMES.to_owned(), by_io_uring(&star)?);
    }
    bench::keep("net", &Value::Object(report))?;
    tally.finish()
}

const FRAMES: &str = "frames-by-io_uring";

/// What a frame costs by either way: no target, but what the way is chosen by.
fn by_io_uring(star: &Star) -> Outcome<Value> {
    println!("{FRAMES}");
    let mut costs = Vec::new();
    for direction in [Direction::Send, Direction::Receive] {
        for bytes in [64, 1514] {
            let rounds = 50 * bench::count("RUNS", 7)?;
            let cost = frames::measure(&star.server, direction, bytes, rounds)?;
            println!(
                "  {direction:?} {bytes} bytes: {:.0} ns one by one, {:.0} ns by io_uring, {:.2}x",
                cost.one_by_one_ns,
                cost.batched_ns,
                cost.batched_ns / cost.one_by_one_ns
            );
            costs.push(json!({
                "direction": format!("{direction:?}"), "bytes": bytes,
                "one_by_one_ns": cost.one_by_one_ns, "batched_ns": cost.batched_ns
            }));
        }
    }
    Ok(Value::Array(costs))
}

const BALLOON: &str = "balloon-reporting";
/// The part of what was freed that is to be back in time.
const BACK_MIN: f64 = 0.9;

/// The median of some guests.
fn returns(environment: &Environment, tally: &mut Tally) -> Outcome<Value> {
    println!("{BALLOON}");
    let mut shares = Vec::new();
    let mut times = Vec::new();
    for _ in 0..bench::count("RUNS", 3)?.min(3) {
        let returned = balloon::measure(environment)?;
        shares.push(returned.share);
        times.extend(returned.nine_tenths_after.map(|time| time.as_secs_f64()));
    }
    shares.sort_by(f64::total_cmp);
    times.sort_by(f64::total_cmp);
    let median = |values: &[f64]| values.get(values.len() / 2).copied();
    let share = median(&shares).unwrap_or(0.0);
    let text = format!(
        "{:.0} % of what was freed is back within {} s ({:.0} % wanted)",
        share * 100.0,
        balloon::WITHIN.as_secs(),
        BACK_MIN * 100.0
    );
    tally.note(BALLOON, &text, share >= BACK_MIN);
    Ok(json!({ "share": shares, "seconds_to_nine_tenths": times }))
}

fn targets(way: Way, talk: Talk) -> Vec<Target> {
    let target = |figure, multiple| Target {
        of: "coracle",
        figure,
        against: FIRECRACKER,
        multiple,
    };
    match (way, talk) {
        (Way::Tcp, Talk::Send(_) | Talk::Receive(_)) => {
            vec![
                target(Figure::Bandwidth, 1.0),
                target(Figure::HostCpuOfGigabyte, 0.9),
            ]
        }
        (Way::Vsock, Talk::Send(_) | Talk::Receive(_)) => vec![target(Figure::Bandwidth, 1.0)],
        (_, Talk::Ask(_)) => vec![target(Figure::LatencyMedian, 1.0)],
    }
}
