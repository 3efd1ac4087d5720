//! How fast a guest's disk is and what it costs the host, beside Firecracker (`FIRECRACKER=`) and QEMU.
//!
//! Each figure is the median of alternating runs with the same guest, FLUSH negotiated and the image in the page
//! cache; the results are printed as tables and written as JSON to `target/bench/disk.json`.
//!
//! `RUNS=` and `MS=` say how many runs and how long each, `WORK=` names rows and `ONLY=` contenders, each by words of
//! which commas stand between: a row must contain all, a contender one. `DISK=` is a directory on the disk to measure.

use std::path::PathBuf;

use coracle_tests::bench::contender::Contender;
use coracle_tests::bench::image::{Image, MIB, Pieces};
use coracle_tests::bench::measurement::{Load, Results, measure};
use coracle_tests::bench::row::{Row, rows};
use coracle_tests::bench::table;
use coracle_tests::bench::tally::Tally;
use coracle_tests::environment::Environment;
use coracle_tests::{Outcome, bench, ensure};
use serde_json::{Value, json};

fn main() {
    if let Err(error) = run() {
        // The process ends with a failure, so that `make bench` does.
        println!("bench-disk: {}", error.message().unwrap_or("failed"));
        std::process::exit(1);
    }
}

fn run() -> Outcome {
    let environment = Environment::read();
    environment.check()?;
    let plan = Plan::read()?;
    if environment.firecracker.is_none() {
        println!("FIRECRACKER is not set: without it there is nothing to judge most figures by.");
    }
    let mut bench = Bench {
        environment,
        plan,
        rows: vec![],
        tally: Tally::default(),
    };
    let disk = std::env::var_os("DISK").map_or_else(bench::directory, |path| Ok(PathBuf::from(path)))?;
    for (place, directory) in [("tmpfs", PathBuf::from("/dev/shm")), ("disk", disk)] {
        let mut rows = rows(place);
        rows.retain(|row| bench.plan.wants(row));
        if rows.is_empty() {
            continue;
        }
        for pieces in [Pieces::Pages, Pieces::Mebibytes] {
            let rows: Vec<&Row> = rows.iter().filter(|row| row.pieces == pieces).collect();
            if rows.is_empty() {
                continue;
            }
            println!(
                "{place}: an image of {MIB} MiB in {}, written in {pieces:?}",
                directory.display()
            );
            let image = Image::new(&directory, pieces)?;
            for row in rows {
                bench.row(row, &image)?;
            }
        }
    }
    bench.finish()
}

/// What is to be measured, and how often.
struct Plan {
    runs: u64,
    milliseconds: u64,
    work: Vec<String>,
    only: Vec<String>,
}

impl Plan {
    fn read() -> Outcome<Self> {
        Ok(Self {
            runs: bench::count("RUNS", 5)?,
            milliseconds: bench::count("MS", 1500)?,
            work: bench::words("WORK"),
            only: bench::words("ONLY"),
        })
    }

    fn wants(&self, row: &Row) -> bool {
        let is_about = |contender: &Contender| self.admits(contender) && !row.is_yardstick(contender);
        self.work.iter().all(|word| row.name.contains(word)) && row.field.iter().any(is_about)
    }

    fn admits(&self, contender: &Contender) -> bool {
        self.only.is_empty() || self.only.iter().any(|word| contender.name.contains(word))
    }
}

/// The benchmark so far.
struct Bench {
    environment: Environment,
    plan: Plan,
    /// The finished rows, for the results.
    rows: Vec<Value>,
    tally: Tally,
}

impl Bench {
    /// Measures all contenders of a row, in turns. One that fails takes no part in the rest of the row.
    fn row(&mut self, row: &Row, image: &Image) -> Outcome {
        let takes_part =
            |contender: &&Contender| self.plan.admits(contender) && contender.is_there(&self.environment);
        let mut field: Vec<(&Contender, Results)> = row
            .field
            .iter()
            .filter(takes_part)
            .map(|contender| (contender, Results::new()))
            .collect();
        println!("\n{}", row.name);
        let load = Load {
            arguments: &row.load,
            milliseconds: self.plan.milliseconds,
        };
        for _ in 0..self.plan.runs {
            field.retain_mut(|(contender, results)| {
                let measured = measure(contender, &self.environment, image.path(), load, results);
                if let Err(failure) = &measured {
                    self.tally.fail(&row.name, contender.name, failure);
                }
                measured.is_ok()
            });
            image.settle()?;
        }
        table::print(&table(&field));
        self.tally.judge(&row.name, &row.targets, &table(&field));
        self.rows.push(json!({
            "row": row.name, "load": row.load, "contenders": table::report(&table(&field)),
            "targets": table::judged(&row.targets, &table(&field)),
        }));
        self.keep()
    }

    /// After each row: whoever breaks a long run off has what there is.
    fn keep(&self) -> Outcome {
        let report = json!({
            "runs": self.plan.runs, "milliseconds": self.plan.milliseconds, "image_mib": MIB,
            "rows": self.rows, "failures": self.tally.failures(),
        });
        bench::keep("disk", &report)
    }

    fn finish(self) -> Outcome {
        ensure!(!self.rows.is_empty(), "no row and contender match WORK and ONLY");
        self.tally.finish()
    }
}

/// The field as a table has it.
fn table<'a>(field: &'a [(&Contender, Results)]) -> Vec<(&'a str, &'a Results)> {
    let row = |(contender, results): &'a (&Contender, Results)| (contender.name, results);
    field.iter().map(row).collect()
}
