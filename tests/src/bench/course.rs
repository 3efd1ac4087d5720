//! One run of the benchmark of a network: each client in turns on the same file of one server, row after row, and idle.

use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::contender::CORACLE_ASYNC;
use super::idle::{self, IDLERS, Idler};
use super::image::MIB;
use super::measurement::{Figure, Results};
use super::remote::{Client, Protocol, Row, Unit, rows};
use super::table::{self, Field};
use super::tally::Tally;
use super::target::Target;
use super::{count, words};
use crate::environment::Environment;
use crate::{Outcome, ensure};

/// A server, as its clients see it.
pub struct Place<'a> {
    /// By which protocol.
    pub protocol: Protocol,
    /// The URL by which a client uses a disk.
    pub url: &'a (dyn Fn(Client, Unit) -> String + Sync),
}

/// The benchmark so far.
struct Course<'a> {
    environment: Environment,
    place: &'a Place<'a>,
    runs: u64,
    milliseconds: u64,
    only: Vec<String>,
    rows: Vec<Value>,
    tally: Tally,
}

/// The row of the idle disk.
const IDLE: &str = "idle";
/// How often it is watched: most of its time it does nothing, and once says little of the rest.
const IDLE_RUNS: u64 = 3;

/// Runs what `WORK=` and `ONLY=` leave of it, as often and for so long as `RUNS=`, `MS=` and `IDLE=` say, and keeps the results.
///
/// # Errors
///
/// When nothing is left of it, a client cannot be measured, or a target is missed.
pub fn run(place: &Place<'_>) -> Outcome {
    let environment = Environment::read();
    environment.check()?;
    let work = words("WORK");
    let wants = |name: &str| work.iter().all(|word| name.contains(word));
    let mut course = Course {
        environment,
        place,
        runs: count("RUNS", 5)?,
        milliseconds: count("MS", 1500)?,
        only: words("ONLY"),
        rows: vec![],
        tally: Tally::default(),
    };
    let own = Client::Guest(CORACLE_ASYNC);
    println!("an image of {MIB} MiB on {}", (place.url)(own, Unit::Cached));
    for row in rows(place.protocol).iter().filter(|row| wants(&row.name)) {
        course.row(row)?;
    }
    if wants(IDLE) {
        course.idle(Duration::from_secs(count("IDLE", 30)?))?;
    }
    course.finish()
}

impl Course<'_> {
    fn admits(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|word| name.contains(word))
    }

    /// Measures all clients of a row, in turns. One that fails takes no part in the rest of the row.
    fn row(&mut self, row: &Row) -> Outcome {
        let admitted = row.field.iter().filter(|client| self.admits(client.name()));
        let mut field: Vec<_> = admitted.map(|client| (*client, Results::new())).collect();
        if field.is_empty() {
            return Ok(());
        }
        println!("\n{}", row.name);
        for _ in 0..self.runs {
            field.retain_mut(|(client, results)| {
                let url = (self.place.url)(*client, row.unit);
                let measured = client.measure(&self.environment, &url, row, self.milliseconds, results);
                if let Err(failure) = &measured {
                    self.tally.fail(&row.name, client.name(), failure);
                }
                measured.is_ok()
            });
        }
        let field: Vec<_> = field
            .iter()
            .map(|(client, results)| (client.name(), results))
            .collect();
        self.judge(&row.name, &row.targets, &field)
    }

    /// Watches disks that nobody uses, all of them at the same time.
    fn idle(&mut self, time: Duration) -> Outcome {
        let exchanges = idle::exchanges(time);
        ensure!(exchanges > 0, "in IDLE={} nothing happens", time.as_secs());
        let is_there = |idler: &Idler| *idler == Idler::Control || self.admits(idler.name());
        let admitted = IDLERS.into_iter().filter(is_there);
        let mut field: Vec<_> = admitted.map(|idler| (idler, Results::new())).collect();
        if matches!(field.as_slice(), [(Idler::Control, _)]) {
            return Ok(());
        }
        println!(
            "\n{IDLE}: {exchanges} requests for a sign of life in {} s",
            time.as_secs()
        );
        for _ in 0..IDLE_RUNS {
            let mut costs = self.idle_together(&field, time).into_iter();
            field.retain_mut(|(idler, results)| match costs.next() {
                Some(Ok(cost)) => {
                    let us = cost.as_secs_f64() * 1e6 / f64::from(exchanges);
                    results.entry(Figure::HostCpu).or_default().push(us);
                    true
                }
                Some(Err(failure)) => {
                    self.tally.fail(IDLE, idler.name(), &failure);
                    false
                }
                None => unreachable!("everybody was watched"),
            });
        }
        let field: Vec<_> = field
            .iter()
            .map(|(idler, results)| (idler.name(), results))
            .collect();
        self.judge(IDLE, &idle::targets(), &field)
    }

    fn idle_together(&self, field: &[(Idler, Results)], time: Duration) -> Vec<Outcome<Duration>> {
        thread::scope(|scope| {
            let watch = |idler: Idler| {
                let url = idler.disk().map(|(client, unit)| (self.place.url)(client, unit));
                let url = url.unwrap_or_default();
                scope.spawn(move || idler.cost(&self.environment, &url, time))
            };
            let watched: Vec<_> = field.iter().map(|(idler, _)| watch(*idler)).collect();
            let costs = watched.into_iter().map(|thread| thread.join());
            costs.map(|cost| cost.expect("a watch does not panic")).collect()
        })
    }

    /// Prints, judges and keeps what a row came to.
    fn judge(&mut self, name: &str, targets: &[Target], field: &Field<'_>) -> Outcome {
        table::print(field);
        self.tally.judge(name, targets, field);
        self.rows.push(json!({
            "row": name, "contenders": table::report(field), "targets": table::judged(targets, field),
        }));
        self.keep()
    }

    /// After each row: whoever breaks a long run off has what there is.
    fn keep(&self) -> Outcome {
        let report = json!({
            "runs": self.runs, "milliseconds": self.milliseconds, "image_mib": MIB,
            "rows": self.rows, "failures": self.tally.failures(),
        });
        super::keep(self.place.protocol.name, &report)
    }

    fn finish(self) -> Outcome {
        ensure!(!self.rows.is_empty(), "no row and client match WORK and ONLY");
        self.tally.finish()
    }
}
