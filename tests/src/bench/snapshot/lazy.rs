//! A guest of 1 GiB whose memory is on an NFS server, beside the same one from the same file of this host.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Subject, row, save};
use crate::Outcome;
use crate::bench::api::{Monitor, ms};
use crate::bench::count;
use crate::bench::series::Series;
use crate::ensure;
use crate::harness::nfs::server::{Plan, Server};

const MEMORY_MIB: u64 = 1024;
/// What the guest has written before it was saved, in MiB: all but what its kernel needs.
const FILLED_MIB: u64 = MEMORY_MIB - 16;
/// What was asked for.
const FIRST_MS_MAX: f64 = 50.0;
const RATIO_MAX: f64 = 2.0;
/// How often a restored machine is asked whether its memory is all there.
const ASKED_EVERY: Duration = Duration::from_millis(2);
const PATIENCE: Duration = Duration::from_secs(60);

/// Goes on from a snapshot in both ways, `RUNS` (7) times.
///
/// # Errors
///
/// When that fails, or there is no server.
pub fn measure(subject: Subject<'_>) -> Outcome<Value> {
    let runs = count("RUNS", 7)?;
    println!("{MEMORY_MIB} MiB from an NFS server, {FILLED_MIB} of them not zeros");
    let server = Server::start(Plan::image(4096))?;
    let there = [server.url("export/s.state"), server.url("export/s.memory")];
    let here = ["export/s.state", "export/s.memory"].map(|path| server.path(path).display().to_string());
    // After the load it says something at once, then it looks at all of its memory.
    let words = format!(
        "do=dirty:mib={FILLED_MIB},ms=1 do=hello do=tick:ms=20,count=10 do=checksum:mib={FILLED_MIB} do=tick:ms=1000,count=1000"
    );
    let mut monitor = subject.started(&words, MEMORY_MIB, None)?;
    monitor.wait_for("tick: n=1 ")?;
    save(&mut monitor, &there[0], &there[1])?;
    drop(monitor);
    let (mut local, mut remote) = (Figures::default(), Figures::default());
    for _ in 0..runs {
        local.measure(subject, &here)?;
        remote.measure(subject, &there)?;
    }
    let first = row(
        "exec to the guest's first byte",
        remote.first_ms.median(),
        FIRST_MS_MAX,
        "ms",
    );
    println!("  from the file of this host {:.2} ms", local.first_ms.median());
    let ratio = remote.speed_ms.median() / local.speed_ms.median();
    let speed = row(
        "exec to all of the memory, of the local time",
        ratio,
        RATIO_MAX,
        "x",
    );
    println!(
        "  {:.0} ms, and {:.0} ms from the file of this host; all summed up by the guest after {:.0} and {:.0} ms",
        remote.speed_ms.median(),
        local.speed_ms.median(),
        remote.summed_ms.median(),
        local.summed_ms.median()
    );
    Ok(json!({
        "first_byte_ms": first,
        "full_speed_ratio": speed,
        "remote": remote.report(),
        "local": local.report(),
    }))
}

#[derive(Default)]
struct Figures {
    first_ms: Series,
    /// Until nothing of the memory is missing any more.
    speed_ms: Series,
    /// Until the guest has seen all of it.
    summed_ms: Series,
}

impl Figures {
    fn measure(&mut self, subject: Subject<'_>, [state, memory]: &[String; 2]) -> Outcome {
        let body = json!({
            "snapshot_path": state,
            "mem_backend": { "backend_type": "File", "backend_path": memory },
            "resume_vm": true,
        });
        // The first load of all would know nothing of what the guest asks for.
        let begun = Instant::now();
        let mut monitor = Monitor::start(subject.program, &["--api-sock", "api.sock"])?;
        monitor.wait_for_api()?;
        monitor.send("PUT", "/snapshot/load", &body)?;
        monitor.wait_for_first_byte()?;
        self.first_ms.push(ms(begun.elapsed()));
        monitor.answer()?;
        while !monitor.ask("GET", "/snapshot")?.contains("Idle") {
            ensure!(begun.elapsed() < PATIENCE, "the memory does not come");
            std::thread::sleep(ASKED_EVERY);
        }
        self.speed_ms.push(ms(begun.elapsed()));
        monitor.wait_for("checksum: mib=")?;
        self.summed_ms.push(ms(begun.elapsed()));
        Ok(())
    }

    fn report(&self) -> Value {
        json!({
            "exec_to_first_byte_ms": self.first_ms.report(),
            "exec_to_all_there_ms": self.speed_ms.report(),
            "exec_to_all_summed_ms": self.summed_ms.report(),
        })
    }
}
