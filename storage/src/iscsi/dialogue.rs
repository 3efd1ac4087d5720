//! A session whose end somebody waits for: to open an image, or to look at its lease.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::{Backend, Parting};
use crate::plain::Plain;
use crate::reactor::{NO_FILE, Patience, Reactor, Wake};

use super::bringup::{Stop, Up};
use super::connection::Leave;
use super::disk::Disk;
use super::error::{IscsiError, Unanswered};
use super::initiator::{Break, Initiator, Report};
use super::plan::Plan;
use super::procedure::{Port, Procedure, Progress};

/// A session on a reactor of its own.
pub(super) struct Dialogue<R> {
    plan: Arc<Plan>,
    initiator: Initiator,
    io: R,
    deadline: Instant,
    wakes: Vec<Wake>,
}

/// Operations of one connection in flight, with room to spare.
const OPS_MAX: u32 = 16;
/// How long a portal may take for each answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an operator waits at most.
pub(super) const OPERATOR_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to give back what was not used.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Between two attempts, where the next may do better.
const AGAIN_AFTER: Duration = Duration::from_millis(200);
/// How often that is tried.
const ATTEMPTS_MAX: u32 = 10;

/// Why one attempt came to nothing.
enum Failed {
    Break(Break),
    Stop(Stop),
}

/// A reactor for one dialogue, on plain system calls.
pub(super) fn plain() -> Plain {
    Plain::new(OPS_MAX)
}

impl<R: Reactor> Dialogue<R> {
    /// A dialogue on `io` that ends within `limit`.
    pub(super) fn new(mut io: R, plan: Arc<Plan>, limit: Duration) -> Result<Self, IscsiError> {
        io.register(&[NO_FILE])?;
        let portal = plan.portals.first().copied();
        let portal = portal.expect("a name that was resolved has an address");
        Ok(Self {
            initiator: Initiator::new(portal, plan.lun),
            plan,
            deadline: io.now() + limit,
            io,
            wakes: Vec::new(),
        })
    }

    /// Has a session with the first portal that answers, and runs `body` in it. The session goes on afterwards.
    ///
    /// # Errors
    ///
    /// Why it came to nothing on the last portal.
    pub(super) fn run<T, F>(&mut self, body: impl Fn(Port) -> F) -> Result<T, IscsiError>
    where
        F: Future<Output = Result<T, Stop>> + Send + 'static,
    {
        let portals = self.plan.portals.clone();
        let (mut attempts, mut elsewhere) = (0, None);
        for portal in portals.iter().copied().cycle() {
            attempts += 1;
            let portal = elsewhere.take().unwrap_or(portal);
            let last = match self.attempt(portal, Procedure::new(&body)) {
                Ok(outcome) => return Ok(outcome),
                Err(Failed::Stop(Stop::Never(error))) => {
                    self.leave()?;
                    return Err(error);
                }
                Err(Failed::Stop(Stop::Lost(_))) => unreachable!("nothing is lost before it was had"),
                Err(Failed::Stop(Stop::Later(error))) => error,
                Err(Failed::Stop(Stop::Elsewhere(portal))) => {
                    elsewhere = Some(portal);
                    IscsiError::Redirected { portal }
                }
                Err(Failed::Break(source)) => IscsiError::Portal {
                    portal,
                    source: Unanswered(source),
                },
            };
            self.leave()?;
            let is_round_over = attempts % u32::try_from(portals.len()).unwrap_or(1) == 0;
            let may_pass = !matches!(last, IscsiError::Portal { .. });
            if is_round_over && (!may_pass || attempts >= ATTEMPTS_MAX || self.io.now() >= self.deadline) {
                return Err(last);
            }
            if elsewhere.is_none() {
                self.rest(AGAIN_AFTER)?;
            }
        }
        unreachable!("there is a portal")
    }

    fn attempt<T>(
        &mut self,
        portal: SocketAddr,
        mut procedure: Procedure<Result<T, Stop>>,
    ) -> Result<T, Failed> {
        let begun = self.io.now();
        let patience = self
            .deadline
            .saturating_duration_since(self.io.now())
            .min(PATIENCE);
        self.initiator.connect(portal, patience, &mut self.io);
        loop {
            let mut progress = None;
            for report in self.initiator.reports() {
                match report {
                    Report::Connected => progress = Some(procedure.step(None)),
                    Report::Answer(answer) => progress = Some(procedure.step(Some(answer))),
                    Report::Broken(why) => return Err(Failed::Break(why)),
                    Report::Ended(_) | Report::Closed(_) | Report::Taken(_) => {}
                }
            }
            match progress {
                Some(Progress::Asks(ask)) => {
                    self.initiator.perform(ask, self.io.now());
                    continue;
                }
                Some(Progress::Ends(Ok(outcome))) => return Ok(outcome),
                Some(Progress::Ends(Err(stop))) => return Err(Failed::Stop(stop)),
                // A target that always has one more thing to say gets no more time than a silent one.
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
    fn rest(&mut self, time: Duration) -> Result<(), IscsiError> {
        let until = self.io.now() + time;
        while self.io.now() < until {
            self.io.set_timer(Some(until));
            self.io.wait(Patience::UntilEvent, &mut self.wakes)?;
            self.wakes.clear();
        }
        Ok(())
    }

    /// Leaves the connection, at once.
    fn leave(&mut self) -> Result<(), IscsiError> {
        self.initiator.leave(Leave::Close, &mut self.io);
        while !self.initiator.is_closed() {
            self.wait(None)?;
        }
        self.initiator.reports().for_each(drop);
        Ok(())
    }

    /// Waits until something has happened, or until `limit`.
    fn wait(&mut self, limit: Option<Instant>) -> Result<(), IscsiError> {
        self.initiator.pump(&mut self.io);
        let alarm = self.initiator.alarm();
        self.io.set_timer(alarm.into_iter().chain(limit).min());
        self.io.wait(Patience::UntilEvent, &mut self.wakes)?;
        for wake in self.wakes.drain(..) {
            if let Wake::Done(event) = wake {
                self.initiator.resume(event, &mut self.io);
            }
        }
        self.initiator.wake(self.io.now());
        Ok(())
    }

    /// The image that the session has found, out of this reactor.
    pub(super) fn into_disk(mut self, up: Up) -> Result<Disk, IscsiError> {
        let mut disk = Disk::new(self.plan, up, self.initiator);
        part(&mut disk, Parting::Moves, &mut self.io, self.deadline)?;
        Ok(disk)
    }
}

impl Drop for Disk {
    /// Gives a lease back that came with an open session and that no reactor has had, or has had to its end: whatever else
    /// there was to start has failed.
    fn drop(&mut self) {
        if self.holds_session()
            && let Err(error) = end(self)
        {
            log::warn!("an image that was not used is not given back in good order: {error}");
        }
    }
}

fn end(disk: &mut Disk) -> io::Result<()> {
    let mut reactor = plain();
    reactor.register(&disk.files())?;
    disk.attach(&mut reactor);
    part(disk, Parting::Ends, &mut reactor, Instant::now() + END_LIMIT)
}

/// Has a disk leave `io` within the time, or else at once.
fn part(disk: &mut Disk, parting: Parting, io: &mut dyn Reactor, deadline: Instant) -> io::Result<()> {
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
