//! A connection and the calls on it: what a server is asked, and what it answers.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::nfs::client::Break;
use crate::nfs::error::{NfsError, Unanswered};
use crate::nfs::rpc::Credential;
use crate::nfs::session::SessionError;
use crate::reactor::{Event, Submit};
use crate::remote::connection::{Happening, Leave};
use crate::remote::debt::Debt;
use crate::remote::dialogue::{self, Heard};

use super::calls::{Calls, News, ReadConnection};
use super::command::{Command, Ended};
use super::procedure::{Answer, Ask};

/// One server at a time.
///
/// ```text
///   closed ──connect──► connecting ──► Report::Connected: perform(…) ──► Ask::Aim: start(…)
///      ▲                                                                      │
///      └── Report::Abandoned, Report::Closed ◄── leave ◄── Report::Broken ◄───┘
/// ```
#[derive(Debug)]
pub(super) struct Client {
    connection: ReadConnection,
    calls: Calls,
    /// What a procedure sleeps until.
    sleeps_until: Option<Instant>,
    debt: Debt,
    reports: Vec<Report>,
}

/// What a client has to tell its owner.
#[derive(Debug)]
pub(super) enum Report {
    /// There is a connection: a procedure may begin.
    Connected,
    /// A procedure's question is answered.
    Answer(Answer),
    /// A command has ended.
    Ended(Ended),
    /// These commands have not ended, and will not.
    Abandoned(Vec<Command>),
    /// Nothing more comes of this connection: it is to be left.
    Broken(Break),
    /// The connection was left.
    Closed,
    /// The connection was left and goes on by this descriptor.
    Taken(RawFd),
}

impl Client {
    /// A client without a connection, whose calls are made by `credential`.
    pub(super) fn new(server: SocketAddr, credential: Arc<Credential>, now: Instant) -> Self {
        Self {
            connection: ReadConnection::new(server),
            calls: Calls::new(credential, now),
            sleeps_until: None,
            debt: Debt::default(),
            reports: Vec::new(),
        }
    }

    /// Goes on with the connection that was taken out of another reactor.
    pub(super) fn adopt(&mut self, io: &mut dyn Submit) {
        self.connection.adopt(io);
    }

    /// Sends a command. [`Report::Ended`] or [`Report::Abandoned`] follows.
    pub(super) fn start(&mut self, command: Command, now: Instant) {
        self.calls.start(command, &mut self.connection, now);
    }

    /// What has happened, in order.
    pub(super) fn reports(&mut self) -> impl Iterator<Item = Report> + use<> {
        std::mem::take(&mut self.reports).into_iter()
    }

    /// Whether there is something that [`Self::reports`] would give.
    pub(super) fn has_reports(&self) -> bool {
        !self.reports.is_empty()
    }

    fn is_open(&self) -> bool {
        self.connection.is_open()
    }

    fn take_news(&mut self, now: Instant) {
        while let Some(news) = self.calls.next_news() {
            match news {
                News::Ended(ended) => self.reports.push(Report::Ended(ended)),
                News::Answered(record) => {
                    self.debt.pay(now);
                    self.reports.push(Report::Answer(Answer::Record(record)));
                }
            }
        }
    }
}

impl dialogue::Client for Client {
    type Ask = Ask;
    type Answer = Answer;
    type SessionError = SessionError;
    type Error = NfsError;

    fn connect(&mut self, server: SocketAddr, patience: Duration, io: &mut dyn Submit) {
        self.debt.begin(patience, io.now());
        // A sign of life may have been asked for on a connection that was taken away.
        let _no_command = self.calls.disconnected();
        self.connection.open(server, io);
    }

    fn leave(&mut self, how: Leave, io: &mut dyn Submit) {
        self.debt.forgive();
        self.sleeps_until = None;
        self.connection.leave(how, io);
    }

    fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    fn perform(&mut self, ask: Ask, now: Instant) {
        match ask {
            Ask::Sleep(time) => self.sleeps_until = Some(now + time),
            Ask::Call(call) => {
                self.debt.incur(now);
                self.calls.ask(&call, &mut self.connection, now);
            }
            Ask::Aim(handle) => {
                self.calls.aim(handle);
                self.reports.push(Report::Answer(Answer::Done));
            }
        }
    }

    fn heard(&mut self) -> Vec<Heard<Answer, SessionError>> {
        let heard = self.reports().filter_map(|report| match report {
            Report::Connected => Some(Heard::Connected),
            Report::Answer(answer) => Some(Heard::Answer(answer)),
            Report::Broken(why) => Some(Heard::Broken(why)),
            Report::Ended(_) | Report::Abandoned(_) | Report::Closed | Report::Taken(_) => None,
        });
        heard.collect()
    }

    fn pump(&mut self, io: &mut dyn Submit) {
        self.connection.pump(io);
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) {
        let mut nobody: Vec<Infallible> = Vec::new();
        match self.connection.resume(event, &mut nobody, io) {
            None | Some(Happening::Sent) => {}
            Some(Happening::Connected) => {
                self.debt.forgive();
                self.reports.push(Report::Connected);
            }
            Some(Happening::Received) => {
                let received = self.calls.receive(&mut self.connection, io.now());
                self.take_news(io.now());
                if let Err(error) = received {
                    self.reports.push(Report::Broken(error.into()));
                }
            }
            Some(Happening::Broken(errno)) => self.reports.push(Report::Broken(Break::of(errno))),
            Some(Happening::Taken(fd)) => self.reports.push(Report::Taken(fd)),
            Some(Happening::Closed) => {
                let unfinished = self.calls.disconnected();
                if !unfinished.is_empty() {
                    self.reports.push(Report::Abandoned(unfinished));
                }
                self.reports.push(Report::Closed);
            }
        }
    }

    fn alarm(&self) -> Option<Instant> {
        let calls = self
            .is_open()
            .then(|| self.calls.alarm(self.debt.patience_with_session()));
        let alarms = [self.sleeps_until, self.debt.alarm(), calls.flatten()];
        alarms.into_iter().flatten().min()
    }

    fn wake(&mut self, now: Instant) {
        if self.sleeps_until.take_if(|until| *until <= now).is_some() {
            self.reports.push(Report::Answer(Answer::Done));
        }
        if let Some(silence) = self.debt.overdue(now) {
            self.reports.push(Report::Broken(Break::Silent(silence)));
            return;
        }
        let patience = self.debt.patience_with_session();
        if self.is_open()
            && let Err(error) = self.calls.beat(patience, &mut self.connection, now)
        {
            self.reports.push(Report::Broken(error.into()));
        }
    }

    fn unanswered(server: SocketAddr, why: Break) -> NfsError {
        NfsError::Server {
            server,
            source: Unanswered(why),
        }
    }

    fn redirected(server: SocketAddr) -> NfsError {
        NfsError::Moved { server }
    }
}
