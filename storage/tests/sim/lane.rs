//! One image in service: starts requests, takes their ends, and holds the image to its contract.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use coracle_storage::backend::{Backend, Step};
use coracle_storage::reactor::{Patience, Reactor, Submit, Wake};
use coracle_storage::request::{Completion, Durability, Failure, Operation, Request};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::oracle::{Oracle, Ticket};
use coracle_storage::sim::reactor::{Faults, SimReactor};

use crate::buffers::{Buffer, Graveyard};
use crate::workload::Wish;

/// What all lanes of a disk share: what the guest knows, and its memory.
pub(crate) struct Guest {
    pub(crate) oracle: Oracle,
    pub(crate) graveyard: Graveyard,
    pub(crate) excuse: Excuse,
    next_tag: u64,
}

/// Why requests may fail.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Excuse {
    /// A host with these faults has said so.
    Host(Faults),
    /// The server was not there for too long.
    Timeout,
    /// For no reason at all.
    Nothing,
    /// Whatever it is: nobody looks at this guest any more, nor at what it reads.
    Anything,
}

/// An image, the reactor that it works on, and the requests that it has taken.
pub(crate) struct Lane {
    // Dropped first: it holds pointers into what the image owns.
    pub(crate) io: SimReactor,
    pub(crate) image: Box<dyn Backend>,
    asked: BTreeMap<u64, Asked>,
    /// Was refused for want of room; it is offered again after the next event.
    held: Option<Request>,
    /// How often it has waited.
    pub(crate) waits: u64,
}

/// A request that has not ended.
struct Asked {
    wish: Wish,
    ticket: Ticket,
    buffer: Buffer,
    segment_count: usize,
    /// The generation of the image when it was asked.
    generation: u64,
}

/// Waits until the next end of a request at most: a request takes a few operations, each a few parts.
const WAITS_MAX: u32 = 100_000;

impl Guest {
    pub(crate) fn new(content: &[u8], excuse: Excuse) -> Self {
        Self {
            oracle: Oracle::new(content),
            graveyard: Graveyard::default(),
            excuse,
            next_tag: 0,
        }
    }
}

impl Lane {
    pub(crate) fn new(image: Box<dyn Backend>, mut io: SimReactor) -> Self {
        io.register(&image.files()).unwrap();
        let mut lane = Self {
            io,
            image,
            asked: BTreeMap::new(),
            held: None,
            waits: 0,
        };
        lane.attach();
        lane
    }

    /// Has the image use its reactor.
    pub(crate) fn attach(&mut self) {
        self.image.attach(&mut self.io);
    }

    /// How many requests have not ended.
    pub(crate) fn outstanding(&self) -> usize {
        self.asked.len()
    }

    /// The generation of the image, as its session tells it; 0 if nothing says so.
    pub(crate) fn generation(&self) -> u64 {
        self.image
            .session()
            .map_or(0, |session| session.lease_epoch.value())
    }

    /// Whether another request may be started now.
    pub(crate) fn has_room(&self) -> bool {
        self.held.is_none()
    }

    /// Whether a request that changes the size of the disk is under way.
    pub(crate) fn is_growing(&self) -> bool {
        self.asked
            .values()
            .any(|asked| asked.wish.operation == Operation::Grow)
    }

    /// Starts a request; it may end at once.
    pub(crate) fn ask(&mut self, wish: Wish, guest: &mut Guest, dice: &mut Dice) {
        let ticket = guest
            .oracle
            .begin(wish.effect(), wish.offset_bytes, wish.len_bytes);
        let len_bytes = usize::try_from(wish.len_bytes).unwrap();
        let mut buffer = Buffer::new(match wish.operation {
            Operation::Read => vec![UNREAD; len_bytes],
            Operation::Write => Oracle::bytes_of(ticket, wish.offset_bytes, len_bytes),
            _ => Vec::new(),
        });
        let segments = match wish.operation {
            Operation::Read | Operation::Write => buffer.segments(dice),
            _ => Vec::new(),
        };
        let tag = guest.next_tag;
        guest.next_tag += 1;
        let request = Request {
            tag,
            operation: wish.operation,
            offset_bytes: wish.offset_bytes,
            len_bytes: wish.len_bytes,
            durability: wish.durability,
            segments,
        };
        let segment_count = request.segments.len();
        let asked = Asked {
            wish,
            ticket,
            buffer,
            segment_count,
            generation: self.generation(),
        };
        self.asked.insert(tag, asked);
        self.start(request, guest);
    }

    /// A request that no image may accept.
    pub(crate) fn ask_beyond_the_end(&mut self, guest: &Guest) {
        let request = Request {
            tag: u64::MAX,
            operation: Operation::Discard,
            offset_bytes: u64::MAX - 511,
            len_bytes: 512,
            durability: Durability::Cached,
            segments: Vec::new(),
        };
        let before = self.io.in_flight();
        let step = self.image.start(request, &mut self.io);
        let refused =
            matches!(&step, Step::Done(completion) if completion.outcome == Err(Failure::OutOfRange));
        assert!(
            refused && self.io.in_flight() == before,
            "a range beyond the end of a disk of {} bytes was not refused: {step:?}",
            guest.oracle.size_bytes()
        );
    }

    /// Waits until something ends, and takes it in.
    pub(crate) fn go_on(&mut self, patience: Patience, guest: &mut Guest) {
        self.go_on_until(None, patience, guest);
    }

    /// The same, until `limit` at most.
    pub(crate) fn go_on_until(&mut self, limit: Option<Instant>, patience: Patience, guest: &mut Guest) {
        let mut wakes = Vec::new();
        self.image.before_wait(&mut self.io);
        self.io
            .set_timer(self.image.alarm().into_iter().chain(limit).min());
        self.io.wait(patience, &mut wakes).unwrap();
        self.waits += 1;
        assert!(
            !self.io.is_idle() || self.asked.is_empty() || self.image.loss().is_some(),
            "{} requests are lost: nothing is in flight that could end them",
            self.asked.len()
        );
        self.take_wakes(wakes, guest);
    }

    /// The process is stopped for `time`: what the kernel has goes on, and it looks at that afterwards.
    pub(crate) fn stop(&mut self, time: Duration, guest: &mut Guest) {
        let mut wakes = Vec::new();
        self.image.before_wait(&mut self.io);
        let end = self.io.now() + time;
        while self.io.now() < end {
            self.io.set_timer(Some(end));
            self.io.wait(Patience::UntilEvent, &mut wakes).unwrap();
        }
        self.waits += 1;
        // What it submits may be done before it looks at its clock again.
        let mut wakes = VecDeque::from(wakes);
        let mut more = Vec::new();
        while let Some(wake) = wakes.pop_front() {
            self.take_event(wake, guest);
            self.io.wait(Patience::None, &mut more).unwrap();
            wakes.extend(more.drain(..));
        }
        self.take_wakes(Vec::new(), guest);
    }

    fn take_wakes(&mut self, wakes: Vec<Wake>, guest: &mut Guest) {
        let any = !wakes.is_empty();
        for wake in wakes {
            self.take_event(wake, guest);
        }
        self.image.wake(&mut self.io);
        self.take_others(guest);
        if any && let Some(request) = self.held.take() {
            self.start(request, guest);
        }
        self.check_count();
    }

    fn take_event(&mut self, wake: Wake, guest: &mut Guest) {
        let Wake::Done(event) = wake else { return };
        match self.image.resume(event, &mut self.io) {
            Step::Pending => {}
            Step::Done(completion) => self.take(completion, guest),
            Step::Busy(request) => panic!("request {} was accepted and came back", request.tag),
        }
        self.take_others(guest);
    }

    /// Takes every request to its end.
    pub(crate) fn drain(&mut self, guest: &mut Guest) {
        let (mut waits, mut left) = (0, self.outstanding());
        while self.outstanding() > 0 {
            self.go_on(Patience::UntilEvent, guest);
            waits = if self.outstanding() < left { 0 } else { waits + 1 };
            left = self.outstanding();
            assert!(waits < WAITS_MAX, "{left} requests make no progress");
        }
        assert!(
            self.io.in_flight() == 0 || self.image.is_attached(),
            "operations are in flight when every request has ended"
        );
    }

    /// The time on the clock of its host.
    pub(crate) fn now(&self) -> Instant {
        self.io.now()
    }

    fn start(&mut self, request: Request, guest: &mut Guest) {
        let tag = request.tag;
        match self.image.start(request, &mut self.io) {
            Step::Pending => {}
            Step::Done(completion) => self.take(completion, guest),
            Step::Busy(request) => {
                let count = self.asked.get(&tag).map(|asked| asked.segment_count);
                assert_eq!(
                    (request.tag, Some(request.segments.len())),
                    (tag, count),
                    "a request that was not accepted comes back untouched"
                );
                assert!(
                    self.io.in_flight() > 0,
                    "request {tag} was not accepted, and nothing is in flight whose end would make room"
                );
                self.held = Some(request);
            }
        }
        self.take_others(guest);
        self.check_count();
    }

    /// Takes what else has ended.
    fn take_others(&mut self, guest: &mut Guest) {
        while let Some(completion) = self.image.next_completion() {
            self.take(completion, guest);
        }
    }

    fn check_count(&self) {
        let accepted = self.asked.len() - usize::from(self.held.is_some());
        assert_eq!(
            self.image.in_flight(),
            accepted,
            "the image counts other requests in flight than it has accepted and not ended"
        );
    }

    /// Takes the end of a request.
    fn take(&mut self, completion: Completion, guest: &mut Guest) {
        let Completion { request, outcome } = completion;
        let Some(asked) = self.asked.remove(&request.tag) else {
            panic!("request {} was completed twice", request.tag);
        };
        let Asked {
            wish,
            ticket,
            buffer,
            generation,
            ..
        } = asked;
        if matches!(guest.excuse, Excuse::Anything) {
            return guest.graveyard.bury(request, buffer);
        }
        let context = format!("request {} ({wish:?})", request.tag);
        if wish.operation == Operation::Write {
            let written = Oracle::bytes_of(ticket, wish.offset_bytes, buffer.bytes().len());
            assert!(
                buffer.bytes() == written,
                "{context}: the memory of a write was changed"
            );
        }
        if wish.operation == Operation::Raise && outcome.is_ok() {
            let is_raised = generation == 0 || self.generation() > generation;
            assert!(is_raised, "{context}: the generation is still {generation}");
        }
        match (wish.operation, outcome) {
            (Operation::Read, Ok(())) => {
                let verdict = guest.oracle.has_read(ticket, buffer.bytes());
                verdict.unwrap_or_else(|violation| panic!("{context}: {violation}"));
            }
            (Operation::FindData, Ok(())) => {
                let passed = usize::try_from(request.offset_bytes - wish.offset_bytes).unwrap();
                let verdict = guest.oracle.has_read(ticket, &vec![0; passed]);
                verdict.unwrap_or_else(|violation| panic!("{context}: {violation}"));
            }
            (_, Ok(())) => guest.oracle.has_succeeded(ticket, wish.durability),
            (_, Err(failure)) => {
                assert!(
                    self.is_excused(wish.operation, failure, guest.excuse),
                    "{context} failed without a reason: {failure:?}"
                );
                guest.oracle.has_failed(ticket);
            }
        }
        guest.graveyard.bury(request, buffer);
    }

    /// Whether there is a reason for this failure.
    fn is_excused(&self, operation: Operation, failure: Failure, excuse: Excuse) -> bool {
        match (excuse, failure) {
            (Excuse::Anything, _) => true,
            // What its owner waits for comes to nothing when the lease is lost.
            (_, Failure::Host(libc::ESTALE)) if operation == Operation::Raise => self.image.loss().is_some(),
            (Excuse::Host(_), Failure::Host(errno)) => self.io.has_failed_with(errno),
            (Excuse::Timeout, Failure::Host(errno)) => errno == libc::ETIMEDOUT,
            (Excuse::Host(faults), Failure::Unsupported) => {
                operation == Operation::Discard && faults.refuses_holes
            }
            _ => false,
        }
    }
}

/// What memory holds before it is read into.
const UNREAD: u8 = 0x5e;
