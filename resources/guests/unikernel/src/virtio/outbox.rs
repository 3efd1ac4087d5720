//! A queue by which the guest sends, with a place for each thing on its way.

use instrument::width::low16;

use super::Error;
use super::queue::{Part, Queue};
use crate::cpu;
use crate::wait::Wait;

/// How many things can be on their way.
pub const PLACES: u16 = 32;

const ALL: u64 = (1 << PLACES) - 1;

/// The queue, and which of its slots the device does not have.
#[derive(Debug)]
pub struct Outbox {
    queue: Queue,
    free: u64,
}

impl Outbox {
    /// A queue that was just set up.
    pub const fn new(queue: Queue) -> Self {
        Self { queue, free: ALL }
    }

    /// A place, if there is one.
    pub fn place(&mut self) -> Result<Option<u16>, Error> {
        while let Some(used) = self.queue.poll()? {
            self.free |= 1 << used.slot;
        }
        let place = low16(u64::from(self.free.trailing_zeros()));
        Ok((place < PLACES).then_some(place))
    }

    /// Sends what is in a place; the device learns of it at the next [`Self::kick`].
    pub fn send(&mut self, place: u16, parts: &[Part]) {
        self.free &= !(1 << place);
        self.queue.submit(place, parts);
    }

    /// Tells the device of all that was sent.
    pub fn kick(&mut self) {
        self.queue.kick();
    }

    /// Waits until all that was sent is on its way.
    pub fn flush(&mut self, wait: &Wait) -> Result<(), Error> {
        let start = cpu::ticks();
        while self.free != ALL {
            wait.pause(&mut self.queue, start)?;
            self.place()?;
        }
        Ok(())
    }
}
