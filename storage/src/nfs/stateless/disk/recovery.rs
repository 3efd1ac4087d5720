//! From one connection of a disk to the next, and out of its reactor.
#![expect(unsafe_code, reason = "a reactor hands the descriptor of a connection over")]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::backend::Parting;
use crate::nfs::bringup::Stop;
use crate::nfs::client::Break;
use crate::nfs::session::SessionError;
use crate::reactor::Submit;
use crate::remote::connection::Leave;
use crate::remote::dialogue::Client as _;

use super::super::bringup;
use super::super::command::Command;
use super::super::procedure::{Answer, Procedure, Progress};
use super::{Disk, State};

/// What comes after a connection was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// The next one.
    Reconnect,
    /// Another reactor goes on.
    Move,
    /// Nothing: it has left its reactor.
    End,
}

impl Disk {
    /// Begins to use a reactor.
    pub(super) fn begin(&mut self, io: &mut dyn Submit) {
        self.parting = None;
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
        self.state = State::Connecting;
        self.client.connect(self.server, self.backoff.patience(), io);
    }

    pub(super) fn connected(&mut self, io: &mut dyn Submit) {
        let State::Connecting = self.state else { return };
        let (plan, file) = (self.plan.clone(), self.file);
        self.state = State::BringingUp(Procedure::new(|port| bringup::find_again(port, plan, file)));
        self.step(None, io);
    }

    pub(super) fn answered(&mut self, answer: Answer, io: &mut dyn Submit) {
        self.step(Some(answer), io);
    }

    fn step(&mut self, answer: Option<Answer>, io: &mut dyn Submit) {
        // If not, the connection is being left.
        if let State::BringingUp(procedure) = &mut self.state {
            match procedure.step(answer) {
                Progress::Asks(ask) => self.client.perform(ask, io.now()),
                Progress::Ends(Ok(())) => self.serve(io),
                Progress::Ends(Err(stop)) => self.stopped(&stop, io),
            }
        }
    }

    /// The file is as it was, and what waits may be sent.
    fn serve(&mut self, io: &mut dyn Submit) {
        self.backoff.served(io.now());
        self.backoff.begun();
        self.metrics.reconnects.add(1);
        if let Some(since) = self.unserved_since.take() {
            let ms = (io.now() - since).as_millis();
            log::info!("{}: served again after {ms} ms", self.plan.name);
        }
        self.state = State::Serving;
    }

    /// An image that was open once waits for the server to be as it was.
    fn stopped(&mut self, stop: &Stop, io: &mut dyn Submit) {
        self.unserved(&stop.to_string(), io);
        self.backoff.ended(false, io.now());
        self.leave(After::Reconnect, Leave::Close, io);
    }

    /// The file is to be looked at anew, though the connection is there.
    pub(super) fn doubt(&mut self, why: &str, io: &mut dyn Submit) {
        if let State::Leaving(_) | State::Resting(_) | State::Detached = self.state {
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
        let was_silent = matches!(why, Break::Silent(_) | Break::Session(SessionError::Silent(_)));
        self.unserved(&why.to_string(), io);
        self.backoff.ended(was_silent, io.now());
        self.leave(After::Reconnect, Leave::Close, io);
    }

    /// Says that the disk waits, once.
    fn unserved(&mut self, why: &str, io: &mut dyn Submit) {
        if self.unserved_since.is_none() {
            self.unserved_since = Some(io.now());
            log::warn!("{}: {why}; its requests wait", self.plan.name);
        } else {
            log::debug!("{}: {why}", self.plan.name);
        }
    }

    fn leave(&mut self, after: After, how: Leave, io: &mut dyn Submit) {
        self.state = State::Leaving(after);
        self.client.leave(how, io);
        if self.client.is_closed() {
            self.closed(io);
        }
    }

    pub(super) fn closed(&mut self, io: &mut dyn Submit) {
        // The last that keeps the connection from being reset.
        self.socket = None;
        let State::Leaving(after) = std::mem::replace(&mut self.state, State::Detached) else {
            unreachable!("a connection is closed when it was left");
        };
        if after == After::Reconnect && self.parting.is_none() {
            self.state = State::Resting(io.now() + self.backoff.rest());
        }
    }

    /// Commands that come to nothing: they are sent again by the next connection.
    pub(super) fn abandoned(&mut self, commands: Vec<Command>) {
        for command in commands {
            if let Ok(place) = usize::try_from(command.cookie) {
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

    /// Leaves the reactor now, unless it is served: there is nothing to be said to a server before.
    pub(super) fn part_or_wait(&mut self, io: &mut dyn Submit) {
        match (self.parting, &self.state) {
            (None, _) | (_, State::Detached) => {}
            (Some(Parting::Breaks), _) => self.leave(After::End, Leave::Close, io),
            (Some(_), State::Resting(_)) => self.state = State::Detached,
            (Some(_), State::Connecting | State::BringingUp(_)) => self.leave(After::End, Leave::Close, io),
            // Once it is idle: see `dispatch`.
            (Some(_), State::Serving | State::Leaving(_)) => {}
        }
    }

    /// Leaves the reactor: the disk is served, and nothing is under way.
    pub(super) fn part(&mut self, io: &mut dyn Submit) {
        match self.parting {
            Some(Parting::Moves) => self.leave(After::Move, Leave::Take, io),
            Some(Parting::Ends) => self.leave(After::End, Leave::Close, io),
            Some(Parting::Breaks) | None => {}
        }
    }
}
