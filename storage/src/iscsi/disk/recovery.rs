//! From one connection of a disk to the next, and out of its reactor.
#![expect(unsafe_code, reason = "a reactor hands the descriptor of a connection over")]

use std::net::SocketAddr;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::backend::Parting;
use crate::metrics::LeaseState;
use crate::reactor::Submit;
use crate::remote::connection::Leave;
use crate::remote::dialogue::Client as _;

use super::super::bringup::{self, Past, Stop, Up};

use super::super::initiator::Break;
use super::super::procedure::{Answer, Procedure, Progress};
use super::super::reservation;
use super::super::session::{Command, Transfer};
use super::super::unit::Unit;
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

/// Where a target has redirected to.
#[derive(Debug, Default)]
pub(super) struct Detour {
    to: Option<SocketAddr>,
    /// The connection was made there.
    is_taken: bool,
}

impl Disk {
    /// Begins to use a reactor.
    pub(super) fn begin(&mut self, io: &mut dyn Submit) {
        self.parting = None;
        self.is_released = false;
        if self.socket.is_some() {
            self.initiator.adopt(io);
            self.backoff.served(io.now());
            self.state = State::Serving;
        } else {
            self.unserved_since = Some(io.now());
            self.state = State::Resting(io.now());
        }
    }

    pub(super) fn connect(&mut self, io: &mut dyn Submit) {
        let portals = &self.plan.portals;
        let listed = portals.get(self.backoff.turn(portals.len())).copied();
        // Once: the next login begins where the user said.
        let elsewhere = self.detour.to.take();
        self.detour.is_taken = elsewhere.is_some();
        let portal = elsewhere.or(listed);
        let portal = portal.expect("an address was found when the image was opened");
        self.state = State::Connecting;
        self.initiator.connect(portal, self.backoff.patience(), io);
    }

    pub(super) fn connected(&mut self, io: &mut dyn Submit) {
        let State::Connecting = self.state else { return };
        let past = Past {
            unit: Some(self.unit.clone()),
            tenure: self.tenure.clone(),
            strays: self.strays,
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
                Progress::Asks(ask) => self.initiator.perform(ask, io.now()),
                Progress::Ends(Ok(up)) => self.is_up(up, io),
                Progress::Ends(Err(stop)) => self.stopped(stop, io),
            },
            State::Raising(procedure) => match procedure.step(answer) {
                Progress::Asks(ask) => self.initiator.perform(ask, io.now()),
                Progress::Ends(Ok(tenure)) => {
                    self.tenure = Some(tenure);
                    self.tell_of_lease(LeaseState::Held);
                    self.state = State::Serving;
                }
                Progress::Ends(Err(stop)) => self.stopped(stop, io),
            },
            State::Yielding(procedure) => match procedure.step(answer) {
                Progress::Asks(ask) => self.initiator.perform(ask, io.now()),
                Progress::Ends(()) => self.leave(After::Yield, Leave::Close, io),
            },
            State::Farewell(procedure) => match procedure.step(answer) {
                Progress::Asks(ask) => self.initiator.perform(ask, io.now()),
                Progress::Ends(()) => self.leave(After::End, Leave::Close, io),
            },
            // The connection is being left.
            _ => {}
        }
    }

    /// Makes the step that raises the generation, which has begun, while nothing else is under way.
    pub(super) fn begin_raise(&mut self, io: &mut dyn Submit) {
        let Some(tenure) = self.tenure.clone() else { return };
        let (plan, unit) = (self.plan.clone(), self.unit.clone());
        self.state = State::Raising(Procedure::new(|port| {
            reservation::raise(port, plan, unit, tenure)
        }));
        self.step(None, io);
    }

    fn is_up(&mut self, up: Up, io: &mut dyn Submit) {
        if let Some(since) = self.unserved_since.take() {
            log::info!(
                "{}: served again after {} ms",
                self.plan.name,
                (io.now() - since).as_millis()
            );
        }
        self.backoff.served(io.now());
        self.backoff.begun();
        self.detour.to = None;
        // What a guest was told of the disk stays, whatever the unit says now.
        self.unit = Unit {
            size_bytes: self.unit.size_bytes,
            limits: self.unit.limits.renewed(&up.unit.limits),
            ..up.unit
        };
        self.tenure = up.tenure;
        self.strays = false;
        self.tell_of_lease(LeaseState::Held);
        self.metrics.reconnects.add(1);
        self.rewriting = Some(Rewriting::new(&self.retained));
        self.state = State::Rewriting;
        self.rewrite();
    }

    fn stopped(&mut self, stop: Stop, io: &mut dyn Submit) {
        match stop {
            // It is our own last word, of which the answer was lost.
            Stop::Lost(reason) if self.is_released => {
                log::info!("{}: {reason}", self.plan.name);
                self.leave(After::End, Leave::Close, io);
            }
            Stop::Lost(reason) => {
                log::error!("{}: {reason}; nothing more is written", self.plan.name);
                self.leave(After::Loss(reason), Leave::Close, io);
            }
            Stop::Elsewhere(portal) => {
                log::info!("{}: redirected to {portal}", self.plan.name);
                if self.detour.is_taken {
                    // Back and forth, maybe without end.
                    self.backoff.failed(false);
                }
                self.detour.to = Some(portal);
                self.backoff.begun();
                self.leave(After::Reconnect, Leave::Close, io);
            }
            // An image that was open once waits for the target to be as it was.
            Stop::Later(reason) | Stop::Never(reason) => {
                self.unserved(&reason.to_string(), io);
                self.backoff.ended(false, io.now());
                self.leave(After::Reconnect, Leave::Close, io);
            }
        }
    }

    /// The session has to begin anew, though the connection is there.
    pub(super) fn doubt(&mut self, why: &str, io: &mut dyn Submit) {
        if let State::Leaving(_) = self.state {
            return;
        }
        self.unserved(why, io);
        self.backoff.ended(false, io.now());
        self.leave(After::Reconnect, Leave::Close, io);
    }

    pub(super) fn broken(&mut self, why: &Break, io: &mut dyn Submit) {
        if let State::Leaving(After::Move) = self.state {
            // The reactor cannot give its socket away.
            return self.leave(After::Move, Leave::Close, io);
        }
        if let State::Leaving(_) = self.state {
            return;
        }
        if let State::Yielding(_) = self.state {
            // It was to be left.
            return self.leave(After::Yield, Leave::Close, io);
        }
        self.unserved(&why.to_string(), io);
        self.backoff.ended(matches!(why, Break::Silent(_)), io.now());
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
        // The record may still be on its way to the medium.
        self.strays |= matches!(self.state, State::Raising(_));
        self.state = State::Leaving(after);
        self.initiator.leave(how, io);
        if self.initiator.is_closed() {
            self.closed(Vec::new(), io);
        }
    }

    pub(super) fn closed(&mut self, unfinished: Vec<Command>, io: &mut dyn Submit) {
        self.emptying = None;
        self.rewriting = None;
        // The last that keeps the connection from being reset.
        self.socket = None;
        self.strays |= unfinished.iter().any(|command| command.transfer == Transfer::Out);
        for command in unfinished {
            // Rewrites begin anew with the next session; flights go on with the command that they were at.
            if let Ok(place) = usize::try_from(command.cookie)
                && self.flights.get_mut(place).is_some()
            {
                self.flights.queue(place);
                self.metrics.retries.add(1);
            }
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
            (After::Reconnect, None) if self.is_yielded => State::Yielded,
            (After::Yield, None) => {
                self.tell_of_lease(LeaseState::Pending);
                State::Yielded
            }
            (After::Move | After::End | After::Yield, _) | (_, Some(Parting::Breaks | Parting::Moves)) => {
                State::Detached
            }
            (After::Reconnect, _) => State::Resting(io.now() + self.backoff.rest()),
        };
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
            (Some(_), State::Yielded) => self.state = State::Detached,
            (Some(Parting::Breaks), _) => self.leave(After::End, Leave::Close, io),
            (_, State::Resting(_)) if self.parting == Some(Parting::Moves) || !self.has_to_say_farewell() => {
                self.state = State::Detached;
            }
            (Some(Parting::Moves), State::Connecting | State::BringingUp(_)) => {
                self.leave(After::End, Leave::Close, io);
            }
            // Once it is served and idle: see `dispatch`.
            _ => {}
        }
    }

    fn has_to_say_farewell(&self) -> bool {
        self.tenure.is_some() || !self.retained.is_empty()
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
                let unit = self.unit.clone();
                self.state = State::Farewell(Procedure::new(|port| {
                    reservation::release(port, plan, unit, tenure)
                }));
                self.step(None, io);
            }
            Some(Parting::Breaks) | None => {}
        }
    }
}
