//! A logical unit as an image: requests in, commands out, and one session after the other to carry them.

mod flight;
mod handover;
mod recovery;
mod rewriting;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::{Access, Backend, Discard, Geometry, Parting, Step};
use crate::metrics::{LeaseState, SessionMetrics};
use crate::reactor::{Event, ImageFile, NO_FILE, Reach, Submit};
use crate::request::{Completion, Failure, Operation, Request, Segment};

use self::flight::{Flight, Next, ZEROS_BYTES};
use self::recovery::{After, Detour};
use self::rewriting::Rewriting;
use super::bringup::{Stop, Up};
use super::initiator::{Initiator, Report};
use super::plan::Plan;
use super::procedure::Procedure;
use super::reservation::Tenure;
use super::scsi::cdb::{self, Blocks};
use super::scsi::sense::{Attention, Verdict, verdict};
use super::session::{Command, Ended, Transfer};
use super::unit::{Cache, Unit};
use crate::remote::backoff::Backoff;
use crate::remote::dialogue::{self, Client as _};
use crate::remote::flights::{Chore, Flights};
use crate::remote::lease::Standing;
use crate::remote::retained::{Moment, Retained};

/// An image on a logical unit, with the one session that serves it.
///
/// ```text
///              attach                       the login, the identity, the lease
///   Detached ─────────► Resting ► Connecting ► BringingUp ──► Rewriting ──► Serving
///      ▲                  ▲                                                   │ the connection breaks
///      │                  └──────────── Leaving, what was under way waits ◄───┤
///      ├── Leaving ◄── Farewell ◄── detach ───────────────────────────────────┤
///      └── Lost ◄── Leaving ◄── the lease is another's ◄──────────────────────┘
/// ```
///
/// To raise the generation of the lease, for a request that has the disk to itself, the disk is `Raising` for a while instead of
/// `Serving`. If that breaks off, the step is made on the next connection, before anything else is.
///
/// In a hand-over ([`handover`]) the disk is `Yielding` and then `Yielded`, without a session, until it is taken back by a new
/// one or detached.
///
/// Requests are accepted in each state, and wait for `Serving`. What was sent and not answered when a connection broke is sent
/// again on the next: the same bytes to the same place. It cannot overtake what the old connection may still deliver, because
/// the next session begins by ending the registration of the old one, or by a reset of the unit. What was answered and may
/// have been forgotten is written again before anything else.
#[derive(Debug)]
pub(crate) struct Disk {
    plan: Arc<Plan>,
    geometry: Geometry,
    unit: Unit,
    tenure: Option<Tenure>,
    /// The record of the tenure, for whoever holds the image.
    standing: Standing,
    /// The unit may be another's: nothing logs in.
    is_yielded: bool,
    state: State,
    initiator: Initiator,
    flights: Flights<Flight>,
    retained: Retained,
    /// What a SYNCHRONIZE CACHE of our own, which is under way, covers.
    emptying: Option<Moment>,
    /// The unit was too busy for that, and is asked again then.
    empty_after: Option<Instant>,
    zeros: Box<[u8]>,
    /// Vectors of segments, to be used again.
    spare: Vec<Vec<Segment>>,
    /// The connection, while no reactor has it.
    socket: Option<OwnedFd>,
    backoff: Backoff,
    detour: Detour,
    /// How it is to leave the reactor.
    parting: Option<Parting>,
    /// Its lease may be given back already.
    is_released: bool,
    /// Changes that a connection which was left may still deliver: those of requests, of requests that were given up, and of
    /// rewrites.
    strays: bool,
    /// Rewrites: the memory of those that were sent is used until their connection is closed.
    rewriting: Option<Rewriting>,
    /// Since when it is not served.
    unserved_since: Option<Instant>,
    metrics: Arc<SessionMetrics>,
}

#[derive(Debug)]
enum State {
    /// No reactor has it.
    Detached,
    /// The next connection is made at this time.
    Resting(Instant),
    Connecting,
    BringingUp(Procedure<Result<Up, Stop>>),
    Rewriting,
    Serving,
    Raising(Procedure<Result<Tenure, Stop>>),
    /// The target is being left.
    Yielding(Procedure<()>),
    /// There is no session.
    Yielded,
    Leaving(After),
    Farewell(Procedure<()>),
    /// Another has the lease, for this reason.
    Lost(String),
}

/// Cookies of commands that are no flight's: a rewrite's have this bit, and the number of the rewrite below it.
const REWRITE: u64 = 1 << 32;
/// That of the SYNCHRONIZE CACHE of our own.
const EMPTYING: u64 = 1 << 33;
/// An idle disk gives memory back after so long, when it looks after its target.
const TRIM_AFTER: Duration = Duration::from_secs(2);
/// How long a unit that is too busy to empty its cache is left alone.
const EMPTY_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Vectors that are kept for later.
const SPARE_MAX: usize = 256;

impl Disk {
    /// The image of `plan`, which `up` has found and leased, on the connection `socket` or on one that is yet to be made.
    pub(super) fn new(plan: Arc<Plan>, up: Up, initiator: Initiator) -> Self {
        let geometry = Geometry {
            size_bytes: up.unit.size_bytes,
            logical_block_bytes: up.unit.block_bytes,
            physical_block_bytes: up.unit.physical_block_bytes,
            access: plan.access,
            discard: match up.unit.limits.unmap_blocks {
                0 => Discard::Ignored,
                _ => Discard::Supported,
            },
        };
        let metrics = Arc::<SessionMetrics>::default();
        let disk = Self {
            geometry,
            unit: up.unit,
            tenure: up.tenure,
            standing: Standing::default(),
            is_yielded: false,
            state: State::Serving,
            initiator,
            flights: Flights::new(plan.report_after, Arc::clone(&metrics)),
            retained: Retained::new(plan.uncommitted_bytes_max),
            plan,
            emptying: None,
            empty_after: None,
            zeros: Box::default(),
            spare: Vec::new(),
            socket: None,
            backoff: Backoff::default(),
            detour: Detour::default(),
            parting: None,
            is_released: false,
            strays: false,
            rewriting: None,
            unserved_since: None,
            metrics,
        };
        disk.tell_of_lease(LeaseState::Held);
        disk
    }

    /// What it tells whoever holds the image.
    pub(super) fn standing(&self) -> Standing {
        self.standing.clone()
    }

    /// Tells whoever holds the image or reads the metrics how it stands with the lease, if there is one.
    fn tell_of_lease(&self, state: LeaseState) {
        let record = self.tenure.as_ref().and_then(|tenure| tenure.record.clone());
        if !self.is_yielded {
            self.standing.tell(record);
        }
        if let Some(tenure) = &self.tenure {
            self.metrics.lease_epoch.set(tenure.generation());
            self.metrics.set_lease_state(state);
        }
    }

    /// Whether it has an open session that no reactor has.
    fn holds_session(&self) -> bool {
        self.socket.is_some() && matches!(self.state, State::Detached)
    }

    /// Sends what may be sent.
    fn dispatch(&mut self, io: &mut dyn Submit) {
        match self.state {
            State::Serving => {}
            State::Yielded => return self.has_yielded(io),
            _ => return,
        }
        self.empty_cache_if_due();
        // Once around, so that those that have to wait keep their order, and the queue its memory.
        let mut is_full = false;
        for _ in 0..self.flights.queued() {
            let Some(place) = self.flights.pop() else {
                break;
            };
            if let Some(chore) = self.flights.chore(place) {
                match chore {
                    Chore::Raise => self.raise(place, io),
                    Chore::Yield => self.yield_fence(place, io),
                    Chore::TakeBack => self.end(place, Ok(()), io.now()),
                }
                if !matches!(self.state, State::Serving) {
                    return;
                }
                continue;
            }
            // What the unit cannot forget needs no copy. (Nor does FUA, which waits for the medium with every write.)
            if self.unit.cache() == Cache::None || self.flights.takes_room(place, &self.retained, is_full) {
                self.send(place);
            } else {
                is_full = true;
                self.empty_cache();
                self.flights.queue(place);
            }
        }
        if self.parting.is_some() && self.flights.is_empty() && self.emptying.is_none() {
            self.part(io);
        }
    }

    fn send(&mut self, place: usize) {
        let segments = self.spare.pop().unwrap_or_default();
        if self.zeros.is_empty() {
            self.zeros = vec![0; ZEROS_BYTES].into_boxed_slice();
        }
        let Some(flight) = self.flights.get_mut(place) else {
            return;
        };
        let command = flight.command(
            place as u64,
            &self.unit,
            &self.retained,
            &mut self.zeros,
            segments,
        );
        self.initiator.start(command);
    }

    /// Goes on with a request that raises the generation, when nothing else is under way.
    fn raise(&mut self, place: usize, io: &mut dyn Submit) {
        let others = self.flights.under_way() > 1 || self.emptying.is_some();
        let (Some(tenure), Some(flight)) = (&mut self.tenure, self.flights.get_mut(place)) else {
            return self.end(place, Ok(()), io.now());
        };
        if flight.is_raised(tenure.generation()) {
            return self.end(place, Ok(()), io.now());
        }
        if others {
            return self.flights.queue(place);
        }
        if !tenure.begin() {
            return self.end(place, Err(Failure::Host(libc::EOVERFLOW)), io.now());
        }
        self.begin_raise(io);
        match self.state {
            // At once: the records are on this host.
            State::Serving => self.end(place, Ok(()), io.now()),
            _ => self.flights.queue(place),
        }
    }

    /// Has the unit empty its cache before there is no room for copies any more.
    fn empty_cache_if_due(&mut self) {
        if self.retained.is_filling() {
            self.empty_cache();
        }
    }

    /// Has the unit empty its cache, unless nothing is there or that is under way or was just refused.
    fn empty_cache(&mut self) {
        if !self.retained.is_empty() && self.emptying.is_none() && self.empty_after.is_none() {
            self.emptying = Some(self.retained.now());
            self.initiator.start(Command {
                cdb: cdb::synchronize_cache(Blocks::ALL),
                transfer: Transfer::None,
                segments: Vec::new(),
                cookie: EMPTYING,
            });
        }
    }

    /// Takes the end of a command in.
    fn ended(&mut self, mut ended: Ended, io: &mut dyn Submit) {
        let cookie = ended.command.cookie;
        if cookie & REWRITE != 0 {
            return self.rewritten(&ended, io);
        }
        if cookie == EMPTYING {
            return self.emptied(&ended, io);
        }
        let place = usize::try_from(cookie).expect("this is a 64-bit monitor");
        let Some(flight) = self.flights.get_mut(place) else {
            return;
        };
        let next = flight.judge(&ended, &mut self.unit, &mut self.retained);
        self.recycle(std::mem::take(&mut ended.command.segments));
        match next {
            Next::Send if matches!(self.state, State::Serving) => self.send(place),
            Next::Send => self.flights.queue(place),
            Next::Later(time) => {
                self.flights.put_off(place, io.now() + time);
            }
            Next::Reconnect(why) => {
                self.flights.queue(place);
                self.doubt(why, io);
            }
            Next::End(outcome) => self.end(place, outcome, io.now()),
        }
    }

    fn emptied(&mut self, ended: &Ended, io: &mut dyn Submit) {
        let Some(moment) = self.emptying.take() else {
            return;
        };
        match verdict(ended.status, ended.sense) {
            Verdict::Good => self.retained.covered(moment),
            // It has none, whatever it says.
            Verdict::Failed(Failure::Unsupported) => {
                self.unit.has_no_cache();
                self.retained.covered(self.retained.now());
            }
            Verdict::BusyLater => self.empty_after = Some(io.now() + EMPTY_AGAIN_AFTER),
            Verdict::Retry(Attention::Parameters | Attention::Identity | Attention::Other)
            | Verdict::CapacityChanged
            | Verdict::ReservationChanged => {}
            _ => self.doubt("the unit does not empty its cache", io),
        }
    }

    fn recycle(&mut self, mut segments: Vec<Segment>) {
        if segments.capacity() > 0 && self.spare.len() < SPARE_MAX {
            segments.clear();
            self.spare.push(segments);
        }
    }

    fn end(&mut self, place: usize, outcome: Result<(), Failure>, now: Instant) {
        if outcome.is_ok() {
            self.backoff.request_ended();
            if let Some(flight) = self.flights.get_mut(place)
                && flight.request.operation == Operation::Grow
            {
                self.geometry.size_bytes = flight.request.len_bytes;
                self.unit.size_bytes = flight.request.len_bytes;
            }
        }
        self.flights.end(place, outcome, now);
    }

    fn report(&mut self, report: Report, io: &mut dyn Submit) {
        match report {
            Report::Connected => self.connected(io),
            Report::Answer(answer) => self.answered(answer, io),
            Report::Ended(ended) => self.ended(ended, io),
            Report::Broken(why) => self.broken(&why, io),
            Report::Closed(unfinished) => self.closed(unfinished, io),
            Report::Taken(fd) => self.taken(fd),
        }
    }

    /// Tells everything that has happened to whom it concerns, until nothing more has.
    fn settle(&mut self, io: &mut dyn Submit) {
        while self.initiator.has_reports() {
            for report in self.initiator.reports() {
                self.report(report, io);
            }
        }
        self.flights.take_put_off(io.now());
        self.dispatch(io);
        self.initiator.pump(io);
        self.metrics.outstanding.set(self.flights.under_way() as u64);
    }
}

impl Backend for Disk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The socket, or something in its place: a reactor makes the next one there.
    fn files(&self) -> Vec<ImageFile> {
        vec![self.socket.as_ref().map_or(NO_FILE, AsRawFd::as_raw_fd).into()]
    }

    fn start(&mut self, request: Request, io: &mut dyn Submit) -> Step {
        let now = io.now();
        let has_record = self.tenure.as_ref().is_some_and(|tenure| tenure.record.is_some());
        if Chore::of(request.operation).is_some() && !has_record {
            let outcome = Ok(());
            return Step::Done(Completion { request, outcome });
        }
        match Flight::begin(request, &self.geometry, &self.unit, now) {
            Err((request, outcome)) => Step::Done(Completion { request, outcome }),
            Ok(flight) => {
                self.flights.accept(flight);
                // Sent with the others of this round, before the owner waits.
                Step::Pending
            }
        }
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) -> Step {
        self.initiator.resume(event, io);
        self.settle(io);
        self.flights.next_done().map_or(Step::Pending, Step::Done)
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        // One nexus has the reservation: one session serves all queues.
        None
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.flights.next_done()
    }

    fn flushes_at_end(&self) -> bool {
        !self.retained.is_empty() && self.geometry.access == Access::ReadWrite
    }

    fn in_flight(&self) -> usize {
        self.flights.in_flight()
    }

    fn attach(&mut self, io: &mut dyn Submit) {
        self.begin(io);
        self.settle(io);
    }

    fn before_wait(&mut self, io: &mut dyn Submit) {
        self.dispatch(io);
        self.initiator.pump(io);
    }

    fn reach(&self) -> Reach {
        Reach::of_remote(self.plan.chain.is_some())
    }

    fn detach(&mut self, parting: Parting, io: &mut dyn Submit) {
        self.parting = Some(parting);
        self.part_or_wait(io);
        self.settle(io);
    }

    fn is_attached(&self) -> bool {
        match &self.state {
            State::Detached => false,
            State::Lost(_) => !self.initiator.is_closed(),
            _ => true,
        }
    }

    fn alarm(&self) -> Option<Instant> {
        let resting = match self.state {
            State::Resting(until) => Some(until),
            State::Detached | State::Lost(_) => return None,
            _ => None,
        };
        [
            resting,
            self.empty_after,
            self.flights.alarm(),
            self.initiator.alarm(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn wake(&mut self, io: &mut dyn Submit) {
        let now = io.now();
        self.initiator.wake(now);
        if self.flights.has_rested(TRIM_AFTER, now) {
            self.retained.trim();
        }
        self.empty_after = self.empty_after.filter(|after| *after > now);
        if let State::Resting(until) = self.state
            && until <= now
        {
            self.connect(io);
        }
        self.settle(io);
        if self.flights.report_overdue(now) {
            self.doubt("a request takes longer than `timeout_ms`", io);
        }
        self.settle(io);
    }

    fn session(&self) -> Option<Arc<SessionMetrics>> {
        Some(Arc::clone(&self.metrics))
    }

    fn loss(&self) -> Option<&str> {
        match &self.state {
            State::Lost(reason) => Some(reason),
            _ => None,
        }
    }
}

impl Drop for Disk {
    /// Gives a lease back that came with an open session and that no reactor has had, or has had to its end: whatever else
    /// there was to start has failed.
    fn drop(&mut self) {
        if self.holds_session()
            && let Err(error) = dialogue::end(self)
        {
            log::warn!("an image that was not used is not given back in good order: {error}");
        }
    }
}
