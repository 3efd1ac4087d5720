//! How fast a machine starts and how little its monitor weighs, beside Firecracker (`FIRECRACKER=`) and QEMU.
//!
//! Each figure is the median of alternating runs in one go; the results are printed as a table and
//! written as JSON to `target/bench/start.json`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use coracle_tests::Outcome;
use coracle_tests::bench::api::{Monitor, Program, ms, programs, variable};
use coracle_tests::bench::series::Series;
use coracle_tests::bench::{self, qemu};
use coracle_tests::guest::unikernel_words;
use serde_json::{Value, json};

/// Runs of each figure on each program.
const RUNS: usize = 21;
/// Guest memory in the runs that look at the monitor's own.
const MEMORY_MIB: u64 = 128;

fn main() {
    if let Err(error) = run() {
        // The process ends with a failure, so that `make bench` does.
        println!("bench-start: {}", error.message().unwrap_or("failed"));
        std::process::exit(1);
    }
}

fn run() -> Outcome {
    let guest = variable("CORACLE_UNIKERNEL")?;
    let programs = programs()?;
    let mut figures: Vec<Figure> = programs.iter().map(|_| Figure::default()).collect();
    let mut qemu = Series::default();
    for round in 0..RUNS {
        println!("round {} of {RUNS}", round + 1);
        for (program, figure) in programs.iter().zip(&mut figures) {
            figure.measure(program, &guest)?;
        }
        qemu.push(qemu_first_byte(&guest)?);
    }
    let mut report = serde_json::Map::from_iter([
        ("runs".to_owned(), json!(RUNS)),
        ("memory_mib".to_owned(), json!(MEMORY_MIB)),
        (
            "qemu-microvm".to_owned(),
            json!({ "exec_to_first_byte_ms": qemu.median() }),
        ),
    ]);
    for (program, figure) in programs.iter().zip(&figures) {
        report.insert(program.name.to_owned(), figure.report(program)?);
    }
    let report = Value::Object(report);
    print_table(&report);
    bench::keep("start", &report)
}

/// What is measured of one program, one entry a run.
#[derive(Default)]
struct Figure {
    api_wall_ms: Series,
    api_cpu_ms: Series,
    start_to_first_byte_ms: Series,
    exec_to_first_byte_ms: Series,
    resident_kib: Series,
}

impl Figure {
    fn measure(&mut self, program: &Program, guest: &Path) -> Outcome {
        let begun = Instant::now();
        let mut monitor = Monitor::start(program, &["--api-sock", "api.sock"])?;
        monitor.wait_for_api()?;
        self.api_wall_ms.push(ms(begun.elapsed()));
        self.api_cpu_ms.push(ms(monitor.cpu_time()?));
        monitor.configure(guest, "do=hello do=spin:seconds=forever", MEMORY_MIB)?;
        let begun = Instant::now();
        monitor.send("PUT", "/actions", &json!({ "action_type": "InstanceStart" }))?;
        monitor.wait_for_first_byte()?;
        self.start_to_first_byte_ms.push(ms(begun.elapsed()));
        std::thread::sleep(Duration::from_millis(50));
        self.resident_kib.push(monitor.resident_kib_beyond(MEMORY_MIB)?);
        drop(monitor);

        let begun = Instant::now();
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("config.json");
        std::fs::write(&config, config_of(guest).to_string())?;
        let config = config.display().to_string();
        let mut monitor = Monitor::start(program, &["--no-api", "--config-file", &config])?;
        monitor.wait_for_first_byte()?;
        self.exec_to_first_byte_ms.push(ms(begun.elapsed()));
        Ok(())
    }

    fn report(&self, program: &Program) -> Outcome<Value> {
        Ok(json!({
            "exec_to_api_wall_ms": self.api_wall_ms.median(),
            "exec_to_api_cpu_ms": self.api_cpu_ms.median(),
            "instance_start_to_first_byte_ms": self.start_to_first_byte_ms.median(),
            "exec_to_first_byte_ms": self.exec_to_first_byte_ms.median(),
            "resident_beyond_guest_kib": self.resident_kib.median(),
            "binary_kib": std::fs::metadata(&program.path)?.len() >> 10,
        }))
    }
}

/// The machine of the runs without an API.
fn config_of(guest: &Path) -> Value {
    json!({
        "boot-source": { "kernel_image_path": guest, "boot_args": unikernel_words("do=hello do=spin:seconds=forever") },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
        "drives": [],
    })
}

fn qemu_first_byte(guest: &Path) -> Outcome<f64> {
    let begun = Instant::now();
    let words = unikernel_words("do=hello do=spin:seconds=forever");
    let child = Command::new(qemu::PROGRAM)
        .args(qemu::microvm(MEMORY_MIB, guest, &words))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut monitor = Monitor::of(child)?;
    monitor.wait_for_first_byte()?;
    Ok(ms(begun.elapsed()))
}

fn print_table(report: &Value) {
    println!(
        "{:<36}{:>14}{:>14}{:>14}",
        "", "coracle", "firecracker", "qemu-microvm"
    );
    for figure in [
        "exec_to_api_wall_ms",
        "exec_to_api_cpu_ms",
        "instance_start_to_first_byte_ms",
        "exec_to_first_byte_ms",
        "resident_beyond_guest_kib",
        "binary_kib",
    ] {
        let cell = |name: &str| {
            report
                .pointer(&format!("/{name}/{figure}"))
                .map_or("-".to_owned(), Value::to_string)
        };
        println!(
            "{figure:<36}{:>14}{:>14}{:>14}",
            cell("coracle"),
            cell("firecracker"),
            cell("qemu-microvm")
        );
    }
}
