//! What each of many clones costs: memory beyond what its guest has written, and time on a processor to come up.
#![expect(
    unsafe_code,
    reason = "a clock of another process is only had from the C library"
)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{Subject, row, save};
use crate::bench::api::ms;
use crate::bench::count;
use crate::bench::series::Series;
use crate::{Outcome, ensure};

const MEMORY_MIB: u64 = 256;
/// What the guest has written before it was saved, in MiB.
const FILLED_MIB: u64 = 128;
/// What was asked for.
const RESIDENT_MIB_MAX: f64 = 3.0;
const CPU_MS_MAX: f64 = 5.0;
/// How long clones are left alone before their memory is looked at.
const SETTLED: Duration = Duration::from_secs(1);

/// Makes `CLONES` (50) clones of one guest that idles, and measures each.
///
/// # Errors
///
/// When one does not come up.
pub fn measure(subject: Subject<'_>) -> Outcome<Value> {
    let clones = count("CLONES", 50)?;
    println!("{clones} clones of {MEMORY_MIB} MiB, {FILLED_MIB} of them not zeros, with an idle guest");
    let directory = tempfile::Builder::new()
        .prefix("coracle-bench")
        .tempdir_in("/dev/shm")?;
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (state, memory) = (path("s.state"), path("s.memory"));
    let words = format!("do=dirty:mib={FILLED_MIB},ms=1 do=hello do=echo:wait=irq");
    let mut monitor = subject.started(&words, MEMORY_MIB, None)?;
    monitor.wait_for("echo: ready")?;
    save(&mut monitor, &state, &memory)?;
    drop(monitor);

    let ctl = subject.program.path.with_file_name("coraclectl");
    let begun = Instant::now();
    let done = Command::new(ctl)
        .args([
            "--json",
            "clone",
            &state,
            &memory,
            "--count",
            &clones.to_string(),
            "--monitor",
        ])
        .arg(&subject.program.path)
        .env("XDG_RUNTIME_DIR", directory.path())
        .output()?;
    let all_after = begun.elapsed();
    ensure!(done.status.success(), "coraclectl clone: {done:?}");
    let fleet = Fleet::read(&serde_json::from_slice(&done.stdout)?)?;
    ensure!(
        fleet.0.len() as u64 == clones,
        "{} of {clones} clones are told of",
        fleet.0.len()
    );
    // Before they settle: what they do later is the guest's.
    let mut figures = Figures::default();
    for clone in &fleet.0 {
        figures.cpu_ms.push(ms(cpu_time(clone.pid)?));
        figures.loaded_ms.push(clone.loaded_after_ms);
    }
    std::thread::sleep(SETTLED);
    for clone in &fleet.0 {
        let resident = Resident::of(clone.pid)?;
        figures.resident_mib.push(resident.own_kib / 1024.0);
        figures.written_mib.push(resident.written_kib / 1024.0);
        figures.private_mib.push(resident.private_kib / 1024.0);
    }
    Ok(figures.report(all_after))
}

#[derive(Default)]
struct Figures {
    resident_mib: Series,
    private_mib: Series,
    written_mib: Series,
    cpu_ms: Series,
    loaded_ms: Series,
}

impl Figures {
    fn report(&self, all_after: Duration) -> Value {
        let resident = row(
            "resident of each beyond the guest's, the largest",
            self.resident_mib.highest(),
            RESIDENT_MIB_MAX,
            "MiB",
        );
        println!(
            "  of that shared with nobody: {:.2} MiB; the guest has written {:.2} MiB (medians)",
            self.private_mib.median(),
            self.written_mib.median()
        );
        let cpu = row(
            "CPU time of each, the median",
            self.cpu_ms.median(),
            CPU_MS_MAX,
            "ms",
        );
        println!(
            "  the most {:.2} ms; ready after {:.2} ms each (median), all after {:.0} ms",
            self.cpu_ms.highest(),
            self.loaded_ms.median(),
            ms(all_after)
        );
        json!({
            "resident_mib": resident,
            "cpu_ms": cpu,
            "all_after_ms": ms(all_after),
            "resident_mib_runs": self.resident_mib.report(),
            "private_mib_runs": self.private_mib.report(),
            "written_mib_runs": self.written_mib.report(),
            "cpu_ms_runs": self.cpu_ms.report(),
            "loaded_after_ms_runs": self.loaded_ms.report(),
        })
    }
}

struct Clone {
    pid: i32,
    loaded_after_ms: f64,
}

/// All clones; killed when dropped.
struct Fleet(Vec<Clone>);

impl Fleet {
    fn read(told: &Value) -> Outcome<Self> {
        let clones = told
            .get("clones")
            .and_then(Value::as_array)
            .ok_or("it tells of clones")?;
        let clone = |told: &Value| {
            Some(Clone {
                pid: i32::try_from(told.get("pid")?.as_i64()?).ok()?,
                loaded_after_ms: told.get("loaded_after_ms")?.as_f64()?,
            })
        };
        let clones: Option<Vec<_>> = clones.iter().map(clone).collect();
        Ok(Self(clones.ok_or("a clone has a process and a time")?))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for pid in self.0.iter().filter_map(|clone| Pid::from_raw(clone.pid)) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// What a process has resident, in KiB.
#[derive(Default)]
struct Resident {
    /// Beyond the mappings of the guest's memory, whoever shares it.
    own_kib: f64,
    /// Of that, what nobody shares.
    private_kib: f64,
    /// What the guest has written since.
    written_kib: f64,
}

impl Resident {
    fn of(pid: i32) -> Outcome<Self> {
        let maps = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("smaps"))?;
        let (mut found, mut is_guest) = (Self::default(), false);
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let (Some(name), Some(value)) = (words.next(), words.next()) else {
                continue;
            };
            let Some(field) = name.strip_suffix(':') else {
                // The head of a mapping.
                is_guest = line.contains("snapshot-memory");
                continue;
            };
            let Ok(kib) = value.parse::<u32>().map(f64::from) else {
                continue;
            };
            match (is_guest, field) {
                (true, "Anonymous") => found.written_kib += kib,
                (false, "Rss") => found.own_kib += kib,
                (false, "Private_Clean" | "Private_Dirty") => found.private_kib += kib,
                _ => {}
            }
        }
        ensure!(
            maps.contains("snapshot-memory"),
            "process {pid} does not map the memory of the snapshot"
        );
        Ok(found)
    }
}

/// The time on a processor of all threads that a process has and has had.
fn cpu_time(pid: i32) -> Outcome<Duration> {
    let mut clock = 0;
    // SAFETY: the call writes to `clock`, which outlives it.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    ensure!(error == 0, "process {pid} has no clock: error {error}");
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes to `time`, which outlives it.
    let error = unsafe { libc::clock_gettime(clock, &raw mut time) };
    ensure!(error == 0, "the clock of process {pid} cannot be read");
    let (seconds, nanoseconds) = (u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?);
    Ok(Duration::new(seconds, nanoseconds))
}
