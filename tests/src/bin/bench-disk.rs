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
use coracle_tests::bench::measurement::{FIGURES, Load, Results, measure};
use coracle_tests::bench::row::{Row, rows};
use coracle_tests::environment::Environment;
use coracle_tests::{Outcome, bench, ensure};
use serde_json::{Map, Value, json};

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
        targets_met: 0,
        targets_missed: vec![],
        failures: vec![],
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
        let words = |name: &str| {
            let text = std::env::var(name).unwrap_or_default();
            let words = text.split(',').filter(|word| !word.is_empty());
            words.map(str::to_owned).collect()
        };
        Ok(Self {
            runs: count("RUNS", 5)?,
            milliseconds: count("MS", 1500)?,
            work: words("WORK"),
            only: words("ONLY"),
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

/// A positive number in the environment; empty is as good as absent, as a makefile hands it on.
fn count(name: &str, default: u64) -> Outcome<u64> {
    let text = std::env::var(name).unwrap_or_default();
    if text.is_empty() {
        return Ok(default);
    }
    let count = text.parse().unwrap_or(0);
    ensure!(count > 0, "{name} is `{text}`, not a positive number");
    Ok(count)
}

/// The benchmark so far.
struct Bench {
    environment: Environment,
    plan: Plan,
    /// The finished rows, for the results.
    rows: Vec<Value>,
    targets_met: usize,
    /// What was not reached, in words.
    targets_missed: Vec<String>,
    /// Who could not be measured, and why.
    failures: Vec<String>,
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
                let measured = measure(contender, &self.environment, image, load, results);
                if let Err(failure) = &measured {
                    let reason = failure.message().unwrap_or("failed").trim();
                    self.failures
                        .push(format!("{}: {}: {reason}", row.name, contender.name));
                }
                measured.is_ok()
            });
            image.settle()?;
        }
        print_row(&field);
        self.judge(row, &field);
        self.rows.push(report_row(row, &field));
        self.keep()
    }

    fn judge(&mut self, row: &Row, field: &[(&Contender, Results)]) {
        for target in &row.targets {
            let text = target.text();
            let Some(verdict) = target.judge(named(field)) else {
                println!("  {text}: not measured");
                continue;
            };
            if verdict.is_met {
                println!("  {text}: {:.2}x, met", verdict.reached);
                self.targets_met += 1;
            } else {
                println!("  {text}: {:.2}x, NOT MET", verdict.reached);
                self.targets_missed
                    .push(format!("{}: {text}: {:.2}x", row.name, verdict.reached));
            }
        }
    }

    /// After each row: whoever breaks a long run off has what there is.
    fn keep(&self) -> Outcome {
        let report = json!({
            "runs": self.plan.runs, "milliseconds": self.plan.milliseconds, "image_mib": MIB,
            "rows": self.rows, "failures": self.failures,
        });
        bench::keep("disk", &report)
    }

    fn finish(self) -> Outcome {
        ensure!(!self.rows.is_empty(), "no row and contender match WORK and ONLY");
        println!(
            "\ntargets: {} met, {} not met",
            self.targets_met,
            self.targets_missed.len()
        );
        for missed in &self.targets_missed {
            println!("  {missed}");
        }
        ensure!(
            self.failures.is_empty(),
            "could not measure\n{}",
            self.failures.join("\n")
        );
        Ok(())
    }
}

fn report_row(row: &Row, field: &[(&Contender, Results)]) -> Value {
    let contenders: Map<String, Value> = field
        .iter()
        .map(|(contender, results)| {
            let figures = results
                .iter()
                .map(|(figure, series)| (figure.key().to_owned(), series.report()));
            (contender.name.to_owned(), Value::Object(figures.collect()))
        })
        .collect();
    let targets: Vec<Value> = row
        .targets
        .iter()
        .map(|target| target.report(target.judge(named(field))))
        .collect();
    json!({ "row": row.name, "load": row.load, "contenders": contenders, "targets": targets })
}

fn named<'a>(field: &'a [(&Contender, Results)]) -> impl Iterator<Item = (&'a str, &'a Results)> + Clone {
    field.iter().map(|(contender, results)| (contender.name, results))
}

/// Medians with their noise.
fn print_row(field: &[(&Contender, Results)]) {
    let head: String = FIGURES
        .iter()
        .map(|figure| format!("{:>16}", figure.title()))
        .collect();
    println!("  {:<24}{head}", "");
    for (contender, results) in field {
        let cells: String = results
            .iter()
            .map(|(figure, series)| {
                let median = format!("{:.*}", figure.decimals(), series.median());
                format!("{:>16}", format!("{median} ±{:.0}%", series.spread_percent()))
            })
            .collect();
        println!("  {:<24}{cells}", contender.name);
    }
}
