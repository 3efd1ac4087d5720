//! Each way in which a machine can end has a status of its own and one line that says why.

use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, run};
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "the_exit_device_gives_the_process_its_status",
        need: Need::Kvm,
        run: the_exit_device_gives_the_process_its_status,
    },
    Case {
        name: "power_off_ends_with_status_0",
        need: Need::Kvm,
        run: |context| ends(context, "do=hello end=poweroff", 0, "powered off"),
    },
    Case {
        name: "a_reset_ends_with_status_0",
        need: Need::Kvm,
        run: |context| ends(context, "do=hello end=reset", 0, "reset"),
    },
    Case {
        name: "a_triple_fault_ends_with_its_own_status",
        need: Need::Kvm,
        run: |context| ends(context, "do=hello end=triple", TRIPLE_FAULT, "triple fault"),
    },
    Case {
        name: "an_emulation_failure_names_rip_and_bytes",
        need: Need::Kvm,
        run: an_emulation_failure_names_rip_and_bytes,
    },
    Case {
        name: "a_guest_panic_is_the_guests_status",
        need: Need::Kvm,
        run: a_guest_panic_is_the_guests_status,
    },
    Case {
        name: "a_process_without_standard_streams_writes_to_no_file_in_their_stead",
        need: Need::Kvm,
        run: streams_that_are_not_there_are_nothing,
    },
    Case {
        name: "a_signal_ends_a_running_machine_cleanly",
        need: Need::Kvm,
        run: a_signal_ends_it_cleanly,
    },
];

/// The README's table of exit statuses.
const TRIPLE_FAULT: u8 = 160;
const INTERNAL_ERROR: u8 = 161;
const END_WITHIN: Duration = Duration::from_secs(30);

/// The lowest free descriptor is what the next file gets, and 2 is where complaints go.
fn streams_that_are_not_there_are_nothing(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=10,count=1000000");
    let closed = ["sh", "-c", "exec \"$@\" <&- >&- 2>&-", "sh"];
    let launch = Launch::new(&context.environment)?.by_way_of(closed);
    let monitor = launch.config(&machine.config())?.start()?;
    for number in 0..=2 {
        let link = format!("/proc/{}/fd/{number}", monitor.process().0);
        let target = std::fs::read_link(&link)?;
        ensure!(target.ends_with("null"), "{link}: {}", target.display());
    }
    Ok(())
}

fn the_exit_device_gives_the_process_its_status(context: &Context) -> Outcome {
    for status in [0, 1, 7, 130, 255] {
        ends(
            context,
            &format!("do=exit:status={status}"),
            status,
            &format!("status {status}"),
        )?;
    }
    Ok(())
}

fn an_emulation_failure_names_rip_and_bytes(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let machine = Machine::unikernel(&context.environment, "do=fault:kind=emulation");
    let ended = run(launch, &machine, END_WITHIN)?;
    if ended.console.contains("the host executed the instruction") {
        // Nothing is emulated on ordinary hardware, so nothing can fail to be.
        return ended.expect(0);
    }
    ended.expect(INTERNAL_ERROR)?;
    // POPCNT is f3 0f b8.
    for fact in ["RIP 0x", "f3 0f b8"] {
        ensure!(ended.errors.contains(fact), "no '{fact}' in: {}", ended.errors);
    }
    Ok(())
}

fn a_guest_panic_is_the_guests_status(context: &Context) -> Outcome {
    for kind in ["gp", "pf", "ud", "de", "stack"] {
        let launch = Launch::new(&context.environment)?;
        let machine = Machine::unikernel(&context.environment, &format!("do=fault:kind={kind}"));
        run(launch, &machine, END_WITHIN)?.expect(101)?;
    }
    Ok(())
}

fn a_signal_ends_it_cleanly(context: &Context) -> Outcome {
    use rustix::process::Signal;
    for (signal, status) in [(Signal::HUP, 129), (Signal::INT, 130), (Signal::TERM, 143)] {
        let launch = Launch::new(&context.environment)?;
        let machine = Machine::unikernel(&context.environment, "do=hello do=spin:seconds=forever");
        let monitor = launch.config(&machine.config())?.start()?;
        monitor.console.wait_for("hello", END_WITHIN)?;
        monitor.signal(signal)?;
        let ended = monitor.wait(END_WITHIN)?;
        ensure!(
            ended.status.code() == Some(status),
            "{signal:?}: {:?}: {}",
            ended.status,
            ended.errors
        );
        ensure!(
            ended.left_behind.is_empty(),
            "left behind: {:?}",
            ended.left_behind
        );
    }
    Ok(())
}

fn ends(context: &Context, words: &str, status: u8, reason: &str) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let ended = run(
        launch,
        &Machine::unikernel(&context.environment, words),
        END_WITHIN,
    )?;
    ended
        .expect(status)
        .map_err(|e| format!("{words}: {}", e.message().unwrap_or_default()))?;
    let lines: Vec<&str> = ended
        .errors
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    ensure!(
        lines.len() == 1,
        "{words}: not one line that says why, but {lines:?}"
    );
    ensure!(
        ended.errors.contains(reason),
        "{words}: no '{reason}' in: {}",
        ended.errors
    );
    Ok(())
}
