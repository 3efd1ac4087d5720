//! The client that people type, with the real monitor behind it.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::console::Console;
use coracle_tests::environment::Need;
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
    for entry in
        std::fs::read_dir(place)?.chain(std::fs::read_dir(place.join("coracle")).into_iter().flatten())
    {
        left.push(entry?.file_name().to_string_lossy().into_owned());
    }
    left.retain(|name| name != "coracle");
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}
