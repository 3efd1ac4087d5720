//! The clock of a simulated world.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A time that passes only when somebody says so; a clone is the same clock.
#[derive(Clone, Debug)]
pub struct Clock(Rc<Cell<Instant>>);

impl Default for Clock {
    fn default() -> Self {
        Self(Rc::new(Cell::new(Instant::now())))
    }
}

impl Clock {
    /// The time now.
    pub fn now(&self) -> Instant {
        self.0.get()
    }

    /// Lets `time` pass.
    pub fn pass(&self, time: Duration) {
        self.0.set(self.now() + time);
    }

    /// Lets time pass until `instant`, if that is still to come.
    pub fn pass_to(&self, instant: Instant) {
        self.0.set(self.now().max(instant));
    }
}
