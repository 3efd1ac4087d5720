//! I/O that a snapshot finds begun: requests that wait in a ring when their machine is saved are served when it goes on, though
//! nobody tells the device of them again.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::harness::nfs::server::{self, Plan, Server};
use coracle_tests::harness::proxy::{Direction, Fault, Proxy};
use coracle_tests::monitor::Monitor;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::snapshot::{Files, SOON, killed, loaded, saved, started};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "requests_in_the_ring_of_a_loaded_guest_are_served_without_a_kick",
        need: Need::Kvm,
        run: serves_without_a_kick,
    },
    Case {
        name: "a_disk_is_read_into_memory_that_has_not_come_from_its_server_yet",
        need: Need::Kvm,
        run: reads_into_absent_memory,
    },
];

/// What the guest reads at once: as many requests as it has, so that it does not kick again until all have ended.
const READS: &str = "bs=131072,depth=8";
/// One request at a time, and then none for this long.
const PERIOD: Duration = Duration::from_millis(500);

/// A guest that writes its disk and waits, so that its disk can be slowed down, and then reads it, and stays a while.
fn machine(context: &Context, disk: &Path, dirty_mib: u32, seed: u64) -> Machine {
    let words = format!(
        "do=hello do=pattern-write:mib=1,seed={seed},{READS} do=dirty:mib={dirty_mib},ms=50 do=tick:ms=20,count=50 \
         do=pattern-verify:mib=1,seed={seed},{READS} do=tick:ms=20,count=50"
    );
    Machine::unikernel(&context.environment, &words)
        .memory_mib(dirty_mib + 16)
        .disk("d", disk)
}

/// Saves the guest while most of its reads wait for the limits of its disk.
fn saved_with_reads_waiting(monitor: &Monitor, files: &Files) -> Outcome {
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    let period_ms = u64::try_from(PERIOD.as_millis())?;
    let slow = json!({
        "drive_id": "d",
        "rate_limiter": { "ops": { "size": 1, "refill_time": period_ms } },
    });
    monitor.must("PATCH", "/drives/d", Some(&slow))?;
    monitor.console.wait_for("tick: n=49 ", SOON)?;
    // Now and then one of them ends, so that they have been begun.
    std::thread::sleep(PERIOD);
    saved(monitor, files, "Full")?;
    ensure!(
        !monitor.console.text().contains("pattern-verify"),
        "its reads have ended: {}",
        monitor.console.text()
    );
    Ok(())
}

fn serves_without_a_kick(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("test-disk");
    blank_image(&disk, 1)?;
    let mut seed = context.seed.clone();
    for _ in 0..context.count(1, 20) {
        let machine = machine(context, &disk, 4, seed.below(1 << 30));
        let monitor = started(context, &machine.config())?;
        let files = Files::in_directory(directory.path(), "s");
        saved_with_reads_waiting(&monitor, &files)?;
        killed(monitor)?;
        let verify = if seed.below(2) == 0 { "lazy" } else { "off" };
        let ended = loaded(context, &files, verify)?.wait(SOON)?;
        ended.expect(0)?;
        ensure!(ended.console.contains("pattern-verify: ok"), "{}", ended.console);
    }
    Ok(())
}

/// The memory comes so slowly that the disk, which is on the same server and is not slowed down, has to wait for the pages that
/// it reads to; and has read everything while most of the memory is still to come.
fn reads_into_absent_memory(context: &Context) -> Outcome {
    const DIRTY_MIB: u32 = 32;
    const BYTES_PER_SECOND: u64 = 2 << 20;
    let server = Server::start(Plan::image(1 << 20))?;
    let seed = context.seed.clone();
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let proxy = Proxy::start(loopback, server.address(), seed.clone())?;
    let disk = PathBuf::from(server.url("export/image.raw"));
    let number = seed.clone().below(1 << 30);
    let monitor = started(context, &machine(context, &disk, DIRTY_MIB, number).config())?;
    let files = Files {
        state: PathBuf::from(server.url("export/s.state")),
        memory: PathBuf::from(server::url(proxy.address(), "export/s.memory")),
    };
    saved_with_reads_waiting(&monitor, &files)?;
    // In good order: the server would keep the lease of one that was killed for its time.
    monitor.signal(Signal::TERM)?;
    monitor.wait(SOON)?;

    proxy.set(
        Direction::ToClient,
        Fault::Rate {
            bytes_per_second: BYTES_PER_SECOND,
        },
    )?;
    let monitor = loaded(context, &files, "lazy")?;
    monitor.console.wait_for("pattern-verify: ok", SOON)?;
    let progress = monitor.must("GET", "/snapshot", None)?.json()?;
    ensure!(progress.get("state") == Some(&json!("Loading")), "{progress}");
    let done = progress.get("done_bytes").and_then(Value::as_u64);
    ensure!(
        done.is_some_and(|done| done < u64::from(DIRTY_MIB) << 20),
        "{progress}"
    );
    monitor.wait(SOON)?.expect(0)
}
