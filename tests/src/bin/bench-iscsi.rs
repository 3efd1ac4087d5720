//! How fast a disk on an iSCSI target is and what it costs the host, beside QEMU's own initiator on the same URL.
//!
//! The target is tgtd on loopback, its file in the page cache; it has most of the time, so what counts is the CPU time of the
//! client alone. Each figure is the median of alternating runs; the results are printed as tables and written as JSON to
//! `target/bench/iscsi.json`.
//!
//! `RUNS=`, `MS=`, `WORK=` and `ONLY=` are those of bench-disk; `IDLE=` is for how many seconds an idle disk is watched.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use coracle_tests::bench::idle::{self, IDLERS, Idler};
use coracle_tests::bench::image::{Image, MIB, Pieces};
use coracle_tests::bench::iscsi::{Row, Unit, rows};
use coracle_tests::bench::measurement::{Figure, Results};
use coracle_tests::bench::table::{self, Field};
use coracle_tests::bench::tally::Tally;
use coracle_tests::bench::target::Target;
use coracle_tests::environment::Environment;
use coracle_tests::harness::iscsi::target::{self, Lun, Plan};
use coracle_tests::{Outcome, bench, ensure};
use serde_json::{Value, json};

fn main() {
    if let Err(error) = run() {
        // The process ends with a failure, so that `make bench-iscsi` does.
        println!("bench-iscsi: {}", error.message().unwrap_or("failed"));
        std::process::exit(1);
    }
}

/// The benchmark so far.
struct Bench {
    environment: Environment,
    target: target::Target,
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
const THREADS: u32 = 4;

fn run() -> Outcome {
    let environment = Environment::read();
    environment.check()?;
    let work = bench::words("WORK");
    let wants = |name: &str| work.iter().all(|word| name.contains(word));
    let image = Image::new(&PathBuf::from("/dev/shm"), Pieces::Mebibytes)?;
    let unit = || Lun::of(image.path());
    let plan = Plan::default()
        .threads(THREADS)
        .lun(unit()?)
        .lun(unit()?.without_write_cache())
        .lun(unit()?);
    let mut bench = Bench {
        environment,
        target: target::Target::start(plan)?,
        runs: bench::count("RUNS", 5)?,
        milliseconds: bench::count("MS", 1500)?,
        only: bench::words("ONLY"),
        rows: vec![],
        tally: Tally::default(),
    };
    println!(
        "an image of {MIB} MiB on {}",
        bench.target.url(Unit::Cached.lun())
    );
    for row in rows().iter().filter(|row| wants(&row.name)) {
        bench.row(row)?;
    }
    if wants(IDLE) {
        bench.idle(Duration::from_secs(bench::count("IDLE", 30)?))?;
    }
    bench.finish()
}

impl Bench {
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
        let url = self.target.url(row.unit.lun());
        for _ in 0..self.runs {
            field.retain_mut(|(client, results)| {
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
                let url = idler.unit().map(|unit| self.target.url(unit.lun()));
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
        bench::keep("iscsi", &report)
    }

    fn finish(self) -> Outcome {
        ensure!(!self.rows.is_empty(), "no row and client match WORK and ONLY");
        self.tally.finish()
    }
}
