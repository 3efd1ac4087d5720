//! Signals that others send, block or ignore: none of them keeps a machine from running, pausing or ending.

use std::process::Command;
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::Machine;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_signal_from_somebody_else_stops_no_vcpu",
        need: Need::Kvm,
        run: a_signal_from_somebody_else_stops_no_vcpu,
    },
    Case {
        name: "signals_that_the_parent_had_blocked_do_their_work",
        need: Need::Kvm,
        run: signals_that_the_parent_had_blocked_do_their_work,
    },
    Case {
        name: "a_hang_up_stops_a_machine_unless_its_parent_ignores_it",
        need: Need::Kvm,
        run: a_hang_up_stops_a_machine_unless_its_parent_ignores_it,
    },
];

const SOON: Duration = Duration::from_secs(20);
/// The signal that kicks a vCPU: SIGRTMIN, which the C library sets to 34.
const KICK: &str = "-34";

/// 128 and the number of the signal.
const TERMINATED: u8 = 143;
const HUNG_UP: u8 = 129;

fn ticking(context: &Context, launch: Launch) -> Outcome<Monitor> {
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=10,count=1000000");
    let monitor = launch.config(&machine.config())?.start()?;
    monitor.console.wait_for("tick: n=3", SOON)?;
    Ok(monitor)
}

fn goes_on(monitor: &Monitor) -> Outcome {
    let said = monitor.console.text().len();
    monitor
        .console
        .wait_until("more ticks", SOON, |text| (text.len() > said + 200).then_some(()))
}

fn a_signal_from_somebody_else_stops_no_vcpu(context: &Context) -> Outcome {
    let monitor = ticking(context, Launch::new(&context.environment)?)?;
    let thread = monitor.process().thread_named("vcpu 0")?;
    for _ in 0..20 {
        // A thread's own number makes the kernel prefer it among the threads of its process: a vCPU, and the first.
        for whose in [thread, monitor.process().0] {
            let sent = Command::new("kill").arg(KICK).arg(whose.to_string()).status()?;
            ensure!(sent.success(), "kill: {sent}");
        }
    }
    goes_on(&monitor)?;
    monitor.set_state("Paused")?;
    monitor.set_state("Resumed")?;
    goes_on(&monitor)
}

fn signals_that_the_parent_had_blocked_do_their_work(context: &Context) -> Outcome {
    // Every signal, those of the terminal and the vCPUs' kick among them.
    let launch = Launch::new(&context.environment)?.by_way_of(["env", "--block-signal"]);
    let monitor = ticking(context, launch)?;
    monitor.set_state("Paused")?;
    monitor.set_state("Resumed")?;
    goes_on(&monitor)?;
    monitor.signal(Signal::TERM)?;
    monitor.wait(SOON)?.expect(TERMINATED)
}

fn a_hang_up_stops_a_machine_unless_its_parent_ignores_it(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?.by_way_of(["env", "--ignore-signal=HUP"]);
    let monitor = ticking(context, launch)?;
    monitor.signal(Signal::HUP)?;
    goes_on(&monitor)?;
    monitor.signal(Signal::TERM)?;
    monitor.wait(SOON)?.expect(TERMINATED)?;

    let monitor = ticking(context, Launch::new(&context.environment)?)?;
    monitor.signal(Signal::HUP)?;
    monitor.wait(SOON)?.expect(HUNG_UP)
}
