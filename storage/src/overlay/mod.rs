//! An image that shows a base and keeps what is written to it elsewhere.
//!
//! The base is any image, is only read, and is shared by any number of overlays. Writes and discards go
//! to a sparse file of the overlay's own, or to memory; a bitmap says which clusters it has.

mod bitmap;
mod claims;
pub mod clusters;
pub mod copy;
pub mod file;
mod flight;
pub mod format;
mod grow;
mod open;
mod persist;
mod port;
mod start;
#[cfg(test)]
mod tests;
mod words;

pub use self::open::{MEMORY, OverlayConfig, OverlayError};
pub use self::start::Beginning;

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use self::bitmap::Bitmap;
use self::claims::Claims;
use self::copy::View;
use self::flight::{Contents, Flight, Next, Stage};
use self::format::{BITMAP_BYTES_MAX, CLUSTERS_MAX, DATA_OFFSET_BYTES, Header};
use self::grow::Growth;
use self::persist::Cycle;
use self::port::{Side, Turn};
use crate::backend::{Backend, Geometry, Parting, Step};
use crate::metrics::SessionMetrics;
use crate::raw::Raw;
use crate::reactor::{Event, ImageFile, Reach, Submit};
use crate::request::{Completion, Durability, Failure, Operation, Request, Segment};
use crate::slab::Slab;

/// Whether an overlay outlives its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// Its file can be opened again: a flush and a durable write reach the medium, with their bits.
    Kept,
    /// Nobody can open it again, whatever happens: what a flush would save is lost with the machine
    /// anyway, so a flush has nothing to do.
    Temporary,
}

/// An overlay over a base.
///
/// Both are images with a state machine each; this one only says which of them does what:
///
/// ```text
///   start(request) ──► flight ──► request to the base or the store ──► their operations, tagged
///                        ▲                                                   │
///                        └────────── their completion ◄── resume(event) ◄────┘
/// ```
///
/// A request that lies in one of them whole is passed on with the owner's own segments.
pub struct Overlay {
    base: Box<dyn Backend>,
    /// The overlay's own file, with the data of the image at [`DATA_OFFSET_BYTES`].
    store: Raw,
    base_files: u32,
    header: Header,
    lifetime: Lifetime,
    contents: Contents,
    flights: Slab<Flight>,
    /// Unplanned: they wait until a claim is given back.
    waiting: VecDeque<usize>,
    /// They wait for room.
    stalled: VecDeque<usize>,
    cycle: Option<Cycle>,
    /// They wait for the next cycle.
    joining: Vec<usize>,
    growth: Option<Growth>,
    ended: VecDeque<Completion>,
    /// Vectors of segments, to be used again.
    spare: Vec<Vec<Segment>>,
}

/// The place of the cycle, beside those of flights.
const CYCLE: usize = usize::MAX;

/// Requests for which there is room from the start.
const FLIGHTS_TYPICAL: usize = 256;

/// How a turn of a flight ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turned {
    /// Something is in flight, or it waits for somebody else.
    Pending,
    /// There was no room.
    Stalled,
    /// It is over; its completion is the last of those that ended.
    Ended,
}

impl Overlay {
    /// The overlay in `file`, whose first header is `header` and whose bitmap starts with `bits`, over `base`.
    ///
    /// The base is at least as long as `header` shows of it, and the file as long as the image needs.
    pub fn new(
        base: Box<dyn Backend>,
        file: Arc<File>,
        header: Header,
        bits: &[u8],
        lifetime: Lifetime,
    ) -> Self {
        let shape = header.shape();
        let store = Raw::new(
            file,
            Geometry {
                size_bytes: DATA_OFFSET_BYTES + shape.size_bytes,
                ..shape.geometry(base.geometry())
            },
        );
        debug_assert!(bits.len() as u64 <= BITMAP_BYTES_MAX, "the format has a limit");
        let base_files = u32::try_from(base.files().len()).expect("a reactor takes few files");
        Self {
            base,
            store,
            base_files,
            header,
            lifetime,
            contents: Contents {
                shape,
                bitmap: Bitmap::new(CLUSTERS_MAX, bits),
                claims: Claims::default(),
            },
            flights: Slab::with_capacity(FLIGHTS_TYPICAL),
            waiting: VecDeque::new(),
            stalled: VecDeque::new(),
            cycle: None,
            joining: Vec::new(),
            growth: None,
            ended: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    /// What it has, for whoever copies that while nobody writes.
    pub(crate) fn view(&self, file: &Arc<File>) -> View {
        View::new(file, self.contents.bitmap.words())
    }

    /// Moves a flight, or the cycle, as far as it goes.
    fn advance(&mut self, mut place: usize, turn: &mut Turn<'_>) -> Turned {
        loop {
            match self.next(place) {
                Next::Start(side, mut request) => {
                    request.tag = place as u64;
                    match self.pass(side, request, turn) {
                        Step::Pending if self.may_go_on(place) && turn.has_room() => {}
                        Step::Pending => return Turned::Pending,
                        Step::Done(completion) => {
                            self.absorb(completion);
                        }
                        Step::Busy(request) => {
                            self.take_back(place, request);
                            return self.stall(place);
                        }
                    }
                }
                Next::Wait => return Turned::Pending,
                Next::Stage(Stage::Settle) => {
                    if self.settle(place) {
                        place = CYCLE;
                    }
                }
                Next::Stage(_) if place == CYCLE => {
                    self.finish_cycle();
                    if self.cycle.is_none() {
                        return Turned::Ended;
                    }
                }
                Next::Stage(_) => {
                    self.finish(place);
                    return Turned::Ended;
                }
            }
        }
    }

    fn next(&mut self, place: usize) -> Next {
        if place == CYCLE {
            let cycle = self.cycle.as_mut().expect("a cycle advances while it lasts");
            return match cycle.next(&mut self.contents.bitmap, &mut self.spare) {
                Some(request) => Next::Start(Side::Store, request),
                None => Next::Stage(Stage::End),
            };
        }
        let flight = self
            .flights
            .get_mut(place)
            .expect("a flight advances while it lasts");
        if flight.stage == Stage::Unplanned && flight.asked.operation == Operation::Grow {
            self.plan_growth(place);
        } else if flight.stage == Stage::Unplanned {
            flight.plan(&mut self.contents);
        }
        let flight = self.flights.get_mut(place).expect("planning ends no flight");
        if flight.stage == Stage::Unplanned {
            self.waiting.push_back(place);
        }
        match flight.next(place, &self.contents, &mut self.spare) {
            Next::Stage(stage @ (Stage::Extend | Stage::Secure | Stage::Describe)) => {
                Next::Start(Side::Store, self.growth_request(stage))
            }
            next => next,
        }
    }

    /// Whether a flight may have several things in flight at a time: others go on when theirs has ended.
    fn may_go_on(&mut self, place: usize) -> bool {
        let flight = self.flights.get_mut(place);
        flight.is_some_and(|flight| matches!(flight.stage, Stage::Gather { .. }))
    }

    fn pass(&mut self, side: Side, mut request: Request, turn: &mut Turn<'_>) -> Step {
        if self.lifetime == Lifetime::Temporary {
            request.durability = Durability::Cached;
        }
        match side {
            Side::Base => self.base.start(request, &mut turn.port(side, 0)),
            Side::Store => self.store.start(request, &mut turn.port(side, self.base_files)),
        }
    }

    /// Takes the end of what a flight, or the cycle, had started.
    fn absorb(&mut self, completion: Completion) -> usize {
        let Completion { mut request, outcome } = completion;
        let place = usize::try_from(request.tag).expect("tags of requests below are places");
        if place == CYCLE {
            let cycle = self.cycle.as_mut().expect("a cycle lasts while it is in flight");
            cycle.absorb(outcome);
            request.segments.clear();
            self.spare.push(request.segments);
            return place;
        }
        let flight = self
            .flights
            .get_mut(place)
            .expect("a flight lasts while it is in flight");
        flight.absorb(request, outcome, &mut self.spare);
        place
    }

    /// Takes the ends of `first` and of whatever else `side` has ended with it, and moves on what they belong to.
    fn absorb_all(&mut self, side: Side, first: Option<Completion>, turn: &mut Turn<'_>) {
        let mut next = first.or_else(|| self.ended_below(side));
        while let Some(ended) = next {
            let place = self.absorb(ended);
            if turn.has_room() {
                self.advance(place, turn);
            } else {
                self.stall(place);
            }
            next = self.ended_below(side);
        }
    }

    fn ended_below(&mut self, side: Side) -> Option<Completion> {
        match side {
            Side::Base => self.base.next_completion(),
            Side::Store => self.store.next_completion(),
        }
    }

    fn take_back(&mut self, place: usize, mut request: Request) {
        match self.flights.get_mut(place) {
            Some(flight) => flight.take_back(request, &mut self.spare),
            None => {
                request.segments.clear();
                self.spare.push(request.segments);
            }
        }
    }

    /// Ends a flight, whatever stage it is in.
    fn finish(&mut self, place: usize) {
        if self.growth_is_of(place) {
            self.growth = None;
            self.stalled.append(&mut self.waiting);
        }
        let mut flight = self.flights.remove(place).expect("a flight ends once");
        if let Some(claim) = flight.claim.take() {
            self.contents.claims.release(&claim);
            self.stalled.append(&mut self.waiting);
        }
        let outcome = flight.outcome;
        let request = flight.into_request();
        self.ended.push_back(Completion { request, outcome });
    }

    /// Moves those who had no room, while there is some.
    fn pump(&mut self, turn: &mut Turn<'_>) {
        while turn.has_room()
            && let Some(place) = self.stalled.pop_front()
        {
            if self.advance(place, turn) == Turned::Stalled {
                return;
            }
        }
    }

    /// Lets a flight, or the cycle, wait for room, unless it has something in flight that moves it on anyway.
    fn stall(&mut self, place: usize) -> Turned {
        let flight = self.flights.get_mut(place);
        if flight.is_some_and(|flight| flight.is_in_flight()) {
            return Turned::Pending;
        }
        self.stalled.push_front(place);
        Turned::Stalled
    }

    /// What can be said of a request without looking at the clusters.
    fn at_once(&self, request: &Request) -> Option<Result<(), Failure>> {
        if request.operation == Operation::Grow {
            return None;
        }
        let end = request.offset_bytes.checked_add(request.len_bytes);
        if end.is_none_or(|end| end > self.contents.shape.size_bytes) {
            return Some(Err(Failure::OutOfRange));
        }
        match request.operation {
            Operation::Flush => (self.lifetime == Lifetime::Temporary).then_some(Ok(())),
            // Its base is not asked.
            Operation::FindData => Some(Ok(())),
            _ => (request.len_bytes == 0).then_some(Ok(())),
        }
    }

    /// Gives a request back that found no room; nothing of it is in flight.
    fn refuse(&mut self, place: usize) -> Step {
        let stalled = self.stalled.pop_front();
        if stalled != Some(place) {
            // It is the cycle that found none. Something of ours is in flight, or there would be room for
            // one operation: its event tries again.
            self.stalled.extend(stalled);
            return Step::Pending;
        }
        let mut flight = self.flights.remove(place).expect("it was inserted just now");
        if let Some(claim) = flight.claim.take() {
            // Nobody can have come to wait for it.
            self.contents.claims.release(&claim);
        }
        if self.growth_is_of(place) {
            self.growth = None;
        }
        Step::Busy(flight.into_request())
    }
}

impl Backend for Overlay {
    fn geometry(&self) -> Geometry {
        self.contents.shape.geometry(self.base.geometry())
    }

    fn files(&self) -> Vec<ImageFile> {
        let mut files = self.base.files();
        files.extend(self.store.files());
        files
    }

    fn start(&mut self, request: Request, io: &mut dyn Submit) -> Step {
        if self.base.loss().is_some() {
            // Nobody is served any more; what the overlay itself has in flight drains.
            return Step::Busy(request);
        }
        if let Some(outcome) = self.at_once(&request) {
            return Step::Done(Completion { request, outcome });
        }
        self.pump(&mut Turn::of_start(&mut *io));
        if !self.stalled.is_empty() {
            return Step::Busy(request);
        }
        let mut turn = Turn::of_start(io);
        let is_flush = request.operation == Operation::Flush;
        let place = self.flights.insert(Flight::new(request));
        let turned = if is_flush {
            self.start_flush(place, &mut turn)
        } else {
            self.advance(place, &mut turn)
        };
        let step = match turned {
            Turned::Pending => Step::Pending,
            Turned::Ended => Step::Done(self.ended.pop_back().expect("it has ended just now")),
            Turned::Stalled => self.refuse(place),
        };
        for side in [Side::Base, Side::Store] {
            self.absorb_all(side, None, &mut turn);
        }
        step
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) -> Step {
        let mut turn = Turn::of_event(io);
        let (side, token) = Side::of(event.token);
        let event = Event { token, ..event };
        let step = match side {
            Side::Base => self.base.resume(event, &mut turn.port(side, 0)),
            Side::Store => self.store.resume(event, &mut turn.port(side, self.base_files)),
        };
        let completion = match step {
            Step::Done(completion) => Some(completion),
            Step::Pending => None,
            Step::Busy(_) => unreachable!("an event starts no request"),
        };
        if completion.is_some() {
            // What the image has submitted is its own, for the next event. What goes on now has room of its own.
            turn.renew();
        }
        self.absorb_all(side, completion, &mut turn);
        self.pump(&mut turn);
        self.next_completion().map_or(Step::Pending, Step::Done)
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        // The bitmap has one owner.
        None
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.ended.pop_front()
    }

    fn flushes_at_end(&self) -> bool {
        self.lifetime == Lifetime::Kept
    }

    fn in_flight(&self) -> usize {
        self.flights.len()
    }

    fn attach(&mut self, io: &mut dyn Submit) {
        let mut turn = Turn::of_start(io);
        self.base.attach(&mut turn.port(Side::Base, 0));
        self.store.attach(&mut turn.port(Side::Store, self.base_files));
    }

    fn detach(&mut self, parting: Parting, io: &mut dyn Submit) {
        let mut turn = Turn::of_start(io);
        self.base.detach(parting, &mut turn.port(Side::Base, 0));
        self.store
            .detach(parting, &mut turn.port(Side::Store, self.base_files));
    }

    fn is_attached(&self) -> bool {
        self.base.is_attached() || self.store.is_attached()
    }

    fn before_wait(&mut self, io: &mut dyn Submit) {
        let mut turn = Turn::of_start(io);
        self.base.before_wait(&mut turn.port(Side::Base, 0));
        self.store
            .before_wait(&mut turn.port(Side::Store, self.base_files));
    }

    fn reach(&self) -> Reach {
        self.base.reach().max(self.store.reach())
    }

    fn alarm(&self) -> Option<Instant> {
        [self.base.alarm(), self.store.alarm()]
            .into_iter()
            .flatten()
            .min()
    }

    fn wake(&mut self, io: &mut dyn Submit) {
        let mut turn = Turn::of_start(io);
        self.base.wake(&mut turn.port(Side::Base, 0));
        self.store.wake(&mut turn.port(Side::Store, self.base_files));
        for side in [Side::Base, Side::Store] {
            self.absorb_all(side, None, &mut turn);
        }
        self.pump(&mut turn);
    }

    fn session(&self) -> Option<Arc<SessionMetrics>> {
        // The store is a file.
        self.base.session()
    }

    /// That of either, once the kernel has nothing of the other in flight.
    fn loss(&self) -> Option<&str> {
        let of_base = self.base.loss().filter(|_| self.store.in_flight() == 0);
        of_base.or_else(|| self.store.loss().filter(|_| self.base.in_flight() == 0))
    }
}
