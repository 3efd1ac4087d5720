//! A connection and the session on it: what a target is asked, and what it answers.

use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use crate::reactor::{Event, Submit};
use crate::remote::connection::{Happening, Leave};
use crate::remote::debt::Debt;
use crate::remote::dialogue::{self, Heard};
use crate::segments;

use super::digest::DigestKind;
use super::error::{IscsiError, Unanswered};
use super::inbox::Item;
use super::link::{Link, Payload};
use super::login::Negotiated;
use super::pdu::{Lun, Tag, TargetPdu};
use super::procedure::{Answer, Ask, Data, Reply};
use super::session::{Command, Digests, Ended, News, Session, SessionError, Transfer};

/// One target at a time.
///
/// ```text
///   closed ──connect──► connecting ──► Report::Connected: perform(login …) ──► full feature: perform, start
///      ▲                                                                            │
///      └───────────────── Report::Closed, with every unfinished command ◄── leave ◄─┘ Report::Broken
/// ```
#[derive(Debug)]
pub(super) struct Initiator {
    connection: Link,
    session: Option<Session>,
    lun: Lun,
    /// What a procedure waits for.
    question: Option<Question>,
    debt: Debt,
    returned: Vec<Tag>,
    reports: Vec<Report>,
}

#[derive(Debug)]
enum Question {
    Login,
    Command(Vec<u8>),
    Reset,
    Logout,
    Sleep(Instant),
}

/// What an initiator has to tell its owner.
#[derive(Debug)]
pub(super) enum Report {
    /// There is a connection: the login may begin.
    Connected,
    /// A procedure's question is answered.
    Answer(Answer),
    /// A command has ended.
    Ended(Ended),
    /// Nothing more comes of this connection: it is to be left.
    Broken(Break),
    /// The connection was left. These commands have not ended; nothing uses their memory any more.
    Closed(Vec<Command>),
    /// The connection was left and goes on by this descriptor.
    Taken(RawFd),
}

/// Why a connection is of no more use.
pub(super) type Break = dialogue::Break<SessionError>;

/// The cookie of a procedure's command; no request has so high a number.
const PROCEDURE: u64 = u64::MAX;
impl Initiator {
    /// An initiator of sessions with `lun`, without a connection.
    pub(super) fn new(portal: SocketAddr, lun: Lun) -> Self {
        Self {
            connection: Link::new(portal),
            session: None,
            lun,
            question: None,
            debt: Debt::default(),
            returned: Vec::new(),
            reports: Vec::new(),
        }
    }

    /// Goes on with the connection that was taken out of another reactor.
    pub(super) fn adopt(&mut self, io: &mut dyn Submit) {
        self.connection.adopt(io);
    }

    /// Sends a command. [`Report::Ended`] or [`Report::Closed`] follows.
    pub(super) fn start(&mut self, command: Command) {
        let session = self.session.as_mut();
        session
            .expect("commands are sent in the full-feature phase")
            .start(command, &mut self.connection);
    }

    fn with_session(&mut self, act: impl FnOnce(&mut Session, &mut Link)) {
        let session = self.session.as_mut();
        act(session.expect("a login comes before it"), &mut self.connection);
    }

    fn begin_session(&mut self, terms: Negotiated, now: Instant) {
        self.connection.inbox_mut().set_digests(Digests {
            header: terms.header_digest == DigestKind::Crc32c,
            data: terms.data_digest == DigestKind::Crc32c,
        });
        let patience = self.debt.patience_with_session();
        self.session = Some(Session::new(terms, self.lun, patience, now));
    }

    /// What has happened, in order.
    pub(super) fn reports(&mut self) -> impl Iterator<Item = Report> + use<> {
        std::mem::take(&mut self.reports).into_iter()
    }

    /// Whether there is something that [`Self::reports`] would give.
    pub(super) fn has_reports(&self) -> bool {
        !self.reports.is_empty()
    }

    fn receive(&mut self, now: Instant) -> Result<(), SessionError> {
        if let Some(session) = &mut self.session {
            return session.receive(&mut self.connection, now);
        }
        while let Some(item) = self.connection.inbox_mut().next()? {
            let Item::Pdu(TargetPdu::LoginResponse(response), text) = item else {
                return Err(SessionError::Protocol("a login is answered by something else"));
            };
            let Some(Question::Login) = self.question.take() else {
                return Err(SessionError::Protocol("a login response that nobody asked for"));
            };
            self.debt.pay(now);
            self.reports.push(Report::Answer(Answer::Login(response, text)));
        }
        Ok(())
    }

    fn take_news(&mut self, now: Instant) {
        while let Some(news) = self.session.as_mut().and_then(Session::next_news) {
            match news {
                News::Ended(ended) if ended.command.cookie == PROCEDURE => {
                    let Some(Question::Command(mut data)) = self.question.take() else {
                        continue;
                    };
                    data.truncate(usize::try_from(ended.moved_bytes).unwrap_or(0));
                    let reply = Reply {
                        status: ended.status,
                        sense: ended.sense,
                        data,
                    };
                    self.answer(Answer::Command(reply), now);
                }
                News::Ended(ended) => self.reports.push(Report::Ended(ended)),
                News::Reset(outcome) => {
                    if let Some(Question::Reset) = self.question {
                        self.answer(Answer::Reset(outcome), now);
                    }
                }
                News::LoggedOut => {
                    if let Some(Question::Logout) = self.question {
                        self.answer(Answer::Done, now);
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

impl dialogue::Client for Initiator {
    type Ask = Ask;
    type Answer = Answer;
    type SessionError = SessionError;
    type Error = IscsiError;

    fn connect(&mut self, portal: SocketAddr, patience: Duration, io: &mut dyn Submit) {
        self.debt.begin(patience, io.now());
        self.connection.open(portal, io);
    }

    fn leave(&mut self, how: Leave, io: &mut dyn Submit) {
        self.debt.forgive();
        // A question of a procedure stays until the connection is closed: its memory may be in use.
        self.connection.leave(how, io);
    }

    fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    fn perform(&mut self, ask: Ask, now: Instant) {
        assert!(self.question.is_none(), "a procedure asks one thing at a time");
        self.debt.incur(now);
        let question = match ask {
            Ask::Sleep(time) => {
                self.debt.forgive();
                Question::Sleep(now + time)
            }
            Ask::Login(request, text) => {
                let len = u32::try_from(text.len()).expect("login text is short");
                let header = request.bhs().with_data_segment(len);
                self.connection.send(&header, Payload::Own(&text));
                Question::Login
            }
            Ask::FullFeature(terms) => {
                self.begin_session(*terms, now);
                self.debt.forgive();
                self.reports.push(Report::Answer(Answer::Done));
                return;
            }
            Ask::Command(cdb, data) => {
                let (transfer, mut buffer) = match data {
                    Data::None => (Transfer::None, Vec::new()),
                    Data::In(len_bytes) => (Transfer::In, vec![0; len_bytes]),
                    Data::Out(bytes) => (Transfer::Out, bytes),
                };
                let segments = match transfer {
                    Transfer::None => Vec::new(),
                    // Kept in the question until the command has ended.
                    Transfer::In | Transfer::Out => vec![segments::own(buffer.as_mut_slice())],
                };
                self.start(Command {
                    cdb,
                    transfer,
                    segments,
                    cookie: PROCEDURE,
                });
                Question::Command(buffer)
            }
            Ask::ResetUnit => {
                self.with_session(Session::reset_unit);
                Question::Reset
            }
            Ask::Logout => {
                self.with_session(Session::logout);
                Question::Logout
            }
        };
        self.question = Some(question);
    }

    fn heard(&mut self) -> Vec<Heard<Answer, SessionError>> {
        let heard = self.reports().filter_map(|report| match report {
            Report::Connected => Some(Heard::Connected),
            Report::Answer(answer) => Some(Heard::Answer(answer)),
            Report::Broken(why) => Some(Heard::Broken(why)),
            Report::Ended(_) | Report::Closed(_) | Report::Taken(_) => None,
        });
        heard.collect()
    }

    fn pump(&mut self, io: &mut dyn Submit) {
        self.connection.pump(io);
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) {
        let happening = self.connection.resume(event, &mut self.returned, io);
        if let Some(session) = &mut self.session {
            session.returned(&mut self.returned);
        }
        match happening {
            None | Some(Happening::Sent) => {}
            Some(Happening::Connected) => {
                // The login is asked for at once.
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
                // Commands that were answered, and had to wait for their memory, have ended.
                self.take_news(io.now());
                let session = self.session.take();
                let mut unfinished = session.map(Session::into_unfinished).unwrap_or_default();
                // Its buffer goes with the question.
                unfinished.retain(|command| command.cookie != PROCEDURE);
                self.question = None;
                self.reports.push(Report::Closed(unfinished));
            }
        }
        self.take_news(io.now());
    }

    fn alarm(&self) -> Option<Instant> {
        let slept = match self.question {
            Some(Question::Sleep(until)) => Some(until),
            _ => None,
        };
        let session = match (&self.session, self.connection.is_open()) {
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
        if let (Some(session), true) = (&mut self.session, self.connection.is_open())
            && let Err(error) = session.beat(&mut self.connection, now)
        {
            self.reports.push(Report::Broken(error.into()));
        }
    }

    fn unanswered(server: SocketAddr, why: Break) -> IscsiError {
        IscsiError::Portal {
            portal: server,
            source: Unanswered(why),
        }
    }

    fn redirected(server: SocketAddr) -> IscsiError {
        IscsiError::Redirected { portal: server }
    }
}
