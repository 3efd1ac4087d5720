//! From one connection of a disk to the next, and out of its reactor.
#![expect(unsafe_code, reason = "a reactor hands the descriptor of a connection over")]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::backend::Parting;
use crate::metrics::LeaseState;
use crate::reactor::Submit;
use crate::remote::connection::Leave;
use crate::remote::dialogue::Client as _;

use super::super::bringup::{self, File, Past, Stop, Up};
use super::super::client::Break;
use super::super::command::Command;
use super::super::error::NfsError;
use super::super::fence;
use super::super::procedure::{Answer, Procedure, Progress};
use super::super::session::SessionError;
use super::flight::Life;
use super::handover::Fence;
use super::rewriting::Rewriting;
use super::{Disk, State};

/// What comes after a connection was left.
#[derive(Debug)]
pub(super) enum After {
    /// The next one.
    Reconnect,
    /// Nothing: another has the lease.
    Loss(String),
    /// Nothing for now: another may take the lease.
    Yield,
    /// Another reactor goes on.
    Move,
    /// Nothing: it has left its reactor.
    End,
}

/// A server that says so soon again that something was revoked, though that was looked after, says it each time.
const REVOKED_AGAIN: Duration = Duration::from_secs(5);

impl Disk {
    /// Begins to use a reactor.
    pub(super) fn begin(&mut self, io: &mut dyn Submit) {
        self.parting = None;
        self.is_released = false;
        if self.socket.is_some() {
            self.client.adopt(io);
            self.backoff.served(io.now());
            self.state = State::Serving;
        } else {
            self.unserved_since = Some(io.now());
            self.state = State::Resting(io.now());
        }
    }

    pub(super) fn connect(&mut self, io: &mut dyn Submit) {
        let servers = &self.plan.servers;
        let server = servers.get(self.backoff.turn(servers.len())).copied();
        let server = server.expect("an address was found when the image was opened");
        self.state = State::Connecting;
        self.client.reconnect(server, self.backoff.patience(), io);
    }

    pub(super) fn connected(&mut self, io: &mut dyn Submit) {
        let State::Connecting = self.state else { return };
        self.joined = self.client.session_id();
        if self.fence == Fence::Down {
            return self.yield_again(io);
        }
        let past = Past {
            file: Some(self.file.clone()),
            tenure: self.tenure.clone(),
            session: self.joined,
            is_doubtful: self.is_doubtful || !self.client.is_current(io.now()),
            is_spent: self.is_spent,
            is_tangled: self.is_tangled,
            was_yielded: self.fence == Fence::Returns,
        };
        let plan = self.plan.clone();
        self.state = State::BringingUp(Procedure::new(|port| bringup::bring_up(port, plan, past)));
        self.step(None, io);
    }

    pub(super) fn answered(&mut self, answer: Answer, io: &mut dyn Submit) {
        self.step(Some(answer), io);
    }

    pub(super) fn step(&mut self, answer: Option<Answer>, io: &mut dyn Submit) {
        match &mut self.state {
            State::BringingUp(procedure) => match procedure.step(answer) {
                Progress::Asks(ask) => self.client.perform(ask, io.now()),
                Progress::Ends(Ok(up)) => self.is_up(up, io),
                Progress::Ends(Err(stop)) => self.stopped(stop, io),
            },
            State::Raising(procedure) => match procedure.step(answer) {
                Progress::Asks(ask) => self.client.perform(ask, io.now()),
                Progress::Ends(Ok(tenure)) => {
                    self.tenure = tenure;
                    self.serve(io);
                }
                Progress::Ends(Err(stop)) => self.stopped(stop, io),
            },
            State::Yielding(procedure) => match procedure.step(answer) {
                Progress::Asks(ask) => self.client.perform(ask, io.now()),
                Progress::Ends(Ok(())) => self.leave(After::Yield, Leave::Close, io),
                Progress::Ends(Err(stop)) => self.stopped(stop, io),
            },
            State::Withdrawing(procedure, reason) => match procedure.step(answer) {
                Progress::Asks(ask) => self.client.perform(ask, io.now()),
                Progress::Ends(()) => {
                    let reason = std::mem::take(reason);
                    self.leave(After::Loss(reason), Leave::Close, io);
                }
            },
            State::Farewell(procedure) => match procedure.step(answer) {
                Progress::Asks(ask) => self.client.perform(ask, io.now()),
                Progress::Ends(()) => self.leave(After::End, Leave::Close, io),
            },
            // The connection is being left.
            _ => {}
        }
    }

    /// Makes the step that raises the generation, which has begun, while nothing else is under way.
    pub(super) fn begin_raise(&mut self, io: &mut dyn Submit) {
        let plan = self.plan.clone();
        let (file, tenure) = (self.file.clone(), self.tenure.clone());
        self.state = State::Raising(Procedure::new(|port| async move {
            fence::raise(&port, &plan, &file, tenure).await
        }));
        self.step(None, io);
    }

    fn is_up(&mut self, up: Up, io: &mut dyn Submit) {
        self.backoff.served(io.now());
        self.backoff.begun();
        // What a guest was told of the disk stays, whatever the server says now.
        self.file = File {
            size_bytes: self.file.size_bytes,
            can_deallocate: self.file.can_deallocate,
            ..up.file
        };
        self.tenure = up.tenure;
        self.fence = Fence::Up;
        (self.is_doubtful, self.is_spent, self.is_tangled) = (false, false, false);
        self.metrics.reconnects.add(1);
        if up.goes_on {
            self.serve(io);
        } else {
            self.life = Life::begins(self.file.life);
            self.rewriting = Some(Rewriting::new(&self.retained));
            self.state = State::Rewriting;
            self.rewrite(io);
        }
    }

    /// Everything is as it was, and what waits may be sent.
    pub(super) fn serve(&mut self, io: &mut dyn Submit) {
        if let Some(since) = self.unserved_since.take() {
            let ms = (io.now() - since).as_millis();
            log::info!("{}: served again after {ms} ms", self.plan.name);
        }
        self.tell_of_lease(LeaseState::Held);
        self.state = State::Serving;
    }

    fn stopped(&mut self, stop: Stop, io: &mut dyn Submit) {
        match stop {
            // It is our own last word, of which the answer was lost.
            Stop::Lost(reason) if self.is_released => {
                log::info!("{}: {reason}", self.plan.name);
                // What it has open and locked may still be there, and in the way of the next.
                let plan = self.plan.clone();
                self.state = State::Farewell(Procedure::new(|port| fence::vanish(port, plan)));
                self.step(None, io);
            }
            Stop::Lost(reason) if self.is_taken() => {
                log::error!("{}: {reason}; nothing was written", self.plan.name);
                let plan = self.plan.clone();
                let vanish = Procedure::new(|port| fence::vanish(port, plan));
                self.state = State::Withdrawing(vanish, reason);
                self.step(None, io);
            }
            Stop::Lost(reason) => {
                log::error!("{}: {reason}; nothing more is written", self.plan.name);
                self.leave(After::Loss(reason), Leave::Close, io);
            }
            // An image that was open once waits for the server to be as it was.
            stop @ (Stop::Later(_) | Stop::Never(_) | Stop::Elsewhere(_)) => {
                // What is in the way may be an open of our own, whose answer was lost.
                if let Stop::Later(NfsError::InUse { .. } | NfsError::SameRight { .. }) = stop {
                    (self.is_spent, self.is_tangled) = (true, true);
                }
                self.unserved(&stop.to_string(), io);
                self.backoff.ended(false, io.now());
                self.leave(After::Reconnect, Leave::Close, io);
            }
        }
    }

    /// The right to go on is to be proved anew, though the connection is there.
    pub(super) fn doubt(&mut self, why: &str, io: &mut dyn Submit) {
        if let State::Leaving(_) = self.state {
            return;
        }
        self.unserved(why, io);
        self.backoff.ended(false, io.now());
        self.leave(After::Reconnect, Leave::Close, io);
    }

    /// The server is not the one that acknowledged what is kept here: that is written again, in a new session.
    pub(super) fn doubt_life(&mut self, why: &str, io: &mut dyn Submit) {
        self.is_spent = true;
        self.doubt(why, io);
    }

    pub(super) fn broken(&mut self, why: &Break, io: &mut dyn Submit) {
        if let State::Leaving(After::Move) = self.state {
            // The reactor cannot give its socket away.
            return self.leave(After::Move, Leave::Close, io);
        }
        if let State::Leaving(_) = self.state {
            return;
        }
        if let State::Withdrawing(_, reason) = &mut self.state {
            let reason = std::mem::take(reason);
            return self.leave(After::Loss(reason), Leave::Close, io);
        }
        match why {
            Break::Session(SessionError::Expired(_)) => self.is_doubtful = true,
            Break::Session(SessionError::Revoked) => {
                self.is_doubtful = true;
                let now = io.now();
                let last = self.revoked.replace(now);
                if last.is_some_and(|last| now - last < REVOKED_AGAIN) {
                    // Something is revoked that is not known here, and never freed.
                    (self.is_spent, self.is_tangled) = (true, true);
                }
            }
            Break::Session(SessionError::Refused(_)) => self.is_spent = true,
            _ => {}
        }
        let was_silent = matches!(why, Break::Silent(_) | Break::Session(SessionError::Silent(_)));
        self.unserved(&why.to_string(), io);
        self.backoff.ended(was_silent, io.now());
        self.leave(After::Reconnect, Leave::Close, io);
    }

    /// Says that the disk waits, once.
    fn unserved(&mut self, why: &str, io: &mut dyn Submit) {
        if self.unserved_since.is_none() {
            self.unserved_since = Some(io.now());
            self.tell_of_lease(LeaseState::Pending);
            log::warn!("{}: {why}; its requests wait", self.plan.name);
        } else {
            log::debug!("{}: {why}", self.plan.name);
        }
    }

    fn leave(&mut self, after: After, how: Leave, io: &mut dyn Submit) {
        // A session in which not everything was done is none to go on with.
        self.is_spent |= match self.state {
            State::BringingUp(_) | State::Farewell(_) => self.client.session_id() != self.joined,
            State::Rewriting => true,
            _ => false,
        };
        self.state = State::Leaving(after);
        self.client.leave(how, io);
        if self.client.is_closed() {
            self.closed(io);
        }
    }

    pub(super) fn closed(&mut self, io: &mut dyn Submit) {
        // The last that keeps the connection from being reset.
        self.socket = None;
        if self.plan.report_after.is_some() {
            // Those that wait too long are reported, and the others go on.
            let withdrawn = self.client.withdraw();
            self.abandoned(withdrawn);
        }
        let State::Leaving(after) = std::mem::replace(&mut self.state, State::Detached) else {
            unreachable!("a connection is closed when it was left");
        };
        self.state = match (after, self.parting) {
            (After::Loss(reason), _) => {
                self.tell_of_lease(LeaseState::Lost);
                self.flights.end_chores(io.now());
                State::Lost(reason)
            }
            (After::Yield, None) => {
                self.forget_session();
                State::Yielded
            }
            (After::Move | After::End | After::Yield, _) | (_, Some(Parting::Breaks | Parting::Moves)) => {
                State::Detached
            }
            (After::Reconnect, _) => State::Resting(io.now() + self.backoff.rest()),
        };
    }

    /// Commands that come to nothing: rewrites begin anew with the next session, flights go on with what they were at.
    pub(super) fn abandoned(&mut self, commands: Vec<Command>) {
        for command in commands {
            if command.cookie == super::EMPTYING {
                self.emptying = None;
            }
            if let Ok(place) = usize::try_from(command.cookie)
                && self.flights.get(place).is_some()
            {
                self.flights.queue(place);
                self.metrics.retries.add(1);
            }
        }
    }

    pub(super) fn taken(&mut self, fd: RawFd) {
        // SAFETY: the reactor made the descriptor for us just now.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // It may have been hurried meanwhile; then nothing goes on.
        self.socket = (self.parting == Some(Parting::Moves)).then_some(socket);
        self.state = State::Detached;
    }

    /// Leaves the reactor now, if that is possible.
    pub(super) fn part_or_wait(&mut self, io: &mut dyn Submit) {
        match (self.parting, &self.state) {
            (None, _) | (_, State::Detached | State::Lost(_)) => {}
            (Some(_), State::Yielded) | (Some(Parting::Moves), State::Resting(_)) => {
                self.state = State::Detached
            }
            (Some(Parting::Breaks), _) => self.leave(After::End, Leave::Close, io),
            (Some(Parting::Moves), State::Connecting | State::BringingUp(_)) => {
                self.leave(After::End, Leave::Close, io);
            }
            // Once it is served and idle: see `dispatch`.
            _ => {}
        }
    }

    /// Leaves the reactor: the disk is served, and nothing is under way.
    pub(super) fn part(&mut self, io: &mut dyn Submit) {
        match self.parting {
            Some(Parting::Moves) => self.leave(After::Move, Leave::Take, io),
            Some(Parting::Ends) => {
                // Kept: if the connection breaks, the next one does it again.
                let tenure = self.tenure.clone();
                self.is_released = true;
                let plan = self.plan.clone();
                let file = self.file.clone();
                self.state = State::Farewell(Procedure::new(|port| fence::release(port, plan, file, tenure)));
                self.step(None, io);
            }
            Some(Parting::Breaks) | None => {}
        }
    }
}
