//! The contract that every kind of image fulfils.

use std::sync::Arc;
use std::time::Instant;

use crate::metrics::SessionMetrics;
use crate::reactor::{Event, ImageFile, Reach, Submit};
use crate::request::{Completion, Request};

/// What an image tells its device about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes; a multiple of 512.
    pub size_bytes: u64,
    /// Smallest unit the medium reads and writes without a read-modify-write, in bytes; a power of two from 512.
    pub logical_block_bytes: u32,
    /// Unit the medium likes best, in bytes; a multiple of the logical block.
    pub physical_block_bytes: u32,
    /// Whether writes are refused.
    pub access: Access,
    /// Whether DISCARD frees space.
    pub discard: Discard,
}

/// Whether an image may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads only.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// Whether an image can give space back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// It can.
    Supported,
    /// A discard completes without effect.
    Ignored,
}

/// What became of a request or an event just now.
#[derive(Debug)]
pub enum Step {
    /// Work goes on; a later event will end it.
    Pending,
    /// A request ended.
    Done(Completion),
    /// There was no room to start: the request comes back untouched. Offer it again after the next event.
    Busy(Request),
}

/// One image: a state machine that never calls the kernel.
///
/// ```text
///   start(request) ──► in flight ──resume(event)──► … ──► Done(completion), once per request
///        └──► Busy(request): not accepted          └──► Done at once (an error, nothing to do)
/// ```
///
/// The device has checked that a range lies within `geometry().size_bytes` and that a read-only
/// image is not written; the backend checks again, and refuses by [`crate::request::Failure`].
pub trait Backend: Send {
    /// The shape of the image now.
    fn geometry(&self) -> Geometry;

    /// The descriptors that the operations of this backend name, in the order of their [`crate::reactor::FileSlot`]s.
    fn files(&self) -> Vec<ImageFile>;

    /// Takes one request on.
    fn start(&mut self, request: Request, io: &mut dyn Submit) -> Step;

    /// Takes the end of one of this backend's operations.
    fn resume(&mut self, event: Event, io: &mut dyn Submit) -> Step;

    /// The same image once more, for a queue that another thread serves: both see one size and one
    /// content. `None` if one thread has to serve all queues, because the image has a state of its own
    /// (an overlay's bitmap, a session). The other's operations name [`Self::files`] as well.
    fn fork(&self) -> Option<Box<dyn Backend>>;

    /// A further request that has ended: one event may end several (all flushes that waited for one sync).
    /// Asked after each [`Self::start`] and [`Self::resume`] until there is none.
    fn next_completion(&mut self) -> Option<Completion> {
        None
    }

    /// Whether the image asks for a last [`crate::request::Operation::Flush`] before it is dropped, because
    /// it holds back what its file needs even if the guest never flushes (an overlay's bitmap).
    fn flushes_at_end(&self) -> bool {
        false
    }

    /// How many requests were accepted and have not completed. Zero means drained.
    fn in_flight(&self) -> usize;

    /// Begins to use a reactor, in which [`Self::files`] are registered: from now on the image may have operations of its own
    /// in flight (a receive that waits for a server), beside those of requests. Nothing was started before. One that has
    /// left may be attached again, after any parting: another was to take its place, and did not.
    fn attach(&mut self, io: &mut dyn Submit) {
        let _nothing_of_its_own = io;
    }

    /// Begins to leave the reactor, with no request in flight unless the image is lost. Events go on to [`Self::resume`] and
    /// alarms to [`Self::wake`] until [`Self::is_attached`] is false; then the kernel has nothing of the image in flight.
    /// Asking again, with another parting, hurries it.
    fn detach(&mut self, parting: Parting, io: &mut dyn Submit) {
        let _nothing_of_its_own = (parting, io);
    }

    /// Whether the image has, or may yet have, operations of its own in flight.
    fn is_attached(&self) -> bool {
        false
    }

    /// Gives the reactor what was gathered since the last time, in one piece (the commands of a round, in one send). Its owner
    /// calls it in each round, before it waits.
    fn before_wait(&mut self, io: &mut dyn Submit) {
        let _nothing_gathered = io;
    }

    /// What the reactor of the image has to be able to reach.
    fn reach(&self) -> Reach {
        Reach::Files
    }

    /// When the image wants [`Self::wake`] called, if nothing else happens before.
    fn alarm(&self) -> Option<Instant> {
        None
    }

    /// Takes the time in, at its alarm or at any other moment; requests that end by it come from [`Self::next_completion`].
    fn wake(&mut self, io: &mut dyn Submit) {
        let _no_alarm = io;
    }

    /// What the session with a server counts, if there is one. Whoever has it reads it at any time, on any thread.
    fn session(&self) -> Option<Arc<SessionMetrics>> {
        None
    }

    /// Why the image serves nobody any more, in words for its user: its lease has become another's. What a guest has in flight
    /// stays in flight for good, without any operation of the kernel, and nothing more is done to the storage. What is done to
    /// the lease ([`crate::request::Operation::Raise`], `Yield`, `TakeBack`) fails with ESTALE.
    fn loss(&self) -> Option<&str> {
        None
    }
}

/// How an image leaves a reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// It goes on with another reactor, under the same lease and with the same session.
    Moves,
    /// It is done: everything is written, the lease is released, the session is closed in good order.
    Ends,
    /// At once: the connection is dropped, and a lease stays as it is.
    Breaks,
}
