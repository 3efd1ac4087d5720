//! A disk whose image is on its way to another owner: it has no session, and its fence is down.
//!
//! ```text
//!   Serving ──Yield──► Yielding ──closed──► Yielded ──TakeBack──► Resting ► Connecting ► BringingUp ► … ► Serving
//!                       ▲  └── the connection breaks: a later one has the server forget what was open ──┐
//!                       └───────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Its ordinary recovery is off from the Yield on: nothing opens the file again but a TakeBack.

use crate::lease::Phase;
use crate::metrics::LeaseState;
use crate::reactor::Submit;

use super::super::bringup::Stop;
use super::super::fence::Tenure;
use super::super::handover;
use super::super::procedure::Procedure;
use super::{Disk, State};

/// Where the fence is in a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fence {
    /// It is up, or is put up again whenever it was lost.
    Up,
    /// It is down, or is being taken down.
    Down,
    /// It was down, and is to be up.
    Returns,
}

impl Disk {
    /// Takes the fence down, when nothing else is under way and nothing is kept that the server may forget.
    pub(super) fn yield_fence(&mut self, place: usize, io: &mut dyn Submit) {
        let others = self.flights.under_way() > 1 || self.emptying.is_some();
        // It ends when the disk is `Yielded`.
        self.flights.queue(place);
        if others {
            return;
        }
        if !self.retained.is_empty() {
            return self.empty_cache(io);
        }
        self.fence = Fence::Down;
        let (plan, file) = (self.plan.clone(), self.file.clone());
        self.begin_yielding(Procedure::new(|port| handover::take_down(port, plan, file)), io);
    }

    /// Goes on with that on another connection.
    pub(super) fn yield_again(&mut self, io: &mut dyn Submit) {
        let plan = self.plan.clone();
        self.begin_yielding(Procedure::new(|port| handover::take_down_again(port, plan)), io);
    }

    fn begin_yielding(&mut self, procedure: Procedure<Result<(), Stop>>, io: &mut dyn Submit) {
        self.state = State::Yielding(procedure);
        self.step(None, io);
    }

    /// The connection on which the fence came down is closed.
    pub(super) fn forget_session(&mut self) {
        let none_is_under_way = self.client.give_up();
        self.abandoned(none_is_under_way);
        (self.is_doubtful, self.is_spent, self.is_tangled) = (false, false, false);
        self.unserved_since = None;
        self.tell_of_lease(LeaseState::Pending);
    }

    /// Tells whoever asked that the fence is down, and begins to put it up where somebody asks for that.
    pub(super) fn has_yielded(&mut self, io: &mut dyn Submit) {
        if self.flights.has_yielded(io.now()) {
            self.tenure = self.standing.record().map(Tenure::of);
            self.fence = Fence::Returns;
            self.unserved_since = Some(io.now());
            self.state = State::Resting(io.now());
        }
    }

    /// Whether the lease is taken and not started: nobody else may be kept waiting for what is open here.
    pub(super) fn is_taken(&self) -> bool {
        let tenure = self.tenure.as_ref();
        tenure.is_some_and(|tenure| tenure.record.phase == Phase::Taken)
    }
}
