//! A few tests of other groups once more, with their monitors in jails; `make test-jailed` does it to all of them.

use std::process::Command;

use coracle_tests::case::Context;
use coracle_tests::jailing;
use coracle_tests::{Outcome, ensure};

/// A boot, a disk that is written, a snapshot that is made and loaded, a refusal that names its cause, and a migration that opens
/// files once more.
const SAMPLE: [&str; 5] = [
    "boot::a_bzimage_gets_the_zero_page",
    "disk::what_was_flushed_is_in_the_image",
    "snapshot::a_snapshot_is_made_and_loaded_at_its_time_only",
    "lease::a_second_machine_is_refused_by_name_and_the_first_runs_on",
    "migration::a_guest_takes_what_its_overlay_has_along",
];

pub(super) fn in_each_mode(_: &Context) -> Outcome {
    for mode in ["root", "rootless"] {
        for name in SAMPLE {
            let done = Command::new(std::env::current_exe()?)
                .args(["--exact", name])
                .env(jailing::VARIABLE, mode)
                .env_remove(crate::soak::VARIABLE)
                .output()?;
            let said = String::from_utf8_lossy(&done.stdout);
            ensure!(
                done.status.success() && said.contains("1 passed; 0 failed; 0 ignored"),
                "{name}, {mode}: {said}{}",
                String::from_utf8_lossy(&done.stderr)
            );
        }
    }
    Ok(())
}
