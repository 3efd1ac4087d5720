//! `spin`, `tick` and `vcpus`: time passes, and the guest notices.

use core::sync::atomic::{AtomicU64, Ordering};

use instrument::cmdline::{ArgumentError, Command};
use instrument::time::Clock;
use instrument::width::size;

use super::Failure;
use crate::machine::Machine;
use crate::tables::CPUS_MAX;
use crate::{cpu, say, smp};

/// Computes nothing, for a time or for ever, without leaving the CPU.
pub fn spin(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["seconds"])?;
    match command.text("seconds") {
        None => Err(ArgumentError::Impossible {
            key: "seconds",
            value: "",
            choices: "a number, forever",
        }
        .into()),
        Some("forever") => loop {
            cpu::relax();
        },
        Some(_) => {
            let seconds = command.number("seconds", 0)?;
            pass(machine.clock()?, cpu::ticks(), seconds.saturating_mul(1000));
            Ok(())
        }
    }
}

/// Prints a number at intervals.
pub fn tick(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["ms", "count"])?;
    let clock = machine.clock()?;
    let milliseconds = command.number("ms", 1000)?;
    let count = command.number("count", 10)?;
    for number in 0..count {
        let start = cpu::ticks();
        say!("tick: n={number} tsc={start}\n");
        pass(clock, start, milliseconds);
    }
    Ok(())
}

/// Starts the other vCPUs and has each count: natively, and all at the same time.
pub fn vcpus(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["count", "ms"])?;
    let clock = machine.clock()?;
    let count = size(command.within("count", 2, 1..=CPUS_MAX as u64, "1 to 32")?);
    let milliseconds = command.number("ms", 100)?;
    let meeting = AtomicU64::new(0);
    let mut counters = [const { None }; CPUS_MAX];
    let counters = counters.get_mut(..count).unwrap_or_default();
    for counter in counters.iter_mut() {
        *counter = Some(Counter {
            meeting: &meeting,
            all: count as u64,
            clock,
            milliseconds,
            turns: 0,
        });
    }
    smp::each(counters, clock, |counter| {
        if let Some(counter) = counter {
            counter.run();
        }
    })?;
    say!("vcpus: count={count} turns=");
    for (index, counter) in counters.iter().flatten().enumerate() {
        say!("{}{}", if index == 0 { "" } else { "," }, counter.turns);
    }
    say!("\n");
    let all_ran = counters.iter().flatten().all(|counter| counter.turns > 0);
    if all_ran {
        Ok(())
    } else {
        Err(Failure::Check("a vCPU did not count"))
    }
}

/// What one vCPU counts.
struct Counter<'a> {
    /// How many have come: nobody begins before all are here.
    meeting: &'a AtomicU64,
    all: u64,
    clock: Clock,
    milliseconds: u64,
    turns: u64,
}

impl Counter<'_> {
    fn run(&mut self) {
        self.meeting.fetch_add(1, Ordering::AcqRel);
        while self.meeting.load(Ordering::Acquire) < self.all {
            cpu::relax();
        }
        let start = cpu::ticks();
        while cpu::ticks().saturating_sub(start) < self.clock.ticks(self.milliseconds) {
            self.turns += 1;
        }
    }
}

/// Waits until so much time has passed since `start`.
pub fn pass(clock: Clock, start: u64, milliseconds: u64) {
    while cpu::ticks().saturating_sub(start) < clock.ticks(milliseconds) {
        cpu::relax();
    }
}
