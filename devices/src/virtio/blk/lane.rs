//! One queue in service: takes chains, keeps what is in flight, gives chains back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_storage::backend::{Backend, Step};
use coracle_storage::limit::RateLimiter;
use coracle_storage::reactor::{Event, Reactor};
use coracle_storage::request::{Completion, Durability, Failure, Operation, Request, Segment};
use coracle_storage::slab::Slab;

use super::metrics::BlkMetrics;
use super::request::{Action, Parsed, SERIAL_BYTES, Status, parse, take_segments};
use crate::complaints::Complaints;
use crate::virtio::device::{ActiveQueue, Session};
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments::scatter;

/// What a worker owns for the life of its disk, whether a queue is served or not.
pub(super) struct Drive {
    /// Dropped first: an io_uring waits for what it has in flight.
    pub(super) io: Box<dyn Reactor>,
    pub(super) image: Box<dyn Backend>,
    pub(super) limiter: RateLimiter,
    pub(super) metrics: Arc<BlkMetrics>,
    pub(super) serial: [u8; SERIAL_BYTES],
    pub(super) complaints: Complaints,
}

/// A queue being served.
///
/// ```text
///   chain ──take──► flight ──start──► image ──► completion ──► status byte, used ring
///                     └──► held: waits for tokens or for room, and nothing is taken meanwhile
/// ```
pub(super) struct Lane {
    /// The session without the queue that is served here.
    session: Session,
    queue: ActiveQueue,
    chain: Chain,
    flights: Slab<Flight>,
    spare: Vec<Vec<Segment>>,
    held: Option<Held>,
    /// Something was pushed that the driver was not shown yet.
    pushed: bool,
    /// The ring makes no sense: nothing is taken any more.
    broken: bool,
}

/// What must be known of a request to answer it.
#[derive(Debug)]
struct Flight {
    head: u16,
    status: Segment,
    started: Instant,
}

/// A request that was taken and cannot start yet.
#[derive(Debug)]
enum Held {
    /// The rate limiter will let it pass at this time.
    Throttled(Request, Instant),
    /// The reactor has no room; it has once something completes.
    NoRoom(Request),
}

/// The queue that is served; there is one.
const QUEUE: usize = 0;

/// Chains taken in one go, so that a guest that never stops cannot keep the worker from its commands.
const BATCH_MAX: u16 = 256;

impl Lane {
    /// Takes the queue out of `session`.
    ///
    /// # Errors
    ///
    /// The session, when its queue was not made ready.
    pub(super) fn new(mut session: Session) -> Result<Self, Box<Session>> {
        let Some(queue) = session.queues.get_mut(QUEUE).and_then(Option::take) else {
            return Err(Box::new(session));
        };
        let size = usize::from(queue.ring.size());
        Ok(Self {
            session,
            chain: Chain::default(),
            flights: Slab::with_capacity(size),
            spare: Vec::with_capacity(size),
            held: None,
            pushed: false,
            broken: false,
            queue,
        })
    }

    /// The session, with its queue again.
    ///
    /// # Panics
    ///
    /// When something is in flight.
    pub(super) fn into_session(self) -> Session {
        assert!(
            self.flights.is_empty(),
            "a session is given back when nothing is in flight"
        );
        let mut session = self.session;
        if let Some(place) = session.queues.get_mut(QUEUE) {
            *place = Some(self.queue);
        }
        session
    }

    /// The queue, for its kick.
    pub(super) fn queue(&self) -> &ActiveQueue {
        &self.queue
    }

    /// Requests taken and not answered.
    pub(super) fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// When the rate limiter lets the held request pass.
    pub(super) fn throttled_until(&self) -> Option<Instant> {
        match &self.held {
            Some(Held::Throttled(_, until)) => Some(*until),
            Some(Held::NoRoom(_)) | None => None,
        }
    }

    /// Takes what the driver has made available, a bounded number of chains; says whether any.
    pub(super) fn take(&mut self, drive: &mut Drive, now: Instant) -> bool {
        self.retry_held(drive, now);
        let mut taken = 0;
        while taken < BATCH_MAX && self.held.is_none() && !self.broken {
            match self.queue.ring.pop(&mut self.chain) {
                Ok(false) => break,
                Ok(true) => self.take_chain(drive, now),
                Err(error @ PopError::Malformed { head, .. }) => self.refuse(head, &error, drive),
                Err(error) => self.give_up(&error, drive),
            }
            taken += 1;
        }
        taken > 0
    }

    /// Puts the held request back into the ring, as if it had not been taken: it has not started.
    pub(super) fn put_back_held(&mut self) {
        let Some(Held::Throttled(request, _) | Held::NoRoom(request)) = self.held.take() else {
            return;
        };
        // Nothing is taken while a request is held, so it is the last one that was.
        self.queue.ring.unpop();
        self.forget(request);
    }

    /// Asks the limiter again about the held request: the limits have changed.
    pub(super) fn reconsider(&mut self, now: Instant) {
        if let Some(Held::Throttled(_, until)) = &mut self.held {
            *until = now;
        }
    }

    /// Takes the end of an operation; it may be the end of a request.
    pub(super) fn resume(&mut self, event: Event, drive: &mut Drive, now: Instant) {
        if let Step::Done(completion) = drive.image.resume(event, drive.io.as_mut()) {
            self.complete(completion, &drive.metrics, now);
        }
        self.complete_others(drive, now);
    }

    /// Takes what else has ended.
    fn complete_others(&mut self, drive: &mut Drive, now: Instant) {
        while let Some(completion) = drive.image.next_completion() {
            self.complete(completion, &drive.metrics, now);
        }
    }

    /// Shows the driver what was given back, and interrupts it if it asked for that.
    pub(super) fn settle(&mut self) {
        if !self.pushed {
            return;
        }
        self.pushed = false;
        self.queue.ring.publish();
        if self.queue.ring.needs_interrupt() {
            self.session.interrupt.used_buffer();
        }
    }

    /// Prepares to wait: asks for kicks if they would be of use. False when there is work after all.
    pub(super) fn rest(&mut self) -> bool {
        if self.held.is_some() || self.broken {
            return true;
        }
        !self.queue.ring.enable_kicks()
    }

    /// Ends the wait: the worker looks by itself now.
    pub(super) fn wake(&mut self) {
        if !self.broken {
            self.queue.ring.disable_kicks();
        }
    }

    fn retry_held(&mut self, drive: &mut Drive, now: Instant) {
        match self.held.take() {
            Some(Held::Throttled(request, until)) if until > now => {
                self.held = Some(Held::Throttled(request, until));
            }
            Some(Held::Throttled(request, _)) => {
                drive.metrics.rate_limiter_event_count.add(1);
                self.admit(request, drive, now);
            }
            Some(Held::NoRoom(request)) => self.start(request, drive, now),
            None => {}
        }
    }

    fn take_chain(&mut self, drive: &mut Drive, now: Instant) {
        let head = self.chain.head;
        let geometry = drive.image.geometry();
        let parsed = match parse(&mut self.chain, &geometry, self.session.features) {
            Ok(parsed) => parsed,
            Err(error) => return self.refuse(head, &error, drive),
        };
        let Parsed { status, action } = parsed;
        match action {
            Action::Ask {
                operation,
                offset_bytes,
                len_bytes,
            } => {
                let spare = self.spare.pop().unwrap_or_default();
                let tag = self.flights.insert(Flight {
                    head,
                    status,
                    started: now,
                });
                let request = Request {
                    tag: tag as u64,
                    operation,
                    offset_bytes,
                    len_bytes,
                    durability: Durability::Cached,
                    segments: take_segments(operation, &mut self.chain, spare),
                };
                self.admit(request, drive, now);
            }
            Action::Identify => {
                let written = scatter(&self.chain.writable, 0, &drive.serial);
                self.answer(head, status, Status::Ok, written as u64);
            }
            Action::Answer(answer) => {
                drive.metrics.invalid_reqs_count.add(1);
                self.answer(head, status, answer, 0);
            }
        }
    }

    fn admit(&mut self, request: Request, drive: &mut Drive, now: Instant) {
        if drive.limiter.is_limiting() {
            let bytes = match request.operation {
                Operation::Read | Operation::Write => request.len_bytes,
                Operation::Flush | Operation::Discard | Operation::WriteZeroes { .. } | Operation::Grow => 0,
            };
            if let Err(until) = drive.limiter.admit(bytes, now) {
                drive.metrics.rate_limiter_throttled_events.add(1);
                self.held = Some(Held::Throttled(request, until));
                return;
            }
        }
        self.start(request, drive, now);
    }

    fn start(&mut self, request: Request, drive: &mut Drive, now: Instant) {
        match drive.image.start(request, drive.io.as_mut()) {
            Step::Pending => {}
            Step::Done(completion) => self.complete(completion, &drive.metrics, now),
            Step::Busy(request) => {
                drive.metrics.io_engine_throttled_events.add(1);
                self.held = Some(Held::NoRoom(request));
            }
        }
        self.complete_others(drive, now);
    }

    fn complete(&mut self, completion: Completion, metrics: &BlkMetrics, now: Instant) {
        let Completion { request, outcome } = completion;
        let (operation, len_bytes) = (request.operation, request.len_bytes);
        let read_bytes = match (operation, outcome) {
            (Operation::Read, Ok(())) => len_bytes,
            _ => 0,
        };
        let flight = self.forget(request);
        count(
            metrics,
            operation,
            len_bytes,
            outcome.map(|()| now - flight.started),
        );
        self.answer(flight.head, flight.status, outcome.into(), read_bytes);
    }

    /// Ends a request that came back from the image; its vector is used again.
    fn forget(&mut self, mut request: Request) -> Flight {
        request.segments.clear();
        self.spare.push(request.segments);
        let flight = usize::try_from(request.tag)
            .ok()
            .and_then(|tag| self.flights.remove(tag));
        flight.expect("an image gives each request back once, with the tag it came with")
    }

    /// Writes the status byte and gives the chain back; `data_bytes` were written before the status.
    fn answer(&mut self, head: u16, at: Segment, status: Status, data_bytes: u64) {
        scatter(&[at], 0, &[status as u8]);
        let written_bytes = u32::try_from(data_bytes + 1).unwrap_or(u32::MAX);
        self.queue.ring.push(head, written_bytes);
        self.pushed = true;
    }

    /// Gives back a chain that cannot be answered.
    fn refuse(&mut self, head: u16, error: &dyn std::error::Error, drive: &mut Drive) {
        drive.metrics.execute_fails.add(1);
        drive.complaints.complain(format_args!(
            "the guest's disk driver made a chain that is no request: {error}"
        ));
        self.queue.ring.push(head, 0);
        self.pushed = true;
    }

    /// Serves the queue no more: its positions make no sense, so nothing in it can be trusted.
    fn give_up(&mut self, error: &PopError, drive: &mut Drive) {
        drive.metrics.event_fails.add(1);
        drive.complaints.complain(format_args!(
            "the guest's disk driver broke its queue, which needs a reset: {error}"
        ));
        self.broken = true;
        self.session.interrupt.device_needs_reset();
    }
}

/// Counts the end of a request; `took` is how long it took, if it succeeded.
fn count(metrics: &BlkMetrics, operation: Operation, len_bytes: u64, took: Result<Duration, Failure>) {
    let Ok(took) = took else {
        metrics.invalid_reqs_count.add(1);
        return;
    };
    match operation {
        Operation::Read => {
            metrics.read_count.add(1);
            metrics.read_bytes.add(len_bytes);
            metrics.read_agg.record(took);
        }
        Operation::Write => {
            metrics.write_count.add(1);
            metrics.write_bytes.add(len_bytes);
            metrics.write_agg.record(took);
        }
        Operation::Flush => metrics.flush_count.add(1),
        Operation::Discard | Operation::WriteZeroes { .. } => metrics.discard_count.add(1),
        Operation::Grow => {}
    }
}
