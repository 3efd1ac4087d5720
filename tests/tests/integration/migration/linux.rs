//! Linux on its way.

use std::time::Duration;

use coracle_tests::case::{Context, text};
use coracle_tests::guest::Linux;
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};

use super::{Hosts, SOON};

/// How many times it writes what it then reads from the disk and sums up.
const LAPS: u32 = 5;
/// A lap runs some programs, each of which takes a while on a host that emulates the kernel.
const LIMIT: Duration = Duration::from_secs(240);

/// A shell that writes a file, forgets it, and sums up what the disk has of it, again and again; it moves in the middle of
/// two laps.
pub(super) fn goes_along(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let end = LAPS + 1;
    let words = format!(
        "run while i=$((i+1)); [ $i -lt {end} ]; do dd if=/dev/urandom of=/data/x bs=16k count=4 conv=fsync; \
         md5sum /data/x >/tmp/s; echo 3 >/proc/sys/vm/drop_caches; md5sum -c /tmp/s || exit 9; echo lap $i; done"
    );
    let machine = Linux::read(&context.environment)?.machine("smp", directory.path(), &words)?;
    let mut monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&machine.config())?;
    monitor.start_instance()?;
    let mut said = String::new();
    for lap in [1, 3] {
        monitor.console.wait_for(&format!("lap {lap}\r"), LIMIT)?;
        let (receiver, call, to) = hosts.receiver(context)?;
        monitor.must("PUT", "/migration/send", Some(&hosts.send(&to)))?;
        call.join().map_err(|_| "a thread has panicked")??;
        let ended = std::mem::replace(&mut monitor, receiver).wait(SOON)?;
        ended.expect(0)?;
        said.push_str(&ended.console);
    }
    let ended = monitor.wait(LIMIT)?;
    said.push_str(&ended.console);
    ended
        .expect(0)
        .map_err(|error| format!("{}: {said}", text(&error)))?;
    for lap in 1..=LAPS {
        ensure!(
            said.contains(&format!("lap {lap}\r")),
            "lap {lap} is missing: {said}"
        );
    }
    ensure!(said.matches("/data/x: OK").count() == LAPS as usize, "{said}");
    Ok(())
}
