//! A parent that stays.

use std::fs;
use std::time::{Duration, Instant};

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::jail::{Jail, Jailed, vanishes};
use coracle_tests::process::copy_program;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{SOON, kill};

/// What `ticking` starts: a guest that does not end by itself.
pub(super) fn ticking(context: &Context, jail: Jail) -> Outcome<Jailed> {
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=10,count=1000000");
    let jailed = jail.machine(&machine)?.start()?;
    jailed.monitor.console.wait_for("tick: n=1", SOON)?;
    Ok(jailed)
}

/// The records of a supervisor.
pub(super) fn records(text: &str) -> Outcome<Vec<Value>> {
    let lines = text.lines().filter(|line| line.starts_with('{'));
    lines.map(|line| Ok(serde_json::from_str(line)?)).collect()
}

pub(super) fn signals_are_passed_on(context: &Context) -> Outcome {
    for more in [
        &["--supervise", "--cleanup"][..],
        &["--supervise"][..],
        &["--cleanup", "--new-pid-ns"][..],
    ] {
        for (signal, status) in [(Signal::HUP, 129), (Signal::INT, 130), (Signal::TERM, 143)] {
            let jailed = ticking(
                context,
                Jail::new(&context.environment)?.flags(more.iter().copied()),
            )?;
            jailed.monitor.signal(signal)?;
            let ended = if more.contains(&"--cleanup") {
                jailed.end(SOON)?
            } else {
                jailed.monitor.wait(SOON)?
            };
            ensure!(
                ended.status.code() == Some(status),
                "{more:?} {signal:?}: {ended:?}"
            );
        }
    }
    // At once, before the monitor can have heard of any signal.
    let jail = Jail::new(&context.environment)?.flags(["--supervise", "--cleanup", "--new-pid-ns"]);
    let jailed = jail.spawn()?;
    let deadline = Instant::now() + SOON;
    while jailed.process().is_err() {
        ensure!(Instant::now() < deadline, "{}", jailed.monitor.errors.text());
    }
    jailed.monitor.signal(Signal::TERM)?;
    let ended = jailed.end(SOON)?;
    ensure!(ended.status.code() == Some(143), "{ended:?}");
    Ok(())
}

pub(super) fn a_failed_monitor_is_started_again(context: &Context) -> Outcome {
    let flags = "--supervise --cleanup --restart on-failure --restart-limit 2 --restart-delay-ms 20";
    let machine = Machine::unikernel(&context.environment, "do=hello do=exit:status=3");
    let jail = Jail::new(&context.environment)?.flags(flags.split(' '));
    let jail = jail.arguments(["--level", "Error"]);
    let ended = jail.machine(&machine)?.spawn()?.end(SOON)?;
    let records = records(&ended.errors)?;
    let of = |name: &str| -> Vec<Value> { records.iter().filter_map(|r| r.get(name).cloned()).collect() };
    ensure!(of("incarnation") == [1, 2, 3], "{records:?}");
    ensure!(of("status") == [3, 3, 3], "{records:?}");
    ensure!(
        of("restart_in_ms") == [Value::from(20), Value::from(40), Value::Null],
        "{records:?}"
    );
    ensure!(ended.console.matches("hello").count() == 3, "{}", ended.console);
    ensure!(ended.status.code() == Some(3), "{ended:?}");

    // One that is killed leaves its socket; the next one has it, and the program that the first one had: what took its place on
    // the host meanwhile is for other jails. One that succeeds is not started again.
    let place = tempfile::tempdir()?;
    let [program, newer] = ["coracle", "newer"].map(|name| place.path().join(name));
    copy_program(&context.environment.coracle, &program)?;
    let flags = "--supervise --cleanup --restart on-failure --restart-delay-ms 1 --new-pid-ns";
    let jail = Jail::of(&context.environment, &program)?.flags(flags.split(' '));
    let jailed = ticking(context, jail)?;
    let first = jailed.process()?;
    copy_program(&context.environment.coracle, &newer)?;
    std::fs::rename(&newer, &program)?;
    kill(first, Signal::KILL)?;
    let deadline = Instant::now() + SOON;
    while jailed.process().ok().is_none_or(|now| now == first) || jailed.monitor.connect().is_err() {
        ensure!(Instant::now() < deadline, "{}", jailed.monitor.errors.text());
        std::thread::sleep(Duration::from_millis(2));
    }
    // Who asks for the end gets it.
    jailed.monitor.signal(Signal::TERM)?;
    let ended = jailed.end(SOON)?;
    ensure!(ended.status.code() == Some(143), "{ended:?}");
    let records = self::records(&ended.errors)?;
    let signals: Vec<_> = records.iter().filter_map(|record| record.get("signal")).collect();
    ensure!(signals == [&Value::from("SIGKILL"), &Value::Null], "{records:?}");

    // So does who asks the monitor itself, as `coraclectl stop` does.
    let flags = "--supervise --cleanup --restart on-failure --restart-delay-ms 1";
    let jail = Jail::new(&context.environment)?.flags(flags.split(' '));
    let jailed = ticking(context, jail)?;
    kill(jailed.process()?, Signal::TERM)?;
    let ended = jailed.end(SOON)?;
    ensure!(ended.status.code() == Some(143), "{ended:?}");
    let records = self::records(&ended.errors)?;
    let restarts: Vec<_> = records
        .iter()
        .filter_map(|record| record.get("restart_in_ms"))
        .collect();
    ensure!(restarts == [&Value::Null], "{records:?}");
    Ok(())
}

/// A guest that counts, with a socket device in the jail.
fn with_a_socket(context: &Context, jail: Jail) -> Outcome<Jailed> {
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=10,count=1000000")
        .part("vsock", json!({ "guest_cid": 3, "uds_path": "/run/v.sock" }));
    let jailed = jail.machine(&machine)?.start()?;
    jailed.monitor.console.wait_for("tick: n=1", SOON)?;
    Ok(jailed)
}

pub(super) fn sockets_of_a_killed_monitor_are_not_in_the_way(context: &Context) -> Outcome {
    let jail = Jail::new(&context.environment)?.flags(["--supervise", "--cleanup"]);
    let jailed = with_a_socket(context, jail)?;
    kill(jailed.process()?, Signal::KILL)?;
    // Nothing is left then.
    let ended = jailed.end(SOON)?;
    ensure!(ended.status.code() == Some(137), "{ended:?}");

    let flags = "--supervise --cleanup --restart on-failure --restart-delay-ms 1";
    let jail = Jail::new(&context.environment)?.flags(flags.split(' '));
    let jailed = with_a_socket(context, jail)?;
    kill(jailed.process()?, Signal::KILL)?;
    jailed
        .monitor
        .console
        .wait_until("a second start", SOON, |console| {
            (console.matches("tick: n=0 ").count() == 2).then_some(())
        })?;
    jailed.monitor.signal(Signal::TERM)?;
    let ended = jailed.end(SOON)?;
    let records = records(&ended.errors)?;
    let signals: Vec<_> = records.iter().filter_map(|record| record.get("signal")).collect();
    ensure!(signals == [&Value::from("SIGKILL"), &Value::Null], "{records:?}");
    Ok(())
}

pub(super) fn a_restart_that_fails_is_recorded(context: &Context) -> Outcome {
    let flags = "--supervise --restart on-failure --restart-delay-ms 1";
    let jail = Jail::new(&context.environment)?.flags(flags.split(' '));
    let node = jail.root().join("dev/urandom");
    let mut jailed = ticking(context, jail)?;
    // What is not the jailer's any more it does not remove, and cannot make again.
    std::fs::remove_file(&node)?;
    std::fs::write(&node, "")?;
    kill(jailed.process()?, Signal::KILL)?;
    jailed.ends(SOON)?;
    let ended = jailed.monitor.wait(SOON)?;
    ensure!(ended.status.code() == Some(1), "{ended:?}");
    let records = records(&ended.errors)?;
    let causes: Vec<_> = records.iter().filter_map(|record| record.get("cause")).collect();
    ensure!(causes == ["signal", "start"], "{records:?}");
    let detail = records.last().and_then(|record| record.get("detail")?.as_str());
    ensure!(
        detail.is_some_and(|detail| detail.contains("dev/urandom")),
        "{records:?}"
    );
    Ok(())
}

pub(super) fn a_daemon_tells_of_its_start(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=10,count=1000000");
    for more in [&[][..], &["--new-pid-ns"][..]] {
        let jail = Jail::new(&context.environment)?;
        let log = jail.directory().join("test-deaths");
        let (base, id, root) = (jail.base().to_owned(), jail.id.clone(), jail.root());
        let record = log.display().to_string();
        let flags = ["--daemonize", "--supervise", "--cleanup", "--record", &record];
        let jailed = jail
            .flags(flags)
            .flags(more.iter().copied())
            .machine(&machine)?
            .spawn()?;
        let monitor = {
            let mut jailed = jailed;
            jailed.ends(SOON)?;
            // The monitor is there now, and the file that says which it is.
            let monitor = jailed.process()?;
            let input = fs::read_link(format!("/proc/{}/fd/0", monitor.0))?;
            ensure!(input == std::path::Path::new("/dev/null"), "{}", input.display());
            kill(monitor, Signal::KILL)?;
            vanishes(&base, &id)?;
            let records = records(&fs::read_to_string(&log)?)?;
            ensure!(
                matches!(records.as_slice(), [record] if record.get("signal") == Some(&"SIGKILL".into())),
                "{records:?}"
            );
            let ended = jailed.monitor.wait(SOON)?;
            ensure!(ended.status.code() == Some(0), "{ended:?}");
            monitor
        };
        ensure!(!monitor.is_there() && !root.exists(), "it is still there");
    }
    // One that does not start says so, and with what status.
    let jail = Jail::new(&context.environment)?;
    fs::create_dir_all(jail.root().join("dev/kvm"))?;
    let ended = jail.flags(["--daemonize"]).spawn()?.monitor.wait(SOON)?;
    ensure!(
        ended.status.code() == Some(1) && ended.errors.contains("dev/kvm"),
        "{ended:?}"
    );
    // The second time its session is one that its PID namespace does not know.
    for way in [&[][..], &["unshare", "--pid", "--fork", "--mount-proc"][..]] {
        let flags = ["--daemonize", "--resource-limit", "no-file=99999999999"];
        let jail = Jail::new(&context.environment)?.flags(flags);
        let ended = jail.by_way_of(way.iter().copied()).spawn()?.monitor.wait(SOON)?;
        ensure!(
            ended.status.code() == Some(1) && ended.errors.contains("no-file=99999999999"),
            "{ended:?}"
        );
    }
    Ok(())
}
