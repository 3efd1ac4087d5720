//! What it costs to start a monitor in a jail, from the jailer's start to the API, beside Firecracker's jailer with its monitor
//! (`FIRECRACKER=` and `FIRECRACKER_JAILER=`): one after the other, and many at a time on a host without and with many mounts.
//!
//! Each figure is the median of alternating runs; the results are printed and written to `target/bench/jailer.json`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use coracle_tests::bench;
use coracle_tests::bench::api::{ms, variable};
use coracle_tests::bench::series::Series;
use coracle_tests::process::Process;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

/// Runs of each figure.
const RUNS: u64 = 12;
/// Starts at a time.
const CROWD: usize = 50;
/// Mounts on the host that has many.
const MOUNTS: usize = 500;
const UID: &str = "12345";
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Says to this program that it is one of its own measurements; what follows is the name of the one measured.
const CROWD_WORD: &str = "--crowd";

struct Contender {
    name: &'static str,
    jailer: PathBuf,
    monitor: PathBuf,
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let done = match words.as_slice() {
        [_, word, name] if word == CROWD_WORD => crowd(name),
        _ => run(),
    };
    if let Err(error) = done {
        println!("bench-jailer: {}", error.message().unwrap_or("failed"));
        std::process::exit(1);
    }
}

fn contenders() -> Outcome<Vec<Contender>> {
    let mut contenders = vec![Contender {
        name: "coracle",
        jailer: variable("CORACLE_JAILER_BIN")?,
        monitor: variable("CORACLE_BIN")?,
    }];
    let given = |name| {
        std::env::var_os(name)
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
    };
    if let (Some(jailer), Some(monitor)) = (given("FIRECRACKER_JAILER"), given("FIRECRACKER")) {
        contenders.push(Contender {
            name: "firecracker",
            jailer,
            monitor,
        });
    }
    Ok(contenders)
}

fn run() -> Outcome {
    let contenders = contenders()?;
    let mut report = serde_json::Map::new();
    let mut figures: Vec<[Series; 4]> = contenders.iter().map(|_| Default::default()).collect();
    for round in 0..bench::count("RUNS", RUNS)? {
        println!("round {}", round + 1);
        let mut turns: Vec<_> = contenders.iter().zip(&mut figures).collect();
        // Who comes first pays for what the last crowd has left to the kernel to do; of its own crowds, the second does.
        if round % 2 == 1 {
            turns.reverse();
        }
        for (contender, [wall, cpu, bare, mounted]) in turns {
            let warm = tempfile::tempdir()?;
            Jailed::start(contender, warm.path(), "warm")?.wait_for_api()?;
            let place = tempfile::tempdir()?;
            let begun = Instant::now();
            let one = Jailed::start(contender, place.path(), "one")?;
            one.wait_for_api()?;
            wall.push(ms(begun.elapsed()));
            cpu.push(one.cpu_ms()?);
            let mut crowds = [(bare, 0), (mounted, MOUNTS)];
            if round / 2 % 2 == 1 {
                crowds.reverse();
            }
            for (series, mounts) in crowds {
                series.push(crowd_of(contender.name, mounts)?);
            }
        }
    }
    println!(
        "{:<14}{:>12}{:>12}{:>22}{:>22}",
        "", "wall ms", "CPU ms", "CPU ms, 50 at a time", "and 500 mounts"
    );
    for (contender, [wall, cpu, bare, mounted]) in contenders.iter().zip(&figures) {
        println!(
            "{:<14}{:>12.2}{:>12.2}{:>22.2}{:>22.2}",
            contender.name,
            wall.median(),
            cpu.median(),
            bare.median(),
            mounted.median()
        );
        report.insert(
            contender.name.to_owned(),
            json!({
                "start_to_api_wall_ms": wall.report(), "start_to_api_cpu_ms": cpu.report(),
                "crowd_cpu_ms": bare.report(), "crowd_with_mounts_cpu_ms": mounted.report(),
            }),
        );
    }
    bench::keep("jailer", &Value::Object(report))
}

/// Processor time of each of many starts on a host with so many mounts more: this program once more, in a mount namespace.
fn crowd_of(name: &str, mounts: usize) -> Outcome<f64> {
    let place = tempfile::tempdir()?;
    let script = "n=$1; d=$2; shift 2; mount -t tmpfs none \"$d\"; \
                  while [ $n -gt 0 ]; do mkdir \"$d/$n\"; mount -t tmpfs none \"$d/$n\"; n=$((n - 1)); done; exec \"$@\"";
    let told = Command::new("unshare")
        .args(["--mount", "sh", "-ec", script, "sh", &mounts.to_string()])
        .arg(place.path())
        .arg(std::env::current_exe()?)
        .args([CROWD_WORD, name])
        .output()?;
    let said = String::from_utf8_lossy(&told.stdout);
    ensure!(
        told.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&told.stderr)
    );
    Ok(said.trim().parse()?)
}

fn crowd(name: &str) -> Outcome {
    let contenders = contenders()?;
    let contender = contenders
        .iter()
        .find(|contender| contender.name == name)
        .ok_or("no such name")?;
    let place = tempfile::tempdir()?;
    let jailed = (0..CROWD)
        .map(|number| Jailed::start(contender, place.path(), &format!("n{number}")))
        .collect::<Outcome<Vec<_>>>()?;
    let mut sum = 0.0;
    for one in &jailed {
        one.wait_for_api()?;
    }
    for one in &jailed {
        sum += one.cpu_ms()?;
    }
    println!("{}", sum / f64::from(u32::try_from(CROWD)?));
    Ok(())
}

/// A jailer that has become a monitor. Dropping it ends it.
struct Jailed {
    child: Child,
    socket: PathBuf,
}

impl Jailed {
    fn start(contender: &Contender, base: &Path, id: &str) -> Outcome<Self> {
        let name = contender.monitor.file_name().ok_or("a program has a name")?;
        let child = Command::new(&contender.jailer)
            .args(["--id", id, "--uid", UID, "--gid", UID, "--exec-file"])
            .arg(&contender.monitor)
            .arg("--chroot-base-dir")
            .arg(base)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self {
            child,
            socket: base.join(name).join(id).join("root/run/firecracker.socket"),
        })
    }

    fn wait_for_api(&self) -> Outcome {
        let deadline = Instant::now() + READY_WITHIN;
        while std::os::unix::net::UnixStream::connect(&self.socket).is_err() {
            ensure!(Instant::now() < deadline, "no API at {}", self.socket.display());
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Of the process so far, which was the jailer before it was the monitor.
    fn cpu_ms(&self) -> Outcome<f64> {
        let threads = Process(self.child.id()).thread_times()?;
        Ok(ms(threads.iter().map(|thread| thread.total).sum()))
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
