//! Clients that others have written drive the monitor unchanged.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::blank_image;
use coracle_tests::harness::hosts::Star;
use coracle_tests::harness::jail::UID;
use coracle_tests::monitor::Launch;
use coracle_tests::process::processes_with;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_published_firecracker_client_drives_it",
        need: Need::Kvm,
        run: |context| drive(context, None, None),
    },
    Case {
        name: "a_published_firecracker_client_drives_a_network",
        need: Need::KvmAndHosts,
        run: |context| {
            let host = host()?;
            host.server.inside(|| drive(context, None, Some(TAP)))?
        },
    },
    Case {
        name: "a_published_client_in_rust_drives_it",
        need: Need::KvmAndHosts,
        run: |context| {
            let host = host()?;
            host.server.inside(|| drive_by_sdk(context))?
        },
    },
    Case {
        name: "a_published_client_in_rust_puts_it_into_a_jail",
        need: Need::KvmAndRoot,
        run: jail_by_sdk,
    },
    Case {
        name: "the_same_calls_drive_firecracker",
        need: Need::KvmAndFirecracker,
        run: |context| drive(context, context.environment.firecracker.as_deref(), None),
    },
];

const SOON: Duration = Duration::from_secs(30);
const TAP: &str = "tap0";

fn host() -> Outcome<Star> {
    let star = Star::new(0)?;
    star.server.bridge(Ipv4Addr::new(172, 16, 0, 1).into(), &[TAP])?;
    Ok(star)
}

fn drive(context: &Context, peer: Option<&Path>, tap: Option<&str>) -> Outcome {
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
    arguments.extend(tap.map(OsStr::new));
    run(context, "drive.py", &arguments)?;
    monitor.signal(Signal::KILL)?;
    // It is the next monitor's to make.
    std::fs::remove_file(directory.join("test-vsock"))?;
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
        std::fs::remove_file(directory.join("test-vsock"))?;
    }
    Ok(())
}

fn drive_by_sdk(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let place = |name: &str| directory.path().join(name);
    let (disk, other) = (place("disk"), place("other"));
    blank_image(&disk, 1)?;
    blank_image(&other, 1)?;
    let environment = &context.environment;
    let mut client = Command::new(&environment.client_sdk);
    client
        .arg("bare")
        .args([&environment.coracle, &environment.unikernel, &disk, &other])
        .arg(directory.path())
        .arg(TAP);
    ends_well(client)?;
    nothing_runs(directory.path())
}

/// By the rights that a jail's user has of hard links in a directory of its own, as the client makes them.
fn jail_by_sdk(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let place = |name: &str| directory.path().join(name);
    let environment = &context.environment;
    let (disk, kernel) = (place("disk"), place("kernel"));
    blank_image(&disk, 1)?;
    std::os::unix::fs::chown(&disk, Some(UID), Some(UID))?;
    std::fs::copy(&environment.unikernel, &kernel)?;
    let id = format!("sdk-{}", std::process::id());
    let user = UID.to_string();
    let mut client = Command::new(&environment.client_sdk);
    client
        .arg("jailed")
        .args([&environment.jailer, &environment.coracle, &kernel, &disk])
        .arg(directory.path())
        .args([&id, &user, &user]);
    ends_well(client)?;
    nothing_runs(directory.path())
}

fn ends_well(mut client: Command) -> Outcome {
    let done = client
        .output()
        .map_err(|error| format!("{client:?}: {error}; run: make clients"))?;
    ensure!(done.status.success(), "{client:?}: {done:?}");
    Ok(())
}

/// The client has asked the last of them to end, and waits for none.
fn nothing_runs(directory: &Path) -> Outcome {
    let (begun, here) = (Instant::now(), directory.display().to_string());
    while !processes_with(&here)?.is_empty() {
        ensure!(begun.elapsed() < SOON, "a monitor runs on");
        std::thread::sleep(Duration::from_millis(5));
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
        .map_err(|e| format!("{}: {e}; run: make clients", python.display()))?;
    ensure!(
        done.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(())
}
