//! A file on a server as an image: reads in, READs out, and one connection after the other to carry them.

mod flight;
mod recovery;

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Access, Backend, Discard, Geometry, Parting, Step};
use crate::metrics::SessionMetrics;
use crate::nfs::bringup::Stop;
use crate::reactor::{Event, ImageFile, NO_FILE, Reach, Submit};
use crate::remote::backoff::Backoff;
use crate::remote::dialogue::Client as _;
use crate::remote::flights::Flights;
use crate::request::{Completion, Failure, Request, Segment};

use self::flight::{Flight, Next};
use self::recovery::After;
use super::bringup::File;
use super::client::{Client, Report};
use super::command::Ended;
use super::plan::Plan;
use super::procedure::Procedure;

/// An image in a file that is only read.
///
/// ```text
///              attach                       the same file is there
///   Detached ─────────► Resting ► Connecting ► BringingUp ──► Serving
///      ▲                  ▲                                     │ the connection breaks
///      │                  └──── Leaving, what was sent waits ◄──┤
///      └── Leaving ◄── detach ──────────────────────────────────┘
/// ```
///
/// Requests are accepted in each state, and wait for `Serving`. A READ that was sent on one connection and not answered is sent
/// again on the next: it changes nothing however often it is carried out, and a late answer has no connection to come by.
#[derive(Debug)]
pub(in crate::nfs) struct Disk {
    plan: Arc<Plan>,
    /// Who has given the file's handle.
    server: SocketAddr,
    geometry: Geometry,
    file: File,
    state: State,
    client: Client,
    flights: Flights<Flight>,
    /// Vectors of segments, to be used again.
    spare: Vec<Vec<Segment>>,
    /// The connection, while no reactor has it.
    socket: Option<OwnedFd>,
    backoff: Backoff,
    /// How it is to leave the reactor.
    parting: Option<Parting>,
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
    BringingUp(Procedure<Result<(), Stop>>),
    Serving,
    Leaving(After),
}

/// Vectors that are kept for later.
const SPARE_MAX: usize = 256;

impl Disk {
    /// The image of `plan`, which was found as `file` on `server`, on the connection that the client has.
    pub(super) fn new(plan: Arc<Plan>, server: SocketAddr, file: File, client: Client) -> Self {
        let geometry = Geometry {
            size_bytes: file.size_bytes,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            access: Access::ReadOnly,
            discard: Discard::Ignored,
        };
        let metrics = Arc::<SessionMetrics>::default();
        Self {
            server,
            geometry,
            file,
            state: State::Serving,
            client,
            flights: Flights::new(plan.report_after, Arc::clone(&metrics)),
            plan,
            spare: Vec::new(),
            socket: None,
            backoff: Backoff::default(),
            parting: None,
            unserved_since: None,
            metrics,
        }
    }

    /// Sends what may be sent.
    fn dispatch(&mut self, io: &mut dyn Submit) {
        if !matches!(self.state, State::Serving) {
            return;
        }
        while let Some(place) = self.flights.pop() {
            self.send(place, io);
        }
        if self.parting.is_some() && self.flights.is_empty() {
            self.part(io);
        }
    }

    fn send(&mut self, place: usize, io: &mut dyn Submit) {
        let segments = self.spare.pop().unwrap_or_default();
        if let Some(flight) = self.flights.get_mut(place) {
            let command = flight.command(place as u64, self.file.read_bytes_max, segments);
            self.client.start(command, io.now());
        }
    }

    /// Takes the end of a command in.
    fn ended(&mut self, mut ended: Ended, io: &mut dyn Submit) {
        let place = usize::try_from(ended.command.cookie).expect("this is a 64-bit monitor");
        let Some(flight) = self.flights.get_mut(place) else {
            return;
        };
        let next = flight.judge(&ended);
        self.recycle(std::mem::take(&mut ended.command.segments));
        match next {
            Next::Send if matches!(self.state, State::Serving) => self.send(place, io),
            Next::Send => self.flights.queue(place),
            Next::Later(time) => self.flights.put_off(place, io.now() + time),
            Next::Doubt(why) => {
                self.flights.queue(place);
                self.doubt(why, io);
            }
            Next::End(outcome) => self.end(place, outcome, io.now()),
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
        self.dispatch(io);
        self.client.pump(io);
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
        match Flight::begin(request, &self.geometry, io.now()) {
            Err((request, outcome)) => Step::Done(Completion { request, outcome }),
            Ok(flight) => {
                self.flights.accept(flight);
                // Sent with the others of this round, before the owner waits.
                Step::Pending
            }
        }
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) -> Step {
        self.client.resume(event, io);
        self.settle(io);
        self.flights.next_done().map_or(Step::Pending, Step::Done)
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        // One connection serves all queues.
        None
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.flights.next_done()
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
        self.client.pump(io);
    }

    fn reach(&self) -> Reach {
        Reach::FilesAndSockets
    }

    fn detach(&mut self, parting: Parting, io: &mut dyn Submit) {
        self.parting = Some(parting);
        self.part_or_wait(io);
        self.settle(io);
    }

    fn is_attached(&self) -> bool {
        !matches!(self.state, State::Detached)
    }

    fn alarm(&self) -> Option<Instant> {
        let resting = match self.state {
            State::Resting(until) => Some(until),
            State::Detached => return None,
            _ => None,
        };
        let alarms = [resting, self.flights.alarm(), self.client.alarm()];
        alarms.into_iter().flatten().min()
    }

    fn wake(&mut self, io: &mut dyn Submit) {
        let now = io.now();
        self.client.wake(now);
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
}
