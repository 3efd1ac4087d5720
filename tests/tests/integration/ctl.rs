//! The client that people type, with the real monitor behind it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::console::Console;
use coracle_tests::environment::Need;
use coracle_tests::guest::blank_image;
use coracle_tests::harness::hosts::Star;
use coracle_tests::process::processes_with;
use coracle_tests::{Outcome, ensure};
use serde_json::Value;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "run_ends_with_the_guests_status",
        need: Need::Kvm,
        run: run_ends_with_the_guests_status,
    },
    Case {
        name: "runs_with_a_disk_a_tap_and_a_socket_leave_nothing",
        need: Need::KvmAndHosts,
        run: runs_leave_nothing,
    },
    Case {
        name: "a_running_machine_is_listed_paused_and_stopped",
        need: Need::Kvm,
        run: a_running_machine_is_driven,
    },
];

const SOON: Duration = Duration::from_secs(30);

fn run_ends_with_the_guests_status(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let statuses = [0, 5, 200].into_iter().cycle();
    for (_, status) in (0..context.count(3, 10_000)).zip(statuses) {
        let words = format!("do=hello do=exit:status={status}");
        let done = run(context, place.path(), &words).stdin(Stdio::null()).output()?;
        ensure!(done.status.code() == Some(status), "{status}: {done:?}");
        ensure!(
            String::from_utf8_lossy(&done.stdout).contains("hello from"),
            "{status}: {done:?}"
        );
    }
    nothing_is_left(place.path())
}

/// The same disk, tap and socket again and again: each run finds them free, whatever ended the last.
fn runs_leave_nothing(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let disk = place.path().join("disk.raw");
    blank_image(&disk, 16)?;
    let socket = place.path().join("vsock");
    let star = Star::new(0)?;
    star.server.bridge([172, 16, 0, 1].into(), &["tap0"])?;
    let interfaces = || {
        star.server
            .inside(|| fs::read_to_string("/proc/net/dev").map(|text| text.lines().count()))
    };
    let interfaces_before = interfaces()??;
    let mut seed = context.seed.clone();
    for round in 0..context.count(5, 10_000) {
        let number = seed.below(1 << 30);
        let is_ended = round % 50 == 3;
        let end = if is_ended {
            "do=spin:seconds=forever"
        } else {
            "do=exit:status=7"
        };
        let words = format!(
            "do=pattern-write:mib=1,seed={number} do=flush do=pattern-verify:mib=1,seed={number} do=hello {end}"
        );
        let mut command = run(context, place.path(), &words);
        command
            .args(["--memory=32M", "--net=tap0", "--json", "--stop-timeout=1"])
            .arg(format!("--disk={},noroot,writeback", disk.display()))
            .arg(format!("--vsock={}", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = star.server.inside(|| command.spawn())??;
        if is_ended {
            let console = Console::read(child.stdout.take().ok_or("stdout was asked for")?);
            console.wait_for("hello from", SOON)?;
            let id = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(id, rustix::process::Signal::TERM)?;
        }
        let done = child.wait_with_output()?;
        let told = String::from_utf8_lossy(&done.stderr).into_owned();
        let expected = if is_ended { "stopped" } else { "guest_exit" };
        ensure!(told.contains(expected), "round {round}: {done:?}");
        ensure!(
            is_ended || done.status.code() == Some(7),
            "round {round}: {done:?}"
        );
        ensure!(!socket.exists(), "round {round}: the socket is left over");
    }
    ensure!(
        interfaces()?? == interfaces_before,
        "an interface is left over, or gone"
    );
    // The disk's record of leases is its own, and stays as short as it is.
    let mut records = 0;
    for entry in fs::read_dir(place.path())? {
        let path = entry?.path();
        if path.display().to_string().contains("disk.raw.lease.") {
            records += 1;
            fs::remove_file(path)?;
        }
    }
    ensure!(records <= 2, "{records} records of leases are there");
    fs::remove_file(disk)?;
    nothing_is_left(place.path())
}

fn a_running_machine_is_driven(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let mut child = run(context, place.path(), "do=hello do=spin:seconds=forever")
        .args(["--name", "driven"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let console = Console::read(child.stdout.take().ok_or("stdout was asked for")?);
    let driven = drive(context, place.path(), &console);
    if driven.is_err() {
        child.kill()?;
    }
    let deadline = Instant::now() + SOON;
    while child.try_wait()?.is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    driven?;
    ensure!(child.try_wait()?.is_some(), "`run` goes on after `stop`");
    nothing_is_left(place.path())
}

fn drive(context: &Context, place: &Path, console: &Console) -> Outcome {
    console.wait_for("hello from", SOON)?;
    let state = || -> Outcome<Value> {
        let machines: Value = serde_json::from_slice(&ask(context, place, &["--json", "ps"])?.stdout)?;
        let list = machines
            .as_array()
            .or_else(|| machines.as_object()?.values().next()?.as_array());
        let ours = list
            .into_iter()
            .flatten()
            .find(|m| m.to_string().contains("driven"));
        Ok(ours.cloned().ok_or_else(|| format!("not listed: {machines}"))?)
    };
    ensure!(state()?.to_string().contains("Running"), "{}", state()?);
    ask(context, place, &["pause", "driven"])?;
    ensure!(state()?.to_string().contains("Paused"), "{}", state()?);
    ask(context, place, &["resume", "driven"])?;
    ask(context, place, &["info", "driven"])?;
    let version = ask(context, place, &["api", "--vm", "driven", "GET", "/version"])?;
    ensure!(
        String::from_utf8_lossy(&version.stdout).contains("firecracker_version"),
        "{version:?}"
    );
    ask(context, place, &["stop", "--force", "driven"]).map(drop)
}

/// `coraclectl run` of the unikernel guest, with a runtime directory of its own.
fn run(context: &Context, place: &Path, words: &str) -> Command {
    let mut command = ctl(context, place);
    command
        .arg("run")
        .arg("--kernel")
        .arg(&context.environment.unikernel)
        .args(["--cmdline", words]);
    command.arg("--monitor").arg(&context.environment.coracle);
    command
}

fn ask(context: &Context, place: &Path, arguments: &[&str]) -> Outcome<Output> {
    let done = ctl(context, place).args(arguments).output()?;
    ensure!(done.status.success(), "coraclectl {arguments:?}: {done:?}");
    Ok(done)
}

fn ctl(context: &Context, place: &Path) -> Command {
    let mut command = Command::new(&context.environment.coraclectl);
    command.env("XDG_RUNTIME_DIR", place);
    command
}

fn nothing_is_left(place: &Path) -> Outcome {
    ensure!(
        processes_with(&place.display().to_string())?.is_empty(),
        "a monitor is left"
    );
    let mut left = Vec::new();
    for entry in fs::read_dir(place)?.chain(fs::read_dir(place.join("coracle")).into_iter().flatten()) {
        left.push(entry?.file_name().to_string_lossy().into_owned());
    }
    left.retain(|name| name != "coracle");
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}
