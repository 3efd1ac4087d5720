//! How fast a disk on an iSCSI target is and what it costs the host, beside QEMU's own initiator on the same URL.
//!
//! The target is tgtd on loopback, its file in the page cache; it has most of the time, so what counts is the CPU time of the
//! client alone. Each figure is the median of alternating runs; the results are printed as tables and written as JSON to
//! `target/bench/iscsi.json`.
//!
//! `RUNS=`, `MS=`, `WORK=` and `ONLY=` are those of bench-disk; `IDLE=` is for how many seconds an idle disk is watched.

use std::path::PathBuf;
use std::time::Duration;

use coracle_tests::bench::contender::{CORACLE_ASYNC, Contender, QEMU};
use coracle_tests::bench::image::{Image, MIB, Pieces};
use coracle_tests::bench::iscsi::{Row, Unit, rows};
use coracle_tests::bench::measurement::{Results, idle_cost};
use coracle_tests::bench::tally::Tally;
use coracle_tests::bench::{program, table};
use coracle_tests::environment::Environment;
use coracle_tests::harness::iscsi::target::{Lun, Plan, Target};
use coracle_tests::{Outcome, bench, ensure};
use serde_json::{Map, Value, json};

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
    target: Target,
    runs: u64,
    milliseconds: u64,
    only: Vec<String>,
    rows: Vec<Value>,
    idle: Value,
    tally: Tally,
}

/// The row of the idle disk.
const IDLE: &str = "idle";
/// A session that nobody uses asks once in five seconds whether the target is there, and is answered.
const SECONDS_PER_EXCHANGE: u64 = 5;
/// What such an exchange may cost: a timer wakes the thread, and then it does what a lone read of 4 KiB costs, which is half
/// of this.
const EXCHANGE_US_MAX: f64 = 100.0;
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
        .lun(unit()?.without_write_cache());
    let mut bench = Bench {
        environment,
        target: Target::start(plan)?,
        runs: bench::count("RUNS", 5)?,
        milliseconds: bench::count("MS", 1500)?,
        only: bench::words("ONLY"),
        rows: vec![],
        idle: Value::Null,
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
        bench.idle(bench::count("IDLE", 30)?)?;
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
        table::print(&field);
        self.tally.judge(&row.name, &row.targets, &field);
        self.rows.push(json!({
            "row": row.name, "contenders": table::report(&field), "targets": table::judged(&row.targets, &field),
        }));
        self.keep()
    }

    /// What a disk costs that nobody uses.
    fn idle(&mut self, seconds: u64) -> Outcome {
        println!("\n{IDLE}: CPU time in {seconds} s");
        let url = self.target.url(Unit::Cached.lun());
        let guest = |contender: Contender| {
            let time = Duration::from_secs(seconds);
            idle_cost(&contender, &self.environment, url.as_ref(), time)
        };
        let clients: [(&str, &dyn Fn() -> Outcome<Duration>); 3] = [
            ("storage", &|| program::idle(&url, seconds * 1000)),
            (CORACLE_ASYNC.name, &|| guest(CORACLE_ASYNC)),
            (QEMU.name, &|| guest(QEMU)),
        ];
        let exchanges = u32::try_from(seconds.div_ceil(SECONDS_PER_EXCHANGE))?;
        let allowed_us = EXCHANGE_US_MAX * f64::from(exchanges);
        let admitted: Vec<_> = clients
            .into_iter()
            .filter(|(name, _)| self.admits(name))
            .collect();
        let mut costs = Map::new();
        for (name, measure) in admitted {
            let us = match measure() {
                Ok(cost) => cost.as_secs_f64() * 1e6,
                Err(failure) => {
                    self.tally.fail(IDLE, name, &failure);
                    continue;
                }
            };
            println!("  {name:<24}{us:>12.0} us");
            costs.insert(name.to_owned(), json!(us.round()));
            if name != QEMU.name {
                let target = format!("{name} idle: <= {allowed_us:.0} us, {exchanges} exchanges");
                self.tally.judge_us(&target, us, allowed_us);
            }
        }
        self.idle = json!({ "seconds": seconds, "allowed_us": allowed_us, "cpu_us": costs });
        self.keep()
    }

    /// After each row: whoever breaks a long run off has what there is.
    fn keep(&self) -> Outcome {
        let report = json!({
            "runs": self.runs, "milliseconds": self.milliseconds, "image_mib": MIB,
            "rows": self.rows, "idle": self.idle, "failures": self.tally.failures(),
        });
        bench::keep("iscsi", &report)
    }

    fn finish(self) -> Outcome {
        let is_empty = self.rows.is_empty() && self.idle.is_null();
        ensure!(!is_empty, "no row and client match WORK and ONLY");
        self.tally.finish()
    }
}
