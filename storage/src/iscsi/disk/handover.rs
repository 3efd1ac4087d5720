//! A disk whose unit is on its way to another owner: it has no session. The reservation stays where it is until the other has
//! taken it.
//!
//! ```text
//!   Serving ──Yield──► Yielding ──logged out──► Yielded ──TakeBack──► Resting ► Connecting ► BringingUp ► … ► Serving
//! ```
//!
//! Its ordinary recovery is off from the Yield on: nothing logs in again but a TakeBack.

use crate::reactor::Submit;

use super::super::procedure::Procedure;
use super::{Disk, State};

impl Disk {
    /// Leaves the target, when nothing else is under way and nothing is kept that the unit may forget.
    pub(super) fn yield_fence(&mut self, place: usize, io: &mut dyn Submit) {
        let others = self.flights.under_way() > 1 || self.emptying.is_some();
        // It ends when the disk is `Yielded`.
        self.flights.queue(place);
        if others {
            return;
        }
        if !self.retained.is_empty() {
            return self.empty_cache();
        }
        self.is_yielded = true;
        self.state = State::Yielding(Procedure::new(|port| async move { port.logout().await }));
        self.step(None, io);
    }

    /// Tells whoever asked that the disk has left its target, and begins to go back where somebody asks for that.
    pub(super) fn has_yielded(&mut self, io: &mut dyn Submit) {
        if self.flights.has_yielded(io.now()) {
            if let Some(tenure) = &mut self.tenure {
                (tenure.record, tenure.begun) = (self.standing.record(), None);
            }
            self.is_yielded = false;
            self.unserved_since = Some(io.now());
            self.state = State::Resting(io.now());
        }
    }
}
