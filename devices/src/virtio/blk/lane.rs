//! One queue in service: takes chains, keeps what is in flight, gives chains back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_storage::backend::{Backend, Step};
use coracle_storage::changes::Changes;
use coracle_storage::limit::SharedLimiter;
use coracle_storage::reactor::Reactor;
use coracle_storage::request::{Completion, Failure, Operation, Request, Segment};
use coracle_storage::slab::Slab;

use super::cache::WriteCache;
use super::loss::LossSignal;
use super::metrics::BlkMetrics;
use super::request::{Action, Parsed, SERIAL_BYTES, Status, parse, take_segments};
use crate::complaints::Complaints;
use crate::virtio::device::{ActiveQueue, Interrupt, Session};
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments::scatter;

/// What a worker has for the life of its disk, whether a queue is served or not.
pub(super) struct Drive {
    /// Dropped first: an io_uring waits for what it has in flight.
    pub(super) io: Box<dyn Reactor>,
    pub(super) image: Box<dyn Backend>,
    /// The disk's own limits, then those of its group.
    pub(super) limits: Vec<Arc<SharedLimiter>>,
    pub(super) cache: Arc<WriteCache>,
    pub(super) metrics: Arc<BlkMetrics>,
    pub(super) loss: Arc<LossSignal>,
    /// Where what the guest has changed is marked, for whoever copies the image.
    pub(super) changes: Arc<Changes>,
    pub(super) serial: [u8; SERIAL_BYTES],
    pub(super) complaints: Complaints,
}

impl Drive {
    /// Takes tokens from every limit, and says from when on the operation may start.
    fn reserve(&self, bytes: u64, now: Instant) -> Instant {
        let starts = self.limits.iter().map(|limit| limit.reserve(bytes, now));
        starts.max().unwrap_or(now)
    }

    /// Gives tokens back that were taken at the time `reserved`.
    fn refund(&self, bytes: u64, reserved: Instant) {
        for limit in &self.limits {
            limit.refund(bytes, reserved);
        }
    }
}

/// A queue being served.
///
/// ```text
///   chain ──take──► flight ──start──► image ──► completion ──► status byte, used ring
///                     └──► held: waits for tokens or for room, and nothing is taken meanwhile
/// ```
pub(super) struct Lane {
    /// Its place among the lanes of the worker.
    number: usize,
    /// Its index among the queues of the device.
    index: usize,
    features: u64,
    interrupt: Interrupt,
    queue: ActiveQueue,
    chain: Chain,
    flights: Slab<Flight>,
    spare: Vec<Vec<Segment>>,
    held: Option<Held>,
    /// While the limits hold the lane back: the time of which the last request was let pass.
    paced: Option<Instant>,
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
    /// When its tokens were taken.
    reserved: Instant,
}

/// A request that was taken and cannot start yet.
#[derive(Debug)]
enum Held {
    /// It has its tokens, and may start at this time.
    Throttled(Request, Instant),
    /// The reactor has no room; it has once something completes.
    NoRoom(Request),
}

/// How far a lane that woke late may be behind the time at which its limits let it pass. What is beyond that is lost, so
/// that a host that slept does not give its disks an hour's tokens at once.
const BEHIND_MAX: Duration = Duration::from_millis(100);

/// Chains taken in one go. What is done is shown to the driver after each: it makes new requests of them
/// while the next are served, where after one large batch each side would wait for the other. (4 KiB at depth 32
/// on a 2-core host: 256 at a time make 206,000 a second, 8 make 572,000; a batch of 4 costs more system calls.)
const BATCH_MAX: u16 = 8;

/// Where the number of the lane stands in the tag of its requests; below it that of the flight.
const LANE_SHIFT: u32 = 32;

/// The number of the lane that `request` came from.
pub(super) fn lane_of(request: &Request) -> usize {
    usize::try_from(request.tag >> LANE_SHIFT).expect("this is a 64-bit monitor")
}

/// The number of the flight that `request` is of, in its lane.
fn flight_of(request: &Request) -> Option<usize> {
    usize::try_from(request.tag & ((1 << LANE_SHIFT) - 1)).ok()
}

impl Lane {
    /// A lane for the queue of this `index`, which belongs to `session`.
    pub(super) fn new(number: usize, index: usize, queue: ActiveQueue, session: &Session) -> Self {
        let size = usize::from(queue.ring.size());
        Self {
            number,
            index,
            features: session.features,
            interrupt: session.interrupt.clone(),
            chain: Chain::default(),
            flights: Slab::with_capacity(size),
            spare: Vec::with_capacity(size),
            held: None,
            paced: None,
            pushed: false,
            broken: false,
            queue,
        }
    }

    /// The queue and its index.
    ///
    /// # Panics
    ///
    /// When something is in flight.
    pub(super) fn into_queue(self) -> (usize, ActiveQueue) {
        assert!(
            self.flights.is_empty(),
            "a queue is given back when nothing is in flight"
        );
        (self.index, self.queue)
    }

    /// Its place among the lanes of the worker.
    pub(super) fn number(&self) -> usize {
        self.number
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
                Ok(false) => {
                    // Whoever asks for less than the limit starts from the present.
                    self.paced = None;
                    break;
                }
                Ok(true) => self.take_chain(drive, now),
                Err(error @ PopError::Malformed { head, .. }) => self.refuse(head, &error, drive),
                Err(error) => self.give_up(&error, drive),
            }
            taken += 1;
        }
        taken > 0
    }

    /// Puts the held request back into the ring, as if it had not been taken: it has not started.
    pub(super) fn put_back_held(&mut self, drive: &Drive) {
        let Some(Held::Throttled(request, _) | Held::NoRoom(request)) = self.held.take() else {
            return;
        };
        let bytes = limited_bytes(&request);
        // Nothing is taken while a request is held, so it is the last one that was.
        self.queue.ring.unpop();
        drive.refund(bytes, self.forget(request).reserved);
    }

    /// Asks the limits again about the held request: they have changed.
    pub(super) fn reconsider(&mut self, drive: &Drive, now: Instant) {
        if let Some(Held::Throttled(request, until)) = &mut self.held {
            let bytes = limited_bytes(request);
            let flight = flight_of(request).and_then(|number| self.flights.get_mut(number));
            let flight = flight.expect("a request is held while its flight lasts");
            drive.refund(bytes, std::mem::replace(&mut flight.reserved, now));
            *until = drive.reserve(bytes, now);
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
            self.interrupt.used_buffer();
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
            Some(Held::Throttled(request, until)) => {
                drive.metrics.rate_limiter_event_count.add(1);
                self.paced = Some(until);
                self.start(request, drive, now);
            }
            Some(Held::NoRoom(request)) => self.start(request, drive, now),
            None => {}
        }
    }

    fn take_chain(&mut self, drive: &mut Drive, now: Instant) {
        let head = self.chain.head;
        let geometry = drive.image.geometry();
        let parsed = match parse(&mut self.chain, &geometry, self.features) {
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
                    reserved: now,
                });
                let request = Request {
                    tag: (self.number as u64) << LANE_SHIFT | tag as u64,
                    operation,
                    offset_bytes,
                    len_bytes,
                    durability: drive.cache.durability(self.features),
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
        // A timer that rang late costs the guest nothing: the next request is counted from when the last one
        // might have gone.
        let behind = self
            .paced
            .map(|paced| paced.max(now.checked_sub(BEHIND_MAX).unwrap_or(now)));
        let until = drive.reserve(limited_bytes(&request), behind.unwrap_or(now));
        self.paced = behind.map(|_| until);
        if until > now {
            drive.metrics.rate_limiter_throttled_events.add(1);
            self.held = Some(Held::Throttled(request, until));
        } else {
            self.start(request, drive, now);
        }
    }

    fn start(&mut self, request: Request, drive: &mut Drive, now: Instant) {
        match drive.image.start(request, drive.io.as_mut()) {
            Step::Pending => {}
            Step::Done(completion) => self.complete(completion, drive, now),
            Step::Busy(request) => {
                drive.metrics.io_engine_throttled_events.add(1);
                self.held = Some(Held::NoRoom(request));
            }
        }
    }

    /// Answers a request of this lane. What it has changed, also where it has failed, is marked before.
    pub(super) fn complete(&mut self, completion: Completion, drive: &Drive, now: Instant) {
        let Completion { request, outcome } = completion;
        let (operation, len_bytes) = (request.operation, request.len_bytes);
        if changes(operation) {
            let end_bytes = request.offset_bytes.saturating_add(len_bytes);
            drive.changes.mark(request.offset_bytes..end_bytes);
        }
        let read_bytes = match (operation, outcome) {
            (Operation::Read, Ok(())) => len_bytes,
            _ => 0,
        };
        let flight = self.forget(request);
        count(
            &drive.metrics,
            operation,
            len_bytes,
            outcome.map(|()| now - flight.started),
        );
        self.answer(flight.head, flight.status, outcome.into(), read_bytes);
    }

    /// Ends a request that came back from the image; its vector is used again.
    fn forget(&mut self, mut request: Request) -> Flight {
        let number = flight_of(&request);
        request.segments.clear();
        self.spare.push(request.segments);
        let flight = number.and_then(|number| self.flights.remove(number));
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
        self.interrupt.device_needs_reset();
    }
}

/// Whether a guest that asks for it may have other bytes on its disk afterwards.
fn changes(operation: Operation) -> bool {
    match operation {
        Operation::Write | Operation::Discard | Operation::WriteZeroes { .. } => true,
        Operation::Read
        | Operation::Flush
        | Operation::Raise
        | Operation::Yield
        | Operation::TakeBack
        | Operation::Grow
        | Operation::FindData => false,
    }
}

/// What a request costs a limit on bytes; every request is one operation.
fn limited_bytes(request: &Request) -> u64 {
    match request.operation {
        Operation::Read | Operation::Write => request.len_bytes,
        Operation::Flush
        | Operation::Discard
        | Operation::WriteZeroes { .. }
        | Operation::Raise
        | Operation::Yield
        | Operation::TakeBack
        | Operation::Grow
        | Operation::FindData => 0,
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
        Operation::Raise | Operation::Yield | Operation::TakeBack | Operation::Grow | Operation::FindData => {
        }
    }
}
