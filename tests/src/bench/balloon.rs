//! How much of what a Linux guest has freed its host has back after some seconds, by free page reporting.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::environment::Environment;
use crate::guest::Linux;
use crate::monitor::Launch;
use crate::{Outcome, ensure};

/// What the guest has: Linux 6.1 reports while there is more than 128 MiB free.
const MEMORY_MIB: u32 = 320;
/// What it uses and frees.
const USED_MIB: u64 = 128;
/// So long after it has freed that.
pub const WITHIN: Duration = Duration::from_secs(5);
const LOOK_PERIOD: Duration = Duration::from_millis(50);
/// A boot takes ten seconds where kernel code is emulated.
const PATIENCE: Duration = Duration::from_secs(240);

/// What came back.
#[derive(Clone, Copy, Debug)]
pub struct Returned {
    /// The part of what was freed that the host has after [`WITHIN`].
    pub share: f64,
    /// When it had nine tenths of it, if it had.
    pub nine_tenths_after: Option<Duration>,
}

/// Has a guest use memory and free it, and looks at what stays resident.
///
/// # Errors
///
/// When the guest cannot be started, or nothing happens for too long.
pub fn measure(environment: &Environment) -> Outcome<Returned> {
    let launch = Launch::of(&environment.coracle)?;
    let words = format!("use-memory {USED_MIB} count 1000");
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true });
    let machine = Linux::read(environment)?
        .machine("smp", launch.directory(), &words)?
        .read_only_root()
        .memory_mib(MEMORY_MIB)
        .part("balloon", balloon);
    let monitor = launch.config(&machine.config())?.start()?;
    let bytes = u64::from(MEMORY_MIB) << 20;
    let resident_kib = || monitor.process().resident_kib_of_mapping(bytes);
    monitor
        .console
        .wait_for(&format!("use-memory: {USED_MIB} MiB used"), PATIENCE)?;
    let most = resident_kib()?;
    monitor.console.wait_for("use-memory: given back", PATIENCE)?;
    let begun = Instant::now();
    let back = || -> Outcome<f64> {
        let back_kib = u32::try_from(most.saturating_sub(resident_kib()?))?;
        Ok(f64::from(back_kib) / f64::from(u32::try_from(USED_MIB << 10)?))
    };
    ensure!(most >= USED_MIB << 10, "it has used {most} KiB only");
    let mut nine_tenths_after = None;
    loop {
        let (share, passed) = (back()?, begun.elapsed());
        if share >= 0.9 && nine_tenths_after.is_none() {
            nine_tenths_after = Some(passed);
        }
        if passed >= WITHIN {
            return Ok(Returned {
                share,
                nine_tenths_after,
            });
        }
        std::thread::sleep(LOOK_PERIOD);
    }
}
