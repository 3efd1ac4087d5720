//! Waiting for a device: by looking, or idle until it interrupts; never for ever.

use instrument::cmdline::{ArgumentError, Command};
use instrument::time::Clock;

use crate::virtio::Error;
use crate::virtio::blk::{Finished, Lane};
use crate::virtio::mmio::Transport;
use crate::virtio::queue::Queue;
use crate::{cpu, interrupts};

/// How to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Look at the used ring until it moves.
    Poll,
    /// Idle until the device interrupts.
    Interrupt,
}

/// A way to wait, with its limit.
#[derive(Clone, Copy, Debug)]
pub struct Wait {
    mode: Mode,
    clock: Clock,
    limit_seconds: u64,
}

/// Looks between two looks at the clock.
const LOOKS: u32 = 1024;

impl Mode {
    /// What a command's `wait=` says.
    pub fn of(command: &Command<'static>) -> Result<Self, ArgumentError<'static>> {
        match command.text("wait") {
            None | Some("poll") => Ok(Self::Poll),
            Some("irq") => Ok(Self::Interrupt),
            Some(value) => Err(ArgumentError::Impossible {
                key: "wait",
                value,
                choices: "poll, irq",
            }),
        }
    }
}

impl Wait {
    /// Waits at most `limit_seconds`; 0 is no limit.
    pub const fn new(mode: Mode, clock: Clock, limit_seconds: u64) -> Self {
        Self {
            mode,
            clock,
            limit_seconds,
        }
    }

    /// Has the device interrupt the first `cpus` vCPUs where that is how to wait. This vCPU takes interrupts then.
    pub fn prepare(&self, transport: &Transport, cpus: usize) -> Result<(), Error> {
        if self.mode == Mode::Interrupt {
            if transport.irq >= interrupts::INPUTS {
                return Err(Error::NoInterrupt { irq: transport.irq });
            }
            interrupts::enable(0);
            interrupts::route(transport.irq, cpus);
            // A line that is still up from before would never rise again.
            transport.acknowledge_interrupt();
        }
        Ok(())
    }

    /// How often the device has interrupted so far; 0 where its interrupts are not asked for.
    pub fn interrupts(&self, transport: &Transport) -> u64 {
        if self.mode == Mode::Interrupt {
            interrupts::count(transport.irq as usize)
        } else {
            0
        }
    }

    /// Waits until a request of `lane` came back.
    pub fn finished(&self, lane: &mut Lane) -> Result<Finished, Error> {
        let start = cpu::ticks();
        loop {
            if let Some(finished) = lane.poll()? {
                return Ok(finished);
            }
            self.pause(&mut lane.queue, start)?;
        }
    }

    /// Waits for a while, or until `queue` has something; `start` is when the waiting began.
    pub fn pause(&self, queue: &mut Queue, start: u64) -> Result<(), Error> {
        match self.mode {
            Mode::Poll => {
                for _ in 0..LOOKS {
                    if queue.has_used() {
                        return Ok(());
                    }
                    cpu::relax();
                }
            }
            Mode::Interrupt => idle(queue),
        }
        self.check(queue, start)
    }

    fn check(&self, queue: &Queue, start: u64) -> Result<(), Error> {
        let limit = self.clock.ticks(self.limit_seconds.saturating_mul(1000));
        if self.limit_seconds == 0 || queue.has_used() || cpu::ticks().wrapping_sub(start) < limit {
            return Ok(());
        }
        if queue.transport().needs_reset() {
            return Err(Error::NeedsReset);
        }
        Err(Error::TimedOut {
            seconds: self.limit_seconds,
        })
    }
}

/// Idles until the device interrupts, unless it has something already; acknowledges what it interrupted for.
///
/// The line rises only after it fell. So no interrupt may stay unacknowledged while this vCPU idles, and what came
/// before an acknowledgement is looked for after it.
fn idle(queue: &mut Queue) {
    let line = queue.transport().irq as usize;
    queue.arm();
    if !queue.has_used() {
        cpu::idle_while(interrupts::counter(line), queue.interrupts_seen);
    }
    let count = interrupts::count(line);
    if count != queue.interrupts_seen {
        queue.interrupts_seen = count;
        queue.transport().acknowledge_interrupt();
    }
    queue.silence();
}
