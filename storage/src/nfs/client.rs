//! A connection and the session on it: what a server is asked, and what it answers.

use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use crate::reactor::{Event, Submit};
use crate::remote::connection::{Happening, Leave};
use crate::remote::debt::Debt;
use crate::remote::dialogue::{self, Heard};

use super::command::{Command, Ended};
use super::error::{NfsError, Unanswered};
use super::inbox::Item;
use super::procedure::{Answer, Ask, Scope};
use super::rpc::{self, Direction, Record};
use super::session::{Manner, News, NfsConnection, Session, SessionError, call_header};
use super::v4::{Arguments, Compound, Operations, SessionId};
use super::xdr::{Reader, Writer};
use super::xid::Xid;

/// One server at a time.
///
/// ```text
///   closed ──connect──► connecting ──► Report::Connected: perform(…) ──► a session begins or goes on: perform, start
///      ▲                                                                            │
///      └───────────── Report::Closed; the session stays, with its calls ◄── leave ◄─┘ Report::Broken
/// ```
#[derive(Debug)]
pub(super) struct Client {
    connection: NfsConnection,
    session: Option<Session>,
    /// The session goes on with the connection that there is.
    is_resumed: bool,
    /// The session ends with the answer to the question.
    is_ending: bool,
    /// What a procedure waits for.
    question: Option<Question>,
    debt: Debt,
    /// The number of the next call outside of a session.
    serial: u32,
    returned: Vec<usize>,
    reports: Vec<Report>,
}

#[derive(Debug)]
enum Question {
    Call(Xid),
    /// Waits for the control slot.
    Waiting(Operations),
    CallInSession,
    Sleep(Instant),
}

/// What a client has to tell its owner.
#[derive(Debug)]
pub(super) enum Report {
    /// There is a connection: a session may begin.
    Connected,
    /// A procedure's question is answered.
    Answer(Answer),
    /// A command has ended.
    Ended(Ended),
    /// These commands have not ended, and will not: their session was given up.
    Abandoned(Vec<Command>),
    /// Nothing more comes of this connection: it is to be left.
    Broken(Break),
    /// The connection was left.
    Closed,
    /// The connection was left and goes on by this descriptor.
    Taken(RawFd),
}

/// Why a connection is of no more use.
pub(super) type Break = dialogue::Break<SessionError>;

impl Client {
    /// A client without a connection.
    pub(super) fn new(server: SocketAddr) -> Self {
        let mut random = [0; 4];
        crate::lease::fill_random(&mut random);
        Self {
            connection: NfsConnection::new(server),
            session: None,
            is_resumed: false,
            is_ending: false,
            question: None,
            debt: Debt::default(),
            serial: u32::from_ne_bytes(random),
            returned: Vec::new(),
            reports: Vec::new(),
        }
    }

    /// Begins to connect, to go on with the session that there may be. Each answer on this connection may take as long as
    /// `patience`.
    pub(super) fn reconnect(&mut self, server: SocketAddr, patience: Duration, io: &mut dyn Submit) {
        self.debt.begin(patience, io.now());
        self.is_resumed = false;
        self.connection.open(server, io);
    }

    /// Goes on with the connection that was taken out of another reactor.
    pub(super) fn adopt(&mut self, io: &mut dyn Submit) {
        self.connection.adopt(io);
    }

    /// The session that may go on with the next connection.
    pub(super) fn session_id(&self) -> Option<SessionId> {
        self.session.as_ref().map(Session::id)
    }

    /// Whether the server certainly keeps what this client has: only then may anything be written.
    pub(super) fn is_current(&self, now: Instant) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.is_current(now))
    }

    /// Gives the session up, while no connection carries it; its commands are returned.
    pub(super) fn give_up(&mut self) -> Vec<Command> {
        let session = self.session.take();
        session.map(Session::into_unfinished).unwrap_or_default()
    }

    /// Takes every command back that was not answered, while no connection carries it. Each is done once at most, and not any
    /// more when others are sent.
    pub(super) fn withdraw(&mut self) -> Vec<Command> {
        self.session.as_mut().map(Session::withdraw).unwrap_or_default()
    }

    fn done(&mut self) {
        self.debt.forgive();
        self.reports.push(Report::Answer(Answer::Done));
    }

    /// Sends a command. [`Report::Ended`] or [`Report::Abandoned`] follows.
    pub(super) fn start(&mut self, command: Command, now: Instant) {
        let session = self.session.as_mut();
        session
            .expect("commands are sent in a session")
            .start(command, &mut self.connection, now);
    }

    /// Sends a compound by itself.
    fn call(&mut self, manner: &Manner, operations: &Operations) -> Xid {
        self.serial = self.serial.wrapping_add(1);
        let xid = Xid::new(self.serial, 0, false);
        let mut writer = Writer::default();
        let record = Record::begin(&mut writer);
        call_header(manner, xid).put(&mut writer);
        let mut compound = Compound::new(&mut writer, "", manner.minor_version);
        compound.append(operations);
        compound.finish();
        record.finish(&mut writer, 0);
        self.connection.outbox().write(writer.bytes());
        xid
    }

    /// Asks what waits for the control slot, if that is free.
    fn ask_in_session(&mut self, now: Instant) {
        let waiting = self
            .question
            .take_if(|question| matches!(question, Question::Waiting(_)));
        let Some(Question::Waiting(operations)) = waiting else {
            return;
        };
        let session = self
            .session
            .as_mut()
            .expect("a session begins before anything is asked in it");
        self.question = Some(match session.ask(operations, &mut self.connection, now) {
            Ok(()) => Question::CallInSession,
            Err(operations) => Question::Waiting(operations),
        });
    }

    /// What has happened, in order.
    pub(super) fn reports(&mut self) -> impl Iterator<Item = Report> + use<> {
        std::mem::take(&mut self.reports).into_iter()
    }

    /// Whether there is something that [`Self::reports`] would give.
    pub(super) fn has_reports(&self) -> bool {
        !self.reports.is_empty()
    }

    fn goes_on(&self) -> bool {
        self.is_resumed && self.connection.is_open()
    }

    fn receive(&mut self, now: Instant) -> Result<(), SessionError> {
        if self.is_resumed
            && let Some(session) = &mut self.session
        {
            session.receive(&mut self.connection, now)?;
            self.ask_in_session(now);
            return Ok(());
        }
        while let Some(item) = self.connection.inbox_mut().next()? {
            let Item::Record(record) = item else {
                return Err(SessionError::Protocol("data that was not asked for"));
            };
            if Direction::of(&record)? == Direction::Call {
                return Err(SessionError::Protocol("it calls before there is a session"));
            }
            let reply = rpc::Reply::parse(&mut Reader::new(&record))?;
            if !matches!(self.question, Some(Question::Call(xid)) if xid.0 == reply.xid) {
                return Err(SessionError::Protocol("an answer to what was not asked"));
            }
            self.answer(Answer::Record(record, Scope::Alone), now);
        }
        Ok(())
    }

    fn take_news(&mut self, now: Instant) {
        while let Some(news) = self.session.as_mut().and_then(Session::next_news) {
            match news {
                News::Ended(ended) => self.reports.push(Report::Ended(ended)),
                News::Answered(_) if std::mem::take(&mut self.is_ending) => {
                    // Whatever it says: the server forgets the session, now or with the lease.
                    let unfinished = self.give_up();
                    if !unfinished.is_empty() {
                        self.reports.push(Report::Abandoned(unfinished));
                    }
                    self.is_resumed = false;
                    self.answer(Answer::Done, now);
                }
                News::Answered(record) => {
                    if let Some(Question::CallInSession) = self.question {
                        self.answer(Answer::Record(record, Scope::InSession), now);
                    }
                }
            }
        }
    }

    fn answer(&mut self, answer: Answer, now: Instant) {
        self.question = None;
        self.debt.pay(now);
        self.reports.push(Report::Answer(answer));
    }
}

impl dialogue::Client for Client {
    type Ask = Ask;
    type Answer = Answer;
    type SessionError = SessionError;
    type Error = NfsError;

    fn connect(&mut self, server: SocketAddr, patience: Duration, io: &mut dyn Submit) {
        // Each attempt of a dialogue begins anew.
        let _none_was_started = self.give_up();
        self.reconnect(server, patience, io);
    }

    fn leave(&mut self, how: Leave, io: &mut dyn Submit) {
        self.debt.forgive();
        self.connection.leave(how, io);
    }

    fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    fn perform(&mut self, ask: Ask, now: Instant) {
        assert!(self.question.is_none(), "a procedure asks one thing at a time");
        match ask {
            Ask::Sleep(time) => {
                self.debt.forgive();
                self.question = Some(Question::Sleep(now + time));
            }
            Ask::Call(manner, operations) => {
                self.debt.incur(now);
                let xid = self.call(&manner, &operations);
                self.question = Some(Question::Call(xid));
            }
            Ask::CallInSession(operations) => {
                self.debt.incur(now);
                self.question = Some(Question::Waiting(operations));
                self.ask_in_session(now);
            }
            Ask::Begin(mut terms) => {
                let unfinished = self.give_up();
                if !unfinished.is_empty() {
                    self.reports.push(Report::Abandoned(unfinished));
                }
                terms.patience = self.debt.patience_with_session();
                self.session = Some(Session::new(*terms, self.serial, now));
                self.is_resumed = true;
                self.done();
            }
            Ask::Rejoin => {
                if let Some(session) = &mut self.session {
                    session.rejoin(&mut self.connection, now);
                    self.is_resumed = true;
                }
                self.done();
            }
            Ask::Replay => {
                let session = self.session.as_mut();
                let session = session.expect("a session is joined before anything is sent again");
                // The way here may have taken longer than the lease lasts: then the right to write is to be proved first.
                if let Some(error) = session.expired(now) {
                    self.reports.push(Report::Broken(error.into()));
                } else {
                    session.replay(&mut self.connection, now);
                    self.done();
                }
            }
            Ask::DestroySession => {
                let id = self.session_id().expect("a session begins before it ends");
                let destroy = Operations::new().then(&Arguments::DestroySession(id));
                self.debt.incur(now);
                self.is_ending = true;
                self.question = Some(Question::Waiting(destroy));
                self.ask_in_session(now);
            }
            Ask::SetLease(lease) => {
                if let Some(session) = &mut self.session {
                    session.set_lease(lease);
                }
                self.done();
            }
            Ask::Aim(target) => {
                if let Some(session) = &mut self.session {
                    session.aim(target);
                }
                self.done();
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
        let happening = self.connection.resume(event, &mut self.returned, io);
        match &mut self.session {
            Some(session) => session.returned(&mut self.returned, &mut self.connection, io.now()),
            None => self.returned.clear(),
        }
        match happening {
            None | Some(Happening::Sent) => {}
            Some(Happening::Connected) => {
                // A session is asked for at once.
                self.debt.forgive();
                self.reports.push(Report::Connected);
            }
            Some(Happening::Received) => {
                if let Err(error) = self.receive(io.now()) {
                    self.reports.push(Report::Broken(error.into()));
                }
            }
            Some(Happening::Broken(errno)) => self.reports.push(Report::Broken(Break::of(errno))),
            Some(Happening::Taken(fd)) => self.reports.push(Report::Taken(fd)),
            Some(Happening::Closed) => {
                self.question = None;
                (self.is_resumed, self.is_ending) = (false, false);
                if let Some(session) = &mut self.session {
                    session.disconnected();
                }
                self.take_news(io.now());
                self.reports.push(Report::Closed);
            }
        }
        self.take_news(io.now());
    }

    fn alarm(&self) -> Option<Instant> {
        let slept = match self.question {
            Some(Question::Sleep(until)) => Some(until),
            _ => None,
        };
        let session = match (&self.session, self.goes_on()) {
            (Some(session), true) => Some(session.alarm(&self.connection)),
            _ => None,
        };
        [slept, self.debt.alarm(), session].into_iter().flatten().min()
    }

    fn wake(&mut self, now: Instant) {
        if let Some(Question::Sleep(until)) = self.question
            && until <= now
        {
            self.question = None;
            self.reports.push(Report::Answer(Answer::Done));
        }
        if let Some(silence) = self.debt.overdue(now) {
            self.reports.push(Report::Broken(Break::Silent(silence)));
            return;
        }
        if self.goes_on()
            && let Some(session) = &mut self.session
            && let Err(error) = session.beat(&mut self.connection, now)
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
