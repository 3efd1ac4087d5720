//! Clients that others have written drive the monitor unchanged.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::blank_image;
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;

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

const SOON: Duration = Duration::from_secs(30);

fn drive(context: &Context, peer: Option<&Path>) -> Outcome {
    let launch = || -> Outcome<Launch> {
        match peer {
            None => Launch::new(&context.environment),
            Some(firecracker) => Ok(Launch::of(firecracker)?.arguments(["--no-seccomp"])),
        }
    };
    let directory = tempfile::tempdir()?;
    let directory = directory.path();
    let (disk, other) = (directory.join("disk"), directory.join("other"));
    blank_image(&disk, 1)?;
    blank_image(&other, 1)?;
    std::fs::write(directory.join("test-metrics"), "")?;
    let monitor = launch()?.start()?;
    let arguments = [&monitor.socket(), &context.environment.unikernel, &disk, &other];
    let mut arguments: Vec<&OsStr> = arguments.map(|path| path.as_os_str()).to_vec();
    arguments.push(directory.as_os_str());
    run(context, "drive.py", &arguments)?;
    monitor.signal(Signal::KILL)?;
    let before = ticks(&monitor.wait(SOON)?.console).max().unwrap_or(0);

    for how in ["paused", "resumed"] {
        let monitor = launch()?.start()?;
        let socket = monitor.socket();
        let arguments = [socket.as_os_str(), directory.as_os_str(), OsStr::new(how)];
        run(context, "load.py", &arguments)?;
        if how == "resumed" {
            monitor.console.wait_until("a later tick", SOON, |console| {
                ticks(console).find(|number| *number >= before)
            })?;
        }
        monitor.signal(Signal::KILL)?;
        monitor.wait(SOON)?;
    }
    Ok(())
}

/// The numbers that a guest has counted to, in whole lines.
fn ticks(console: &str) -> impl Iterator<Item = u64> {
    console.lines().filter_map(|line| {
        let (number, _) = line.strip_prefix("tick: n=")?.split_once(' ')?;
        number.parse().ok()
    })
}

fn run(context: &Context, script: &str, arguments: &[&OsStr]) -> Outcome {
    let python = &context.environment.client_python;
    let done = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(script))
        .args(arguments)
        // What a script imports of another leaves nothing in the sources.
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .map_err(|e| format!("{}: {e}; run: make venv", python.display()))?;
    ensure!(
        done.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(())
}
