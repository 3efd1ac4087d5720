//! How long snapshots take to make and to go on from, beside Firecracker (`FIRECRACKER=`) in the same run.
//!
//! Each figure is the median of alternating runs; the results are printed as a table and written as JSON to
//! `target/bench/snapshot.json`. `MIB=256` narrows the sizes of memory, `RUNS=5` the runs, `ROWS=clones,lazy,pauses` what is
//! measured: `peers`, beside Firecracker, or one of these.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coracle_tests::bench::api::{Monitor, Program, ms, programs, variable};
use coracle_tests::bench::series::Series;
use coracle_tests::bench::snapshot::{self, Subject};
use coracle_tests::bench::{self, count, words};
use coracle_tests::guest::unikernel_words;
use coracle_tests::{Outcome, ensure};
use serde_json::{Map, Value, json};

/// What is left of a memory for the kernel of the guest, in MiB.
const REST_MIB: u64 = 16;
/// How much is written between a full snapshot and a diff, in MiB.
const DIRTY_MIB: u64 = 64;
/// Within that the guest has written all of it once more.
const ROUND: Duration = Duration::from_secs(2);
/// Pauses of an idle guest in each run.
const PAUSES: usize = 20;

fn main() {
    if let Err(error) = run() {
        // The process ends with a failure, so that `make bench` does.
        println!("bench-snapshot: {}", error.message().unwrap_or("failed"));
        std::process::exit(1);
    }
}

fn run() -> Outcome {
    let guest = variable("CORACLE_UNIKERNEL")?;
    let runs = count("RUNS", 7)?;
    let programs = programs()?;
    let mut report = Map::new();
    let mut sizes = words("MIB");
    if sizes.is_empty() {
        sizes = ["256", "1024"].map(str::to_owned).to_vec();
    }
    if !is_asked_for("peers") {
        sizes.clear();
    }
    for mib in sizes {
        let memory_mib: u64 = mib.parse()?;
        for percent in [100, 50] {
            let name = format!("{memory_mib} MiB, {percent} % of it not zeros");
            println!("{name}");
            let mut figures: Vec<Figures> = programs.iter().map(|_| Figures::default()).collect();
            let work = Work {
                guest: &guest,
                memory_mib,
                filled_mib: (memory_mib - REST_MIB) * percent / 100,
            };
            for _ in 0..runs {
                for (program, figures) in programs.iter().zip(&mut figures) {
                    figures.measure(program, &work)?;
                }
            }
            let field: Vec<_> = programs.iter().zip(&figures).collect();
            print_table(&field);
            let results = field
                .iter()
                .map(|(program, figures)| (program.name.to_owned(), figures.report()));
            report.insert(name, Value::Object(results.collect()));
        }
    }
    measure_alone(&programs, &guest, &mut report)?;
    bench::keep("snapshot", &Value::Object(report))
}

/// Whether `ROWS` has this one; all if it is empty.
fn is_asked_for(row: &str) -> bool {
    let rows = words("ROWS");
    rows.is_empty() || rows.iter().any(|asked| asked == row)
}

/// Measures one thing, and prints it.
type Measure = fn(Subject<'_>) -> Outcome<Value>;

/// What no peer does.
fn measure_alone(programs: &[Program], guest: &Path, report: &mut Map<String, Value>) -> Outcome {
    let subject = Subject {
        program: programs.first().ok_or("ours is always there")?,
        guest,
    };
    let rows: [(&str, Measure); 3] = [
        ("clones", snapshot::clones::measure),
        ("lazy", snapshot::lazy::measure),
        ("pauses", snapshot::pauses::measure),
    ];
    for (name, measure) in rows.into_iter().filter(|(name, _)| is_asked_for(name)) {
        report.insert(name.to_owned(), measure(subject)?);
    }
    Ok(())
}

/// What a guest is and has.
struct Work<'a> {
    guest: &'a Path,
    memory_mib: u64,
    filled_mib: u64,
}

/// What is measured of one program, in milliseconds, one entry a run.
#[derive(Default)]
struct Figures {
    pause: Series,
    full: Series,
    diff: Series,
    load: Series,
    load_unchecked: Series,
}

impl Figures {
    fn measure(&mut self, program: &Program, work: &Work<'_>) -> Outcome {
        // In memory: what is measured is the monitor, not a disk.
        let directory = tempfile::Builder::new()
            .prefix("coracle-bench")
            .tempdir_in("/dev/shm")?;
        let file = |name: &str| directory.path().join(name);
        let fill = format!(
            "do=dirty:mib={},ms=1 do=hello do=dirty:mib={DIRTY_MIB},seconds=600",
            work.filled_mib
        );
        let mut monitor = started(program, work, &fill)?;
        monitor.wait_for("hello")?;
        monitor.wait_for("dirty: ready")?;
        self.full
            .push(saved(&mut monitor, "Full", &file("f.state"), &file("f.memory"))?);
        state(&mut monitor, "Resumed")?;
        std::thread::sleep(ROUND);
        let diff = file("d.memory");
        self.diff
            .push(saved(&mut monitor, "Diff", &file("d.state"), &diff)?);
        let written_mib = (std::fs::metadata(&diff)?.blocks() * 512) >> 20;
        ensure!(
            written_mib >= DIRTY_MIB,
            "the guest has written {written_mib} MiB of {DIRTY_MIB} within {ROUND:?}: the diff says nothing"
        );
        drop(monitor);

        let idle = format!(
            "do=dirty:mib={},ms=1 do=hello do=tick:ms=1,count=100000000",
            work.filled_mib
        );
        let mut monitor = started(program, work, &idle)?;
        monitor.wait_for("tick: n=1 ")?;
        for _ in 0..PAUSES {
            let begun = Instant::now();
            state(&mut monitor, "Paused")?;
            self.pause.push(ms(begun.elapsed()));
            state(&mut monitor, "Resumed")?;
        }
        let (state, memory) = (file("l.state"), file("l.memory"));
        saved(&mut monitor, "Full", &state, &memory)?;
        drop(monitor);
        let is_ours = program.name == "coracle";
        let verify = is_ours.then_some("off");
        self.load_unchecked
            .push(loaded(program, &state, &memory, verify)?);
        if is_ours {
            self.load.push(loaded(program, &state, &memory, None)?);
        }
        Ok(())
    }

    fn all(&self) -> [(&'static str, &Series); 5] {
        [
            ("pause_ms", &self.pause),
            ("full_ms", &self.full),
            ("diff_64_mib_ms", &self.diff),
            ("exec_to_first_byte_unchecked_ms", &self.load_unchecked),
            ("exec_to_first_byte_checked_ms", &self.load),
        ]
    }

    fn report(&self) -> Value {
        let figures = self
            .all()
            .into_iter()
            .map(|(name, series)| (name.to_owned(), series.report()));
        Value::Object(figures.collect())
    }
}

fn started(program: &Program, work: &Work<'_>, words: &str) -> Outcome<Monitor> {
    let mut monitor = Monitor::start(program, &["--api-sock", "api.sock"])?;
    monitor.wait_for_api()?;
    let boot = json!({ "kernel_image_path": work.guest, "boot_args": unikernel_words(words) });
    monitor.request("PUT", "/boot-source", Some(&boot))?;
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": work.memory_mib, "track_dirty_pages": true });
    monitor.request("PUT", "/machine-config", Some(&machine))?;
    monitor.request(
        "PUT",
        "/actions",
        Some(&json!({ "action_type": "InstanceStart" })),
    )?;
    Ok(monitor)
}

fn state(monitor: &mut Monitor, state: &str) -> Outcome {
    monitor.request("PATCH", "/vm", Some(&json!({ "state": state })))
}

fn saved(monitor: &mut Monitor, kind: &str, snapshot: &Path, memory: &PathBuf) -> Outcome<f64> {
    state(monitor, "Paused")?;
    let body = json!({ "snapshot_path": snapshot, "mem_file_path": memory, "snapshot_type": kind });
    let begun = Instant::now();
    monitor.request("PUT", "/snapshot/create", Some(&body))?;
    Ok(ms(begun.elapsed()))
}

/// From the start of a fresh process to the first byte that its guest says.
fn loaded(program: &Program, snapshot: &Path, memory: &Path, verify: Option<&str>) -> Outcome<f64> {
    let mut body = json!({
        "snapshot_path": snapshot,
        "mem_backend": { "backend_type": "File", "backend_path": memory },
        "resume_vm": true,
    });
    if let (Some(verify), Some(body)) = (verify, body.as_object_mut()) {
        body.insert("verify".to_owned(), verify.into());
    }
    let begun = Instant::now();
    let mut monitor = Monitor::start(program, &["--api-sock", "api.sock"])?;
    monitor.wait_for_api()?;
    monitor.send("PUT", "/snapshot/load", &body)?;
    monitor.wait_for_first_byte()?;
    Ok(ms(begun.elapsed()))
}

fn print_table(field: &[(&Program, &Figures)]) {
    let Some((_, first)) = field.first() else { return };
    let head: String = field
        .iter()
        .map(|(program, _)| format!("{:>22}", program.name))
        .collect();
    println!("  {:<34}{head}{:>10}", "", "ratio");
    for (place, (name, _)) in first.all().into_iter().enumerate() {
        let series = field
            .iter()
            .filter_map(|(_, figures)| figures.all().get(place).copied());
        let medians: Vec<_> = series
            .map(|(_, series)| (series.median(), series.spread_percent()))
            .collect();
        let cells: String = medians
            .iter()
            .map(|(median, spread)| format!("{:>22}", format!("{median:.2} ±{spread:.0}%")))
            .collect();
        let ratio = match medians.as_slice() {
            [(ours, _), (theirs, _), ..] => format!("{:.2}x", ours / theirs),
            _ => "-".to_owned(),
        };
        println!("  {name:<34}{cells}{ratio:>10}");
    }
}
