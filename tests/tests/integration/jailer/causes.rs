//! Why a monitor ended, as its supervisor tells it.

use std::time::{Duration, Instant};

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::jail::{Jail, Jailed, memory_limit};
use coracle_tests::monitor::Ended;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::supervised::{records, ticking};
use super::{SOON, kill};

/// A program of ours, in place of a monitor.
pub(super) const INMATE: &str = env!("CARGO_BIN_EXE_inmate");
/// What a monitor ends with whose filters have refused a call.
const REFUSED: i32 = 148;
const MEMORY_BYTES: u64 = 48 << 20;

pub(super) fn each_death(context: &Context) -> Outcome {
    let jail =
        || -> Outcome<Jail> { Ok(Jail::new(&context.environment)?.flags(["--supervise", "--cleanup"])) };
    for (words, status) in [
        ("do=hello end=poweroff", 0),
        ("do=exit:status=5", 5),
        ("do=hello end=triple", 160),
    ] {
        let machine = Machine::unikernel(&context.environment, words);
        let ended = jail()?.machine(&machine)?.spawn()?.end(SOON)?;
        told(&ended, "exit", &Value::from(status), &Value::Null).map_err(|e| format!("{words}: {e:?}"))?;
        ensure!(ended.status.code() == Some(status), "{words}: {ended:?}");
    }
    for (signal, cause, name) in [
        (Signal::KILL, "signal", "SIGKILL"),
        (Signal::SEGV, "signal", "SIGSEGV"),
    ] {
        let jailed = ticking(context, jail()?)?;
        // The first SIGSEGV that no instruction has caused is taken by the runtime's handler of a stack that is too small.
        let monitor = jailed.process()?;
        let deadline = Instant::now() + SOON;
        while kill(monitor, signal).is_ok() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let ended = jailed.end(SOON)?;
        told(&ended, cause, &Value::Null, &name.into())?;
        ensure!(
            ended.status.code() == Some(128 + signal.as_raw()),
            "{name}: {ended:?}"
        );
    }
    // A monitor takes this one for a call that was refused.
    let jailed = ticking(context, jail()?)?;
    kill(jailed.process()?, Signal::SYS)?;
    let ended = jailed.end(SOON)?;
    told(&ended, "seccomp", &REFUSED.into(), &Value::Null)?;
    ensure!(ended.status.code() == Some(REFUSED), "{ended:?}");
    refused_call(context)?;
    no_kvm(context)
}

fn refused_call(context: &Context) -> Outcome {
    let jailed = Jail::of(&context.environment, INMATE.as_ref())?
        .flags(["--supervise", "--cleanup"])
        .arguments(["refused-call"])
        .spawn()?;
    let ended = jailed.end(SOON)?;
    let record = told(&ended, "seccomp", &Value::Null, &"SIGSYS".into())?;
    // The kernel's log has it, unless an audit daemon takes such messages.
    let pid = format!(
        "pid={} ",
        record.get("pid").and_then(Value::as_u64).unwrap_or_default()
    );
    let log = std::process::Command::new("dmesg").output()?;
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    let is_logged = log
        .lines()
        .any(|line| line.contains("type=1326") && line.contains(&pid));
    let expected = if is_logged {
        Value::from("sync")
    } else {
        Value::Null
    };
    ensure!(
        record.get("syscall") == Some(&expected),
        "{expected} in the log, {record}"
    );
    Ok(())
}

/// Where the module is missing, opening its node fails: in this jail a mount is on it.
fn no_kvm(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=hello");
    let jail = Jail::new(&context.environment)?.flags(["--supervise", "--cleanup"]);
    // The devices cgroup refuses it where there is one; otherwise a file is no device.
    let ended = if std::path::Path::new("/sys/fs/cgroup/devices").is_dir() {
        let jail = jail.flags(["--cgroup", "devices.deny=c 10:232 rwm"]);
        jail.machine(&machine)?.spawn()?.end(SOON)?
    } else {
        // A host of which the node has gone: for an ordinary user it is that of the host that is shown.
        let hidden = "mount --bind /dev/null /dev/kvm && exec \"$@\"";
        let wrapped = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            hidden,
            "sh",
            "setpriv",
            "--reuid=12345",
            "--regid=12345",
            "--clear-groups",
        ];
        super::rootless::open_to_all(&jail)?;
        jail.by_way_of(wrapped).machine(&machine)?.spawn()?.end(SOON)?
    };
    let record = records(&ended.errors)?.pop().ok_or("there is no record")?;
    ensure!(record.get("cause") == Some(&"kvm".into()), "{ended:?}");
    let detail = record.get("detail").and_then(Value::as_str).unwrap_or_default();
    ensure!(detail.starts_with("/dev/kvm in the jail: "), "{record}");
    Ok(())
}

pub(super) fn want_of_memory(context: &Context) -> Outcome {
    let memory = memory_limit(MEMORY_BYTES).ok_or("this host has the controller")?;
    let machine = Machine::unikernel(&context.environment, "do=hello do=dirty:mib=96,ms=1000,seed=1");
    let jailed: Jailed = Jail::new(&context.environment)?
        .flags(["--supervise", "--cleanup"])
        .flags(memory.iter().map(String::as_str))
        .machine(&machine)?
        .spawn()?;
    let ended = jailed.end(SOON)?;
    told(&ended, "oom", &Value::Null, &"SIGKILL".into())?;
    ensure!(ended.status.code() == Some(137), "{ended:?}");
    Ok(())
}

/// The only record, which says this.
fn told(ended: &Ended, cause: &str, status: &Value, signal: &Value) -> Outcome<Value> {
    let mut records = records(&ended.errors)?;
    let record = records
        .pop()
        .ok_or_else(|| format!("there is no record: {ended:?}"))?;
    ensure!(records.is_empty(), "one life has one record: {ended:?}");
    for (name, expected) in [
        ("cause", &Value::from(cause)),
        ("status", status),
        ("signal", signal),
    ] {
        ensure!(
            record.get(name) == Some(expected),
            "{name} is not {expected}: {record}, {}",
            ended.errors
        );
    }
    Ok(record)
}
