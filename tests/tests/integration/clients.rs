//! Clients that others have written drive the monitor unchanged.

use std::process::Command;
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::blank_image;
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_published_firecracker_client_drives_it",
        need: Need::Kvm,
        run: |context| drive(context, None),
    },
    Case {
        name: "the_same_calls_drive_firecracker",
        need: Need::KvmAndFirecracker,
        run: |context| drive(context, context.environment.firecracker.as_deref()),
    },
];

fn drive(context: &Context, peer: Option<&std::path::Path>) -> Outcome {
    let launch = match peer {
        None => Launch::new(&context.environment)?,
        Some(firecracker) => Launch::of(firecracker)?.arguments(["--no-seccomp"]),
    };
    let directory = launch.directory().to_owned();
    let (disk, other) = (directory.join("test-disk"), directory.join("test-other"));
    blank_image(&disk, 1)?;
    blank_image(&other, 1)?;
    std::fs::write(directory.join("test-metrics"), "")?;
    let monitor = launch.start()?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/drive.py");
    let done = Command::new(&context.environment.client_python)
        .arg(script)
        .arg(monitor.socket())
        .args([&context.environment.unikernel, &disk, &other, &directory])
        .output()
        .map_err(|e| {
            format!(
                "{}: {e}; run: make venv",
                context.environment.client_python.display()
            )
        })?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    monitor
        .console
        .wait_for("tick: ", Duration::from_secs(10))
        .map(drop)
}
