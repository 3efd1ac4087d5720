//! However a jail ends, nothing is left of it: no mount, cgroup, namespace, process or file.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use coracle_tests::case::{Context, text};
use coracle_tests::guest::Machine;
use coracle_tests::harness::jail::{Jail, cgroups_of, vanishes};
use coracle_tests::process::processes_with;
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;

use super::causes::INMATE;
use super::{SOON, kill};

/// How long a start takes at most, until something is done to it.
const START_US_MAX: u64 = 60_000;

#[derive(Clone, Copy, Debug)]
enum End {
    GuestEnds,
    MonitorKilled,
    JailerKilled,
    SupervisorKilled,
    JailerAsked,
    MonitorAsked,
}

const ENDS: [End; 6] = [
    End::GuestEnds,
    End::MonitorKilled,
    End::JailerKilled,
    End::SupervisorKilled,
    End::JailerAsked,
    End::MonitorAsked,
];

pub(super) fn jails_that_end_in_any_way(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    let place = tempfile::tempdir()?;
    let monitor = without_symbols(&context.environment.coracle, place.path())?;
    for number in 0..context.count(20, 1000) {
        let index = usize::try_from(number)? % ENDS.len();
        let end = ENDS.get(index).copied().unwrap_or(End::GuestEnds);
        one(context, &monitor, end, &mut seed)
            .map_err(|e| format!("jail {number}, {end:?}: {}", text(&e)))?;
    }
    Ok(())
}

fn one(context: &Context, monitor: &Path, end: End, seed: &mut Seed) -> Outcome {
    let words = match end {
        End::GuestEnds => "do=hello do=exit:status=0",
        _ => "do=tick:ms=20,count=1000000",
    };
    let machine = Machine::unikernel(&context.environment, words);
    let mut jail =
        Jail::of(&context.environment, monitor)?.flags(["--cleanup", "--cgroup", "cpu.shares=512"]);
    for flag in ["--supervise", "--new-pid-ns"] {
        if seed.below(2) == 1 {
            jail = jail.flags([flag]);
        }
    }
    if !Path::new("/sys/fs/cgroup/cpu").is_dir() {
        jail = jail.flags(["--cgroup-version", "2"]);
    }
    let (base, id) = (jail.base().to_owned(), jail.id.clone());
    let jailed = jail.machine(&machine)?.spawn()?;
    // In the middle of the start as often as in that of a run.
    std::thread::sleep(Duration::from_micros(seed.below(START_US_MAX)));
    match end {
        End::GuestEnds => {}
        End::MonitorKilled => once_there(|| kill(jailed.process()?, Signal::KILL))?,
        End::MonitorAsked => once_there(|| ask(jailed.process()?))?,
        End::JailerKilled => jailed.monitor.signal(Signal::KILL)?,
        End::JailerAsked => {
            once_there(|| jailed.process().and_then(|_| jailed.monitor.signal(Signal::TERM)))?
        }
        End::SupervisorKilled => once_there(|| {
            let jailer = jailed.monitor.process().0;
            let children = std::fs::read_to_string(format!("/proc/{jailer}/task/{jailer}/children"))?;
            let child = children.split_whitespace().next().ok_or("no supervisor yet")?;
            kill(coracle_tests::process::Process(child.parse()?), Signal::KILL)
        })?,
    }
    let mut jailed = jailed;
    jailed.ends(SOON)?;
    vanishes(&base, &id)
}

/// Asks the monitor itself until it has heard: the first process of a PID namespace does not get what it neither waits for nor
/// blocks (pid_namespaces(7)), and that is so until it has begun. The jailer passes signals on when they are waited for.
fn ask(monitor: coracle_tests::process::Process) -> Outcome {
    let deadline = std::time::Instant::now() + SOON;
    // Who has ended has no memory, even where nobody has asked for its status.
    while monitor.status_kib("VmRSS").is_ok() {
        ensure!(std::time::Instant::now() < deadline, "it has not heard");
        // It may be gone by now.
        let _ = kill(monitor, Signal::TERM);
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Does something as soon as it can be done.
fn once_there(work: impl Fn() -> Outcome) -> Outcome {
    let deadline = std::time::Instant::now() + SOON;
    loop {
        match work() {
            Err(error) if std::time::Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
            Ok(()) => return Ok(()),
        }
    }
}

/// Also where no PID namespace ends with its first process.
pub(super) fn what_a_monitor_has_started(context: &Context) -> Outcome {
    for flags in ["--cleanup", "--cleanup --supervise", "--cleanup --new-pid-ns"] {
        let jailed = Jail::of(&context.environment, INMATE.as_ref())?
            .flags(flags.split(' '))
            .arguments(["leaves-a-child"])
            .spawn()?;
        let ended = jailed.end(SOON)?;
        ensure!(ended.status.code() == Some(0), "{flags}: {ended:?}");
    }
    Ok(())
}

/// The system calls by which a jail is made and entered, where each may fail.
const STEPS: &[&str] = &[
    "mkdirat",
    "openat2",
    "mknodat",
    "fchownat",
    "fchown",
    "fchmod",
    "statx",
    "mkdir",
    "write",
    "pipe2",
    "clone",
    "mount_setattr",
    "ioctl",
    "copy_file_range",
    "open_tree",
    "move_mount",
    "unshare",
    "mount",
    "pivot_root",
    "umount2",
    "fchdir",
    "chdir",
    "prlimit64",
    "setns",
    "setgroups",
    "setresgid",
    "setresuid",
    "capset",
    "prctl",
    "execveat",
];

pub(super) fn a_start_that_fails_at_any_step(context: &Context) -> Outcome {
    // An error that nothing here expects, so that it is not taken for something else.
    at_each_step(context, "error=EDQUOT", 1)
}

pub(super) fn a_jailer_that_is_killed_at_any_step(context: &Context) -> Outcome {
    at_each_step(context, "signal=KILL", 2)
}

/// Lets the first such calls of the jailer's processes end so, one in each run; in `make soak` all of them.
fn at_each_step(context: &Context, injected: &str, calls: u32) -> Outcome {
    let place = tempfile::tempdir()?;
    let monitor = without_symbols(&context.environment.coracle, place.path())?;
    for step in STEPS {
        for call in 1..=context.count(calls, 24) {
            let is_reached = injected_once(context, &monitor, &format!("{step}:{injected}:when={call}"))
                .map_err(|e| format!("{step}, call {call}, {injected}: {}", text(&e)))?;
            ensure!(
                is_reached || call > 1,
                "no process of the jailer makes this call: {step}"
            );
            if !is_reached {
                break;
            }
        }
    }
    Ok(())
}

/// Whether the call was there to be ended.
fn injected_once(context: &Context, monitor: &Path, injection: &str) -> Outcome<bool> {
    let machine = Machine::unikernel(&context.environment, "do=hello");
    let star = coracle_tests::harness::hosts::Star::new(0)?;
    let step = injection.split(':').next().unwrap_or_default();
    let jail = Jail::of(&context.environment, monitor)?
        .flags((step == "copy_file_range").then_some("--copy-exec"))
        .flags([
            "--cleanup",
            "--supervise",
            "--netns",
            &star.server.path(),
            "--cgroup",
            "cpu.shares=512",
        ])
        .machine(&machine)?;
    let log = jail.directory().join("test-strace").display().to_string();
    let (base, id) = (jail.base().to_owned(), jail.id.clone());
    let inject = format!("inject={injection}");
    let trace = format!("trace={step},clone");
    let traced = ["strace", "-f", "-qq", "-o", &log, "-e", &trace, "-e", &inject];
    // The monitor's own calls are no steps of this.
    let traced = traced.into_iter().chain(["--detach-on=execve"]);
    let mut jailed = jail.by_way_of(traced).spawn()?;
    jailed.ends(SOON)?;
    let log = std::fs::read_to_string(log)?;
    if let Some((front, supervisor)) = parents(&log)
        && was_killed(&log, front)
        && was_killed(&log, supervisor)
    {
        // The call was the same number of each, one while it cleaned up after the other: nobody is left who could.
        return nobody_is_left(&id);
    }
    vanishes(&base, &id)?;
    Ok(log.contains("(INJECTED)") || log.contains("killed by SIGKILL"))
}

/// The first process of the jailer, and the one that it has made.
fn parents(log: &str) -> Option<(&str, &str)> {
    let mut clones = log.lines().filter(|line| line.contains("clone"));
    let front = clones.clone().next()?.split_whitespace().next()?;
    let made = clones.find(|line| line.starts_with(front) && line.contains(" = "))?;
    Some((front, made.rsplit_once(" = ")?.1.split_whitespace().next()?))
}

fn was_killed(log: &str, process: &str) -> bool {
    log.lines()
        .any(|line| line.starts_with(process) && line.contains("killed by SIGKILL"))
}

/// The monitor dies with its parent, also if nobody is left to remove what was made. Its cgroup is removed here.
fn nobody_is_left(id: &str) -> Outcome<bool> {
    once_there(|| {
        let left = processes_with(id)?;
        ensure!(left.is_empty(), "processes {left:?} of {id} are left");
        Ok(())
    })?;
    for path in cgroups_of(id)? {
        std::fs::remove_dir(path)?;
    }
    Ok(true)
}

/// A copy of a program that is small enough to be copied into many jails.
fn without_symbols(program: &Path, place: &Path) -> Outcome<PathBuf> {
    let name = program.file_name().ok_or("a program has a name")?;
    let small = place.join(name);
    let stripped = Command::new("strip")
        .arg("-o")
        .arg(&small)
        .arg(program)
        .output()?;
    ensure!(
        stripped.status.success(),
        "{}",
        String::from_utf8_lossy(&stripped.stderr)
    );
    Ok(small)
}
