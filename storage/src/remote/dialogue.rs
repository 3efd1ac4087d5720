//! A session whose end somebody waits for: to open an image, or to look at its lease.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::backend::{Backend, Parting};
use crate::plain::Plain;
use crate::reactor::{Event, NO_FILE, Patience, Reactor, Submit, Wake};

use super::connection::Leave;
use super::procedure::{Port, Procedure, Progress};

/// The client of a protocol: one connection after the other, and the session on it.
pub(crate) trait Client {
    /// What its procedures ask for.
    type Ask: Unpin + Send + 'static;
    /// What they are told.
    type Answer: Send + 'static;
    /// What makes a session useless.
    type SessionError;
    /// What a user is told.
    type Error: From<io::Error>;

    /// Begins to connect. Each answer on this connection may take as long as `patience`.
    fn connect(&mut self, server: SocketAddr, patience: Duration, io: &mut dyn Submit);

    /// Begins to leave the connection.
    fn leave(&mut self, how: Leave, io: &mut dyn Submit);

    /// Whether no connection is left.
    fn is_closed(&self) -> bool;

    /// Does what a procedure asks for. [`Heard::Answer`] follows.
    fn perform(&mut self, ask: Self::Ask, now: Instant);

    /// What has happened since the last call.
    fn heard(&mut self) -> Vec<Heard<Self::Answer, Self::SessionError>>;

    /// Gives the reactor what was queued.
    fn pump(&mut self, io: &mut dyn Submit);

    /// Takes the end of one of its operations in.
    fn resume(&mut self, event: Event, io: &mut dyn Submit);

    /// When [`Self::wake`] is to be called.
    fn alarm(&self) -> Option<Instant>;

    /// Takes the time in.
    fn wake(&mut self, now: Instant);

    /// What a user is told of a server with which there is no conversation.
    fn unanswered(server: SocketAddr, why: Break<Self::SessionError>) -> Self::Error;

    /// What a user is told of a server that redirects, if nothing comes of it.
    fn redirected(server: SocketAddr) -> Self::Error;
}

/// What has happened to a client, as far as a dialogue is concerned.
#[derive(Debug)]
pub(crate) enum Heard<A, E> {
    /// There is a connection: the procedure may begin.
    Connected,
    /// Its question is answered.
    Answer(A),
    /// Nothing more comes of this connection.
    Broken(Break<E>),
}

/// Why a connection is of no more use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Break<E> {
    /// The network says so.
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Network(i32),
    /// The server has closed it.
    #[error("the server closed the connection")]
    End,
    /// There is no answer to what was asked.
    #[error("no answer for {} ms", .0.as_millis())]
    Silent(Duration),
    /// What it sent is of no use.
    #[error(transparent)]
    Session(#[from] E),
}

impl<E> Break<E> {
    /// That of a connection that ended with this errno; 0 is its proper end.
    pub(crate) fn of(errno: i32) -> Self {
        match errno {
            0 => Self::End,
            errno => Self::Network(errno),
        }
    }
}

/// Why a session was not begun.
#[derive(Debug)]
pub(crate) enum Stop<E> {
    /// It may be better next time.
    Later(E),
    /// It will not be, unless somebody does something about it.
    Never(E),
    /// The server is to be looked for there.
    Elsewhere(SocketAddr),
    /// The lease is another's: for good.
    Lost(String),
}

impl<E: Error> fmt::Display for Stop<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Later(error) | Self::Never(error) => {
                write!(f, "{error}")?;
                let causes = std::iter::successors(error.source(), |&cause| cause.source());
                causes.into_iter().try_for_each(|cause| write!(f, ": {cause}"))
            }
            Self::Elsewhere(server) => write!(f, "the server redirects to {server}"),
            Self::Lost(reason) => f.write_str(reason),
        }
    }
}

/// A session on a reactor of its own.
pub(crate) struct Dialogue<R, C> {
    servers: Vec<SocketAddr>,
    client: C,
    io: R,
    deadline: Instant,
    wakes: Vec<Wake>,
}

/// Operations of one connection in flight, with room to spare.
const OPS_MAX: u32 = 16;
/// How long a server may take for each answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an operator waits at most.
pub(crate) const OPERATOR_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to give back what was not used.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Between two attempts, where the next may do better.
const AGAIN_AFTER: Duration = Duration::from_millis(200);
/// How often that is tried.
const ATTEMPTS_MAX: u32 = 10;

/// Why one attempt came to nothing.
enum Failed<C: Client> {
    Break(Break<C::SessionError>),
    Stop(Stop<C::Error>),
}

/// A procedure of a client, which ends with a `T` or without a session.
type Conversation<C, T> =
    Procedure<<C as Client>::Ask, <C as Client>::Answer, Result<T, Stop<<C as Client>::Error>>>;

/// A reactor for one dialogue, on plain system calls.
pub(crate) fn plain() -> Plain {
    Plain::new(OPS_MAX)
}

impl<R: Reactor, C: Client> Dialogue<R, C> {
    /// A dialogue of `client` on `io`, with the first of `servers` that answers, that ends within `limit`.
    pub(crate) fn new(
        mut io: R,
        client: C,
        servers: Vec<SocketAddr>,
        limit: Duration,
    ) -> Result<Self, C::Error> {
        io.register(&[NO_FILE.into()])?;
        assert!(!servers.is_empty(), "a name that was resolved has an address");
        Ok(Self {
            servers,
            client,
            deadline: io.now() + limit,
            io,
            wakes: Vec::new(),
        })
    }

    /// Has a session with the first server that answers, and runs `body` in it. The session goes on afterwards.
    ///
    /// # Errors
    ///
    /// Why it came to nothing on the last server.
    pub(crate) fn run<T, F>(&mut self, body: impl Fn(Port<C::Ask, C::Answer>) -> F) -> Result<T, C::Error>
    where
        F: Future<Output = Result<T, Stop<C::Error>>> + Send + 'static,
    {
        let servers = self.servers.clone();
        let (mut attempts, mut elsewhere) = (0, None);
        for server in servers.iter().copied().cycle() {
            attempts += 1;
            let mut may_pass = true;
            let server = elsewhere.take().unwrap_or(server);
            let last = match self.attempt(server, Procedure::new(&body)) {
                Ok(outcome) => return Ok(outcome),
                Err(Failed::Stop(Stop::Never(error))) => {
                    self.leave()?;
                    return Err(error);
                }
                Err(Failed::Stop(Stop::Lost(_))) => unreachable!("nothing is lost before it was had"),
                Err(Failed::Stop(Stop::Later(error))) => error,
                Err(Failed::Stop(Stop::Elsewhere(server))) => {
                    elsewhere = Some(server);
                    C::redirected(server)
                }
                Err(Failed::Break(why)) => {
                    may_pass = false;
                    C::unanswered(server, why)
                }
            };
            self.leave()?;
            let is_round_over = attempts % u32::try_from(servers.len()).unwrap_or(1) == 0;
            if is_round_over && (!may_pass || attempts >= ATTEMPTS_MAX || self.io.now() >= self.deadline) {
                return Err(last);
            }
            if elsewhere.is_none() {
                self.rest(AGAIN_AFTER)?;
            }
        }
        unreachable!("there is a server")
    }

    fn attempt<T>(&mut self, server: SocketAddr, mut procedure: Conversation<C, T>) -> Result<T, Failed<C>> {
        let begun = self.io.now();
        let patience = self
            .deadline
            .saturating_duration_since(self.io.now())
            .min(PATIENCE);
        self.client.connect(server, patience, &mut self.io);
        loop {
            let mut progress = None;
            for heard in self.client.heard() {
                match heard {
                    Heard::Connected => progress = Some(procedure.step(None)),
                    Heard::Answer(answer) => progress = Some(procedure.step(Some(answer))),
                    Heard::Broken(why) => return Err(Failed::Break(why)),
                }
            }
            match progress {
                Some(Progress::Asks(ask)) => {
                    self.client.perform(ask, self.io.now());
                    continue;
                }
                Some(Progress::Ends(Ok(outcome))) => return Ok(outcome),
                Some(Progress::Ends(Err(stop))) => return Err(Failed::Stop(stop)),
                // A server that always has one more thing to say gets no more time than a silent one.
                None if self.io.now() >= self.deadline => {
                    return Err(Failed::Break(Break::Silent(self.io.now() - begun)));
                }
                None => {
                    let limit = Some(self.deadline);
                    self.wait(limit)
                        .map_err(|error| Failed::Stop(Stop::Never(error)))?;
                }
            }
        }
    }

    /// Lets time pass between two connections.
    fn rest(&mut self, time: Duration) -> Result<(), C::Error> {
        let until = self.io.now() + time;
        while self.io.now() < until {
            self.io.set_timer(Some(until));
            self.io.wait(Patience::UntilEvent, &mut self.wakes)?;
            self.wakes.clear();
        }
        Ok(())
    }

    /// Leaves the connection, at once.
    fn leave(&mut self) -> Result<(), C::Error> {
        self.client.leave(Leave::Close, &mut self.io);
        while !self.client.is_closed() {
            self.wait(None)?;
        }
        self.client.heard();
        Ok(())
    }

    /// Waits until something has happened, or until `limit`.
    fn wait(&mut self, limit: Option<Instant>) -> Result<(), C::Error> {
        self.client.pump(&mut self.io);
        let alarm = self.client.alarm();
        self.io.set_timer(alarm.into_iter().chain(limit).min());
        self.io.wait(Patience::UntilEvent, &mut self.wakes)?;
        for wake in self.wakes.drain(..) {
            if let Wake::Done(event) = wake {
                self.client.resume(event, &mut self.io);
            }
        }
        self.client.wake(self.io.now());
        Ok(())
    }

    /// The image that `disk` makes of the client and what its session has found, out of this reactor.
    pub(crate) fn into_disk<D: Backend>(mut self, disk: impl FnOnce(C) -> D) -> Result<D, C::Error> {
        let mut disk = disk(self.client);
        part(&mut disk, Parting::Moves, &mut self.io, self.deadline)?;
        Ok(disk)
    }
}

/// Ends an image in good order that no reactor has.
pub(crate) fn end(disk: &mut dyn Backend) -> io::Result<()> {
    let mut reactor = plain();
    reactor.register(&disk.files())?;
    disk.attach(&mut reactor);
    let deadline = reactor.now() + END_LIMIT;
    part(disk, Parting::Ends, &mut reactor, deadline)
}

/// Has a disk leave `io` within the time, or else at once.
fn part(disk: &mut dyn Backend, parting: Parting, io: &mut dyn Reactor, deadline: Instant) -> io::Result<()> {
    let mut wakes = Vec::new();
    disk.detach(parting, io);
    let mut is_late = false;
    while disk.is_attached() {
        let now = io.now();
        if now >= deadline && !is_late {
            is_late = true;
            disk.detach(Parting::Breaks, io);
            continue;
        }
        disk.before_wait(io);
        let alarm = disk.alarm();
        let limit = (!is_late).then_some(deadline);
        io.set_timer(alarm.into_iter().chain(limit).min());
        io.wait(Patience::UntilEvent, &mut wakes)?;
        for wake in wakes.drain(..) {
            if let Wake::Done(event) = wake {
                let _nothing_was_started = disk.resume(event, io);
            }
        }
        disk.wake(io);
    }
    Ok(())
}
