//! How long guests stand still that are moved by TLS to another process on this host, and how fast memory goes, beside QEMU.
//!
//! The results are printed and written as JSON to `target/bench/migration.json`. `RUNS=5` changes how often each is done,
//! `ROWS=idle,busy,postcopy,total,throughput,streams,compression` narrows what is measured.

use coracle_tests::Outcome;
use coracle_tests::bench::api::{Program, variable};
use coracle_tests::bench::migration::rows::Subject;
use coracle_tests::bench::{self, words};
use serde_json::{Map, Value};

fn main() {
    if let Err(error) = run() {
        // The process ends with a failure, so that `make bench` does.
        println!("bench-migration: {}", error.message().unwrap_or("failed"));
        std::process::exit(1);
    }
}

/// Measures one thing, and prints it.
type Measure = fn(Subject<'_>) -> Outcome<Value>;

const ROWS: [(&str, Measure); 7] = [
    ("idle", |subject| subject.idle()),
    ("busy", |subject| subject.busy()),
    ("postcopy", |subject| subject.postcopy()),
    ("total", |subject| subject.total()),
    ("throughput", |subject| subject.throughput()),
    ("streams", |subject| subject.streams()),
    ("compression", |subject| subject.compression()),
];

fn run() -> Outcome {
    let program = Program {
        name: "coracle",
        path: variable("CORACLE_BIN")?,
    };
    let guest = variable("CORACLE_UNIKERNEL")?;
    let subject = Subject {
        program: &program,
        guest: &guest,
    };
    let asked = words("ROWS");
    let mut report = Map::new();
    for (name, measure) in ROWS {
        if asked.is_empty() || asked.iter().any(|row| row == name) {
            report.insert(name.to_owned(), measure(subject)?);
        }
    }
    bench::keep("migration", &Value::Object(report))
}
