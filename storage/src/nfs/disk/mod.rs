//! A file on a server as an image: requests in, commands out, and one connection after the other to carry them.

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
use crate::remote::backoff::Backoff;
use crate::remote::dialogue::{self, Client as _};
use crate::remote::flights::{Chore, Flights};
use crate::remote::lease::Standing;
use crate::remote::retained::{Moment, Retained};
use crate::request::{Completion, Failure, Operation, Request, Segment};

use self::flight::{Flight, Life, Next, ZEROS_BYTES};
use self::handover::Fence;
use self::recovery::After;
use self::rewriting::Rewriting;
use super::bringup::{File, Stop, Up};
use super::client::{Client, Report};
use super::command::{Action, Command, Ended, Outcome};
use super::fence::Tenure;
use super::plan::Plan;
use super::procedure::Procedure;
use super::v4::SessionId;
use super::v4::status::{Verdict, verdict};

/// An image in a file, with the one session that serves it.
///
/// ```text
///              attach                       the session, what is open, the lease
///   Detached ─────────► Resting ► Connecting ► BringingUp ──► Rewriting ──► Serving
///      ▲                  ▲                                                   │ the connection breaks
///      │                  └──────────── Leaving, what was under way waits ◄───┤
///      ├── Leaving ◄── Farewell ◄── detach ───────────────────────────────────┤
///      └── Lost ◄── Leaving ◄── the lease is another's ◄──────────────────────┘
/// ```
///
/// In a hand-over ([`handover`]) the disk is `Yielding` and then `Yielded`, without a session, until it is taken back by a new
/// one or detached.
///
/// To raise the generation of the lease, for a request that has the disk to itself, the disk is `Raising` for a while instead of
/// `Serving`. If that breaks off, the step is made on the next connection, before anything else is.
///
/// Requests are accepted in each state, and wait for `Serving`. A session outlives its connection: what was sent in it and not
/// answered is sent again on the next, in the same slot with the same sequence id, so the server does it once. If the
/// session is gone, what the old connection may still deliver is refused, and what was answered and may have been forgotten is
/// written again before anything else.
#[derive(Debug)]
pub(crate) struct Disk {
    plan: Arc<Plan>,
    geometry: Geometry,
    file: File,
    tenure: Option<Tenure>,
    /// The record of the tenure, for whoever holds the image.
    standing: Standing,
    fence: Fence,
    state: State,
    client: Client,
    flights: Flights<Flight>,
    retained: Retained,
    life: Life,
    /// What a COMMIT of our own, which is under way, covers.
    emptying: Option<Moment>,
    /// The server was too busy for that, and is asked again then.
    empty_after: Option<Instant>,
    zeros: Box<[u8]>,
    /// Vectors of segments, to be used again.
    spare: Vec<Vec<Segment>>,
    /// The connection, while no reactor has it.
    socket: Option<OwnedFd>,
    backoff: Backoff,
    /// How it is to leave the reactor.
    parting: Option<Parting>,
    /// Its lease may be given back already.
    is_released: bool,
    /// What is open and locked may be so no more.
    is_doubtful: bool,
    /// The session is of no use any more, though the server may keep it.
    is_spent: bool,
    /// What this client has itself may be in its way.
    is_tangled: bool,
    /// The session with which the last connection began.
    joined: Option<SessionId>,
    /// When the server last said that something was revoked.
    revoked: Option<Instant>,
    /// Rewrites: the memory of those that were sent is used until their session is given up.
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
    Raising(Procedure<Result<Option<Tenure>, Stop>>),
    /// The fence is being taken down.
    Yielding(Procedure<Result<(), Stop>>),
    /// The fence is down, and there is no session.
    Yielded,
    /// Another has the lease, for this reason, and what is open here is in its way.
    Withdrawing(Procedure<()>, String),
    Leaving(After),
    Farewell(Procedure<()>),
    /// Another has the lease, for this reason.
    Lost(String),
}

/// Cookies of commands that are no flight's: a rewrite's have this bit, and the number of the rewrite below it.
const REWRITE: u64 = 1 << 32;
/// That of the COMMIT of our own.
const EMPTYING: u64 = 1 << 33;
/// An idle disk gives memory back after so long, when it looks after its server.
const TRIM_AFTER: Duration = Duration::from_secs(2);
/// How long a server that is too busy to commit is left alone.
const EMPTY_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Vectors that are kept for later.
const SPARE_MAX: usize = 256;

impl Disk {
    /// The image of `plan`, which `up` has found and leased, on the connection that the client has.
    pub(super) fn new(plan: Arc<Plan>, up: Up, client: Client) -> Self {
        let geometry = Geometry {
            size_bytes: up.file.size_bytes,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            access: plan.access,
            discard: if up.file.can_deallocate {
                Discard::Supported
            } else {
                Discard::Ignored
            },
        };
        let metrics = Arc::<SessionMetrics>::default();
        let life = Life::begins(up.file.life);
        let disk = Self {
            geometry,
            file: up.file,
            tenure: up.tenure,
            standing: Standing::default(),
            fence: Fence::Up,
            state: State::Serving,
            client,
            flights: Flights::new(plan.report_after, Arc::clone(&metrics)),
            retained: Retained::new(plan.uncommitted_bytes_max),
            life,
            plan,
            emptying: None,
            empty_after: None,
            zeros: Box::default(),
            spare: Vec::new(),
            socket: None,
            backoff: Backoff::default(),
            parting: None,
            is_released: false,
            is_doubtful: false,
            is_spent: false,
            is_tangled: false,
            joined: None,
            revoked: None,
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
        let record = self.tenure.as_ref().map(|tenure| tenure.record.clone());
        if self.fence == Fence::Up {
            self.standing.tell(record);
        }
        if let Some(tenure) = &self.tenure {
            self.metrics.lease_epoch.set(tenure.record.generation);
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
        if self.retained.is_filling() {
            self.empty_cache(io);
        }
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
            if self.flights.takes_room(place, &self.retained, is_full) {
                self.send(place, io);
            } else {
                is_full = true;
                self.empty_cache(io);
                self.flights.queue(place);
            }
        }
        if self.parting.is_some() && self.flights.is_empty() && self.emptying.is_none() {
            self.part(io);
        }
    }

    fn send(&mut self, place: usize, io: &mut dyn Submit) {
        let segments = self.spare.pop().unwrap_or_default();
        if self.zeros.is_empty() {
            self.zeros = vec![0; ZEROS_BYTES].into_boxed_slice();
        }
        let Some(flight) = self.flights.get_mut(place) else {
            return;
        };
        let command = flight.command(
            place as u64,
            &self.file,
            &self.retained,
            &mut self.zeros,
            segments,
        );
        self.client.start(command, io.now());
    }

    /// Goes on with a request that raises the generation, when nothing else is under way.
    fn raise(&mut self, place: usize, io: &mut dyn Submit) {
        let others = self.flights.under_way() > 1 || self.emptying.is_some();
        let (Some(tenure), Some(flight)) = (&mut self.tenure, self.flights.get_mut(place)) else {
            return self.end(place, Ok(()), io.now());
        };
        if flight.is_raised(tenure.record.generation) {
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

    /// Has the server commit what it was sent, unless nothing is kept of that or a COMMIT is under way or was just refused.
    fn empty_cache(&mut self, io: &mut dyn Submit) {
        if !self.retained.is_empty() && self.emptying.is_none() && self.empty_after.is_none() {
            self.emptying = Some(self.retained.now());
            let commit = Command {
                action: Action::Commit,
                segments: Vec::new(),
                cookie: EMPTYING,
            };
            self.client.start(commit, io.now());
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
        let next = flight.judge(&ended, &mut self.file, &mut self.retained, &mut self.life);
        self.recycle(std::mem::take(&mut ended.command.segments));
        match next {
            Next::Send if matches!(self.state, State::Serving) => self.send(place, io),
            Next::Send => self.flights.queue(place),
            Next::Later(time) => self.flights.put_off(place, io.now() + time),
            Next::Doubt(why) => {
                self.flights.queue(place);
                self.is_doubtful = true;
                self.doubt(why, io);
            }
            Next::Rewrite(why) => {
                self.flights.queue(place);
                self.doubt_life(why, io);
            }
            Next::End(outcome) => self.end(place, outcome, io.now()),
        }
    }

    fn emptied(&mut self, ended: &Ended, io: &mut dyn Submit) {
        let Some(moment) = self.emptying.take() else {
            return;
        };
        match ended.outcome {
            Ok(Outcome::Committed(verifier)) if self.life.goes_on(verifier) => self.retained.covered(moment),
            Ok(_) => self.doubt_life("the server has restarted since it was written to", io),
            Err(status) => match verdict(status) {
                Verdict::Later | Verdict::Grace => self.empty_after = Some(io.now() + EMPTY_AGAIN_AFTER),
                _ => {
                    self.is_doubtful = true;
                    self.doubt("the server does not commit what it was sent", io);
                }
            },
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
                self.file.size_bytes = flight.request.len_bytes;
            }
        }
        self.flights.end(place, outcome, now);
    }

    fn report(&mut self, report: Report, io: &mut dyn Submit) {
        match report {
            Report::Connected => self.connected(io),
            Report::Answer(answer) => self.answered(answer, io),
            Report::Ended(ended) => self.ended(ended, io),
            Report::Abandoned(commands) => self.abandoned(commands),
            Report::Broken(why) => self.broken(&why, io),
            Report::Closed => self.closed(io),
            Report::Taken(fd) => self.taken(fd),
        }
    }

    /// Tells everything that has happened to whom it concerns, until nothing more has.
    fn settle(&mut self, io: &mut dyn Submit) {
        while self.client.has_reports() {
            for report in self.client.reports() {
                self.report(report, io);
            }
        }
        self.flights.take_put_off(io.now());
        self.advance(io);
        self.metrics.outstanding.set(self.flights.under_way() as u64);
    }

    /// Sends what may be sent.
    fn advance(&mut self, io: &mut dyn Submit) {
        self.look_at_the_clock(io);
        self.dispatch(io);
        self.client.pump(io);
    }

    /// Leaves the connection when the lease may be over. To be called before anything may be sent: the process may have been
    /// stopped since that was queued.
    fn look_at_the_clock(&mut self, io: &mut dyn Submit) {
        let writes = matches!(self.state, State::Serving | State::Rewriting);
        if writes && !self.client.is_current(io.now()) {
            self.is_doubtful = true;
            self.doubt("the server may have given the image to others meanwhile", io);
        }
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
        if Chore::of(request.operation).is_some() && self.tenure.is_none() {
            let outcome = Ok(());
            return Step::Done(Completion { request, outcome });
        }
        match Flight::begin(request, &self.geometry, &self.file, now) {
            Err((request, outcome)) => Step::Done(Completion { request, outcome }),
            Ok(flight) => {
                self.flights.accept(flight);
                // Sent with the others of this round, before the owner waits.
                Step::Pending
            }
        }
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) -> Step {
        // A send that has ended is followed by the next at once.
        self.look_at_the_clock(io);
        self.client.resume(event, io);
        self.settle(io);
        self.flights.next_done().map_or(Step::Pending, Step::Done)
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        // One lock is held by one session: it serves all queues.
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
        self.advance(io);
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
            State::Lost(_) => !self.client.is_closed(),
            _ => true,
        }
    }

    fn alarm(&self) -> Option<Instant> {
        let resting = match self.state {
            State::Resting(until) => Some(until),
            State::Detached | State::Lost(_) => return None,
            _ => None,
        };
        let rewriting = match self.state {
            State::Rewriting => self.rewriting.as_ref().and_then(Rewriting::alarm),
            _ => None,
        };
        [
            resting,
            self.empty_after,
            rewriting,
            self.flights.alarm(),
            self.client.alarm(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn wake(&mut self, io: &mut dyn Submit) {
        let now = io.now();
        self.client.wake(now);
        if self.flights.has_rested(TRIM_AFTER, now) {
            self.retained.trim();
        }
        self.empty_after = self.empty_after.filter(|after| *after > now);
        if let State::Resting(until) = self.state
            && until <= now
        {
            self.connect(io);
        }
        self.rewrite(io);
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
