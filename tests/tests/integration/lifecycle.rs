//! Machines start, pause, go on and end; what they leave is nothing.

use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image, run};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::process::{processes_with, sockets_with};
use coracle_tests::{Outcome, ensure};
use serde_json::json;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "start_and_stop_leave_nothing",
        need: Need::Kvm,
        run: start_and_stop_leave_nothing,
    },
    Case {
        name: "a_paused_machine_stands_still",
        need: Need::Kvm,
        run: a_paused_machine_stands_still,
    },
    Case {
        name: "a_machine_can_be_paused_as_soon_as_it_runs",
        need: Need::Kvm,
        run: a_pause_follows_the_start,
    },
    Case {
        name: "pauses_leave_nothing",
        need: Need::Kvm,
        run: pauses_leave_nothing,
    },
    Case {
        name: "vcpus_run_at_the_same_time",
        need: Need::Kvm,
        run: vcpus_run_at_the_same_time,
    },
    Case {
        name: "the_state_is_told",
        need: Need::Kvm,
        run: the_state_is_told,
    },
];

const SOON: Duration = Duration::from_secs(20);

/// Starts and stops machines by every way there is; `soak` does it a thousand times.
pub(crate) fn start_and_stop_leave_nothing(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for cycle in 0..context.count(20, 1000) {
        let launch = Launch::new(&context.environment)?;
        let directory = launch.directory().to_owned();
        let name = directory.display().to_string();
        let disk = directory.join("test-disk");
        blank_image(&disk, 1)?;
        let way = seed.below(4);
        one_life(context, launch, &disk, way)
            .map_err(|e| format!("cycle {cycle}, way {way}: {}", text(&e)))?;
        ensure!(
            !directory.exists(),
            "cycle {cycle}, way {way}: the harness removes its directory"
        );
        ensure!(
            processes_with(&name)?.is_empty(),
            "cycle {cycle}, way {way}: a process is left"
        );
        ensure!(
            sockets_with(&name)? == 0,
            "cycle {cycle}, way {way}: a socket is left"
        );
    }
    Ok(())
}

/// One machine from its start to its end.
fn one_life(context: &Context, launch: Launch, disk: &std::path::Path, way: u64) -> Outcome {
    let machine = |words| {
        Machine::unikernel(&context.environment, words)
            .disk("d", disk)
            .part("entropy", json!({}))
    };
    match way {
        // From a file, to the guest's own end.
        0 => run(launch, &machine("do=hello do=exit:status=5"), SOON)?.expect(5),
        // By the API, to the guest's own end.
        1 => {
            let monitor = launch.start()?;
            monitor.configure(&machine("do=hello end=reset").config())?;
            monitor.start_instance()?;
            monitor.wait(SOON)?.expect(0)
        }
        // Stopped by a signal while paused.
        2 => {
            let monitor = spinning(launch, &machine("do=hello do=spin:seconds=forever"))?;
            monitor.set_state("Paused")?;
            monitor.signal(rustix::process::Signal::TERM)?;
            monitor.wait(SOON)?.expect(143)
        }
        // Stopped before it was started.
        _ => {
            let monitor = launch.start()?;
            monitor.configure(&machine("do=hello").config())?;
            monitor.signal(rustix::process::Signal::TERM)?;
            monitor.wait(SOON)?.expect(143)
        }
    }
}

fn a_paused_machine_stands_still(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=10,count=1000000");
    let monitor = launch.config(&machine.config())?.start()?;
    monitor.console.wait_for("tick: n=3", SOON)?;
    for _ in 0..context.count(3, 100) {
        monitor.set_state("Paused")?;
        // Bytes that were on their way arrive.
        std::thread::sleep(Duration::from_millis(100));
        let (said, cpu) = (monitor.console.text().len(), monitor.process().cpu_time()?);
        std::thread::sleep(Duration::from_millis(300));
        ensure!(monitor.console.text().len() == said, "a paused guest has spoken");
        let spent = monitor.process().cpu_time()? - cpu;
        ensure!(
            spent <= Duration::from_millis(50),
            "a paused machine has used {spent:?}"
        );
        monitor.set_state("Resumed")?;
        monitor
            .console
            .wait_until("more ticks", SOON, |text| (text.len() > said + 60).then_some(()))?;
    }
    Ok(())
}

fn a_pause_follows_the_start(context: &Context) -> Outcome {
    for _ in 0..context.count(10, 500) {
        let launch = Launch::new(&context.environment)?;
        let monitor = launch.start()?;
        let machine = Machine::unikernel(&context.environment, "do=hello do=spin:seconds=forever").vcpus(2);
        monitor.configure(&machine.config())?;
        let mut connection = monitor.connect()?;
        for (method, path, body) in [
            ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#),
            ("PATCH", "/vm", r#"{"state":"Paused"}"#),
            ("PATCH", "/vm", r#"{"state":"Resumed"}"#),
        ] {
            let answer = connection.request(method, path, Some(body))?;
            ensure!(
                answer.status == 204,
                "{method} {path} {body}: {} {}",
                answer.status,
                answer.body
            );
        }
        monitor.console.wait_for("hello", SOON)?;
    }
    Ok(())
}

fn pauses_leave_nothing(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let disk = launch.directory().join("test-disk");
    blank_image(&disk, 64)?;
    let words = "do=hello do=load:mode=randwrite,bs=4096,depth=8,seconds=1000";
    let machine = Machine::unikernel(&context.environment, words).drive(json!({
        "drive_id": "d", "path_on_host": disk, "is_root_device": false, "cache_type": "Writeback"
    }));
    let monitor = spinning(launch, &machine)?;
    let cycle = |monitor: &Monitor| {
        monitor
            .set_state("Paused")
            .and_then(|()| monitor.set_state("Resumed"))
    };
    for _ in 0..5 {
        cycle(&monitor)?;
    }
    let before = monitor.process().settled_holdings()?;
    for _ in 0..context.count(100, 10_000) {
        cycle(&monitor)?;
    }
    let after = monitor.process().settled_holdings()?;
    ensure!(
        after.descriptors <= before.descriptors,
        "before {before:?}, after {after:?}"
    );
    ensure!(
        after.threads == before.threads,
        "before {before:?}, after {after:?}"
    );
    ensure!(
        after.resident_kib < before.resident_kib + 4096,
        "before {before:?}, after {after:?}"
    );
    Ok(())
}

fn vcpus_run_at_the_same_time(context: &Context) -> Outcome {
    for count in [1, 2, 3, 8, 32]
        .into_iter()
        .take(if context.count(0, 1) == 1 { 5 } else { 3 })
    {
        let launch = Launch::new(&context.environment)?;
        let machine =
            Machine::unikernel(&context.environment, &format!("do=vcpus:count={count},ms=50")).vcpus(count);
        let ended = run(launch, &machine, SOON * 2)?;
        ended
            .expect(0)
            .map_err(|e| format!("{count} vCPUs: {}", text(&e)))?;
        ensure!(
            ended.console.contains(&format!("vcpus: count={count} ")),
            "{}",
            ended.console
        );
    }
    Ok(())
}

fn the_state_is_told(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?.arguments(["--id", "told"]);
    let monitor = launch.start()?;
    let state = |expected: &str| -> Outcome {
        let info = monitor.must("GET", "/", None)?.json()?;
        ensure!(
            info.get("state") == Some(&json!(expected)),
            "{info} is not {expected}"
        );
        ensure!(info.get("id") == Some(&json!("told")), "{info}");
        Ok(())
    };
    state("Not started")?;
    monitor.configure(&Machine::unikernel(&context.environment, "do=spin:seconds=forever").config())?;
    monitor.start_instance()?;
    state("Running")?;
    for _ in 0..2 {
        monitor.set_state("Paused")?;
        state("Paused")?;
    }
    monitor.set_state("Resumed")?;
    state("Running")
}

/// A machine that has said hello and runs on.
fn spinning(launch: Launch, machine: &Machine) -> Outcome<Monitor> {
    let monitor = launch.start()?;
    monitor.configure(&machine.config())?;
    monitor.start_instance()?;
    monitor.console.wait_for("hello", SOON)?;
    Ok(monitor)
}

fn text(failed: &libtest_mimic::Failed) -> &str {
    coracle_tests::case::text(failed)
}
