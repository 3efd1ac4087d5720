//! The pairs of queues of a device, of which the driver uses the first ones (5.1.6.5.5), and the queues of its tap.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::control::Link;
use super::tap::TapQueue;
use crate::virtio::service::Nudge;

/// What the workers of one device share, each of which serves a pair.
#[derive(Debug)]
pub(super) struct Pairs {
    pairs: Vec<Pair>,
    link: Arc<Link>,
    /// How each of the workers is woken, when they are there.
    nudges: OnceLock<Vec<Nudge>>,
}

#[derive(Debug)]
struct Pair {
    tap: TapQueue,
    /// Held by who moves frames to the guest, and by who attaches the queue; whether it is attached.
    turn: Mutex<bool>,
}

/// A worker moves frames of its pair to the guest, which is used for as long as this is held.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    _held: Option<MutexGuard<'a, bool>>,
}

impl Pairs {
    /// Pairs for all queues of a tap.
    pub(super) fn new(queues: Vec<TapQueue>, link: Arc<Link>) -> Self {
        let pair = |tap| Pair {
            tap,
            turn: Mutex::new(true),
        };
        Self {
            pairs: queues.into_iter().map(pair).collect(),
            link,
            nudges: OnceLock::new(),
        }
    }

    /// Takes what wakes each worker; the first time counts.
    pub(super) fn wake_by(&self, nudges: Vec<Nudge>) {
        let _ = self.nudges.set(nudges);
    }

    /// The queue of the tap that goes with pair `number`, which is one of those.
    pub(super) fn tap(&self, number: usize) -> &TapQueue {
        &self.pairs.get(number).expect("each worker has a pair").tap
    }

    /// The right to move frames of a pair to the guest, unless it is not used. The first one always is.
    pub(super) fn turn(&self, number: usize) -> Option<Turn<'_>> {
        if number == 0 {
            return Some(Turn { _held: None });
        }
        let is_attached = locked(self.pairs.get(number)?);
        let is_used = *is_attached && number < self.link.pairs();
        is_used.then_some(Turn {
            _held: Some(is_attached),
        })
    }

    /// Has so many pairs be used. When it returns, the others have no frame on its way to the guest, and give it none. Only the
    /// worker of the first pair does this.
    ///
    /// # Errors
    ///
    /// The kernel's; then as many are used as before.
    pub(super) fn set_used(&self, used: usize) -> io::Result<()> {
        let before = self.link.pairs();
        self.link.set_pairs(used.min(before));
        let attached = self.attach(used);
        if attached.is_err() {
            // Frames would wait for ever in a queue that nobody reads. What cannot be undone was complained of.
            let _ = self.attach(before);
        }
        self.link.set_pairs(if attached.is_ok() { used } else { before });
        let others = self.nudges.get().into_iter().flatten().skip(1);
        others.for_each(Nudge::nudge);
        attached
    }

    /// Attaches the queues of the first so many pairs, and only those; of those that cannot be, says what is wrong with one.
    fn attach(&self, used: usize) -> io::Result<()> {
        let mut done = Ok(());
        for (number, pair) in self.pairs.iter().enumerate().skip(1) {
            let mut is_attached = locked(pair);
            let wish = number < used;
            if *is_attached == wish {
                continue;
            }
            match pair.tap.attach(wish) {
                Ok(()) => *is_attached = wish,
                Err(error) => done = Err(error),
            }
        }
        done
    }
}

/// A worker that panics ends the process; what is locked says what the kernel has done.
fn locked(pair: &Pair) -> MutexGuard<'_, bool> {
    pair.turn.lock().unwrap_or_else(PoisonError::into_inner)
}
