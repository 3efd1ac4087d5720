//! How fast a machine starts and how little its monitor weighs, beside Firecracker (`FIRECRACKER=`) and QEMU.
//!
//! Each figure is the median of alternating runs in one go; the results are printed as a table and
//! written as JSON to `target/bench/start.json`.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use coracle_tests::bench::series::Series;
use coracle_tests::bench::{self, qemu};
use coracle_tests::guest::unikernel_words;
use coracle_tests::{Outcome, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

/// Runs of each figure on each program.
const RUNS: usize = 21;
/// Guest memory in the runs that look at the monitor's own.
const MEMORY_MIB: u64 = 128;
/// Nothing measured here takes longer on a machine that works.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() {
    if let Err(error) = run() {
        // The process ends with a failure, so that `make bench` does.
        println!("bench-start: {}", error.message().unwrap_or("failed"));
        std::process::exit(1);
    }
}

fn run() -> Outcome {
    let guest = variable("CORACLE_UNIKERNEL")?;
    let mut programs = vec![Program {
        name: "coracle",
        path: variable("CORACLE_BIN")?,
    }];
    match std::env::var_os("FIRECRACKER") {
        Some(path) => programs.push(Program {
            name: "firecracker",
            path: path.into(),
        }),
        None => println!("FIRECRACKER is not set: without it there is no peer for the API's figures."),
    }
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

fn variable(name: &str) -> Outcome<PathBuf> {
    Ok(std::env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{name} is not set: use `make bench-start`"))?)
}

/// A monitor with Firecracker's command line and API.
struct Program {
    name: &'static str,
    path: PathBuf,
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
        monitor.configure(guest, "do=hello do=spin:seconds=forever")?;
        let begun = Instant::now();
        monitor.send("PUT", "/actions", &json!({ "action_type": "InstanceStart" }))?;
        monitor.wait_for_first_byte()?;
        self.start_to_first_byte_ms.push(ms(begun.elapsed()));
        std::thread::sleep(Duration::from_millis(50));
        self.resident_kib.push(monitor.resident_kib_beyond_guest()?);
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

/// A running monitor; killed and reaped when dropped.
struct Monitor {
    child: Child,
    directory: tempfile::TempDir,
    stream: Option<UnixStream>,
}

impl Monitor {
    fn start(program: &Program, arguments: &[&str]) -> Outcome<Self> {
        let directory = tempfile::tempdir()?;
        // A log file of its own: the first byte on standard output is then the guest's.
        std::fs::write(directory.path().join("log"), "")?;
        let child = Command::new(&program.path)
            .args(arguments)
            .args(["--log-path", "log", "--level", "Error"])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self {
            child,
            directory,
            stream: None,
        })
    }

    fn wait_for_api(&mut self) -> Outcome {
        let socket = self.directory.path().join("api.sock");
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => ensure!(begun.elapsed() < PATIENCE, "no API socket: {error}"),
            }
            std::thread::sleep(Duration::from_micros(20));
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        self.stream = Some(stream);
        self.request("GET", "/", None)
    }

    fn configure(&mut self, guest: &Path, words: &str) -> Outcome {
        let boot = json!({ "kernel_image_path": guest, "boot_args": unikernel_words(words) });
        self.request("PUT", "/boot-source", Some(&boot))?;
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB });
        self.request("PUT", "/machine-config", Some(&machine))
    }

    fn send(&mut self, method: &str, path: &str, body: &Value) -> Outcome {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let stream = self.stream.as_mut().ok_or("the API was waited for")?;
        Ok(stream.write_all(format!("{head}{body}").as_bytes())?)
    }

    fn request(&mut self, method: &str, path: &str, body: Option<&Value>) -> Outcome {
        self.send(method, path, body.unwrap_or(&Value::Null))?;
        let stream = self.stream.as_mut().ok_or("the API was waited for")?;
        let mut answer = vec![0; 4096];
        let len = stream.read(&mut answer)?;
        let answer = String::from_utf8_lossy(answer.get(..len).unwrap_or_default()).into_owned();
        ensure!(answer.starts_with("HTTP/1.1 20"), "{method} {path}: {answer}");
        Ok(())
    }

    fn wait_for_first_byte(&mut self) -> Outcome {
        let output = self
            .child
            .stdout
            .as_mut()
            .ok_or("standard output was asked for")?;
        let mut watched = [PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN)];
        let limit = rustix::time::Timespec {
            tv_sec: PATIENCE.as_secs().cast_signed(),
            tv_nsec: 0,
        };
        ensure!(poll(&mut watched, Some(&limit))? == 1, "the guest stays silent");
        let mut byte = [0];
        ensure!(
            output.read(&mut byte)? == 1,
            "the monitor ended before the guest said anything"
        );
        Ok(())
    }

    /// Time on a processor of all threads so far, in nanoseconds from the scheduler.
    fn cpu_time(&self) -> Outcome<Duration> {
        let mut total_ns = 0;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
            total_ns += text
                .split_whitespace()
                .next()
                .ok_or("schedstat has fields")?
                .parse::<u64>()?;
        }
        Ok(Duration::from_nanos(total_ns))
    }

    /// Resident memory of all mappings but the guest's.
    fn resident_kib_beyond_guest(&self) -> Outcome<f64> {
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        let mut size_kib = 0;
        let mut sum_kib = 0;
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            match (
                words.next(),
                words.next().and_then(|word| word.parse::<u32>().ok()),
            ) {
                (Some("Size:"), Some(kib)) => size_kib = kib,
                (Some("Rss:"), Some(kib)) if u64::from(size_kib) < MEMORY_MIB << 10 => sum_kib += kib,
                _ => {}
            }
        }
        Ok(f64::from(sum_kib))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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
    let mut monitor = Monitor {
        child,
        directory: tempfile::tempdir()?,
        stream: None,
    };
    monitor.wait_for_first_byte()?;
    Ok(ms(begun.elapsed()))
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
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
