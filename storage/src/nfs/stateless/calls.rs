//! Calls that are under way on a connection, and what becomes of them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::nfs::command::STAGED_BYTES_MAX;
use crate::nfs::inbox::{Arrival, Inbox, Item};
use crate::nfs::rpc::{self, Credential, Direction, Record};
use crate::nfs::session::SessionError;
use crate::nfs::v3::{self, Answer, FileHandle, ReadPayload, ReadResult, Status};
use crate::nfs::xdr::{Reader, Writer, Xdr};
use crate::nfs::xid::Xid;
use crate::remote::connection::Connection;
use crate::segments;

use super::command::{Command, Ended, Outcome};
use super::procedure::Call;

/// A connection that carries NFSv3. Nobody lends memory to it: only calls are sent.
pub(super) type ReadConnection = Connection<Inbox<ReadPayload>, Infallible>;

/// What calls have to tell their owner.
#[derive(Debug)]
pub(super) enum News {
    /// A command has ended.
    Ended(Ended),
    /// A procedure's call is answered by this record.
    Answered(Vec<u8>),
}

/// Calls, each in its place. Place 0 is for procedures and signs of life, the others are for commands.
///
/// ```text
///   start ──► waiting ──a place is free──► sent ──► answered: News::Ended
///     ▲                                      │
///     └── by its sender, elsewhere ◄── disconnected
/// ```
#[derive(Debug)]
pub(super) struct Calls {
    credential: Arc<Credential>,
    target: Option<FileHandle>,
    places: Vec<Option<Sent>>,
    /// Places of commands without a call.
    idle: Vec<usize>,
    waiting: VecDeque<Command>,
    /// The number of the last call.
    serial: u32,
    heard: Instant,
    /// When a sign of life was asked for that has not come.
    pinged: Option<Instant>,
    news: VecDeque<News>,
    /// Memory for calls.
    scratch: Vec<u8>,
}

#[derive(Debug)]
struct Sent {
    xid: Xid,
    task: Task,
    sent: Instant,
}

#[derive(Debug)]
enum Task {
    Command(Command),
    /// What a procedure asks.
    Question,
    /// Nothing but a sign of life.
    Sign,
}

/// So many READs may be under way.
const COMMANDS_MAX: usize = 64;
/// The place of procedures and of signs of life.
const CONTROL: usize = 0;
/// A server that has calls and is silent is asked for a sign of life so soon: one that only takes long gives it.
const PING_AFTER: Duration = Duration::from_secs(1);
/// A call that is not answered for so long is lost, whatever else the server answers.
const CALL_MAX: Duration = Duration::from_secs(60);

impl Calls {
    /// None yet.
    pub(super) fn new(credential: Arc<Credential>, now: Instant) -> Self {
        let mut random = [0; 4];
        crate::lease::fill_random(&mut random);
        Self {
            credential,
            target: None,
            places: (0..=COMMANDS_MAX).map(|_| None).collect(),
            idle: (CONTROL + 1..=COMMANDS_MAX).rev().collect(),
            waiting: VecDeque::new(),
            // A server remembers calls for a while, and by their numbers.
            serial: u32::from_ne_bytes(random),
            heard: now,
            pinged: None,
            news: VecDeque::new(),
            scratch: Vec::new(),
        }
    }

    /// Says which file commands are for, from now on.
    pub(super) fn aim(&mut self, target: FileHandle) {
        self.target = Some(target);
    }

    /// Sends what a procedure asks. [`News::Answered`] follows. Nothing else is under way.
    pub(super) fn ask(&mut self, call: &Call, connection: &mut ReadConnection, now: Instant) {
        self.control(Task::Question, call, connection, now);
    }

    /// Sends a command as soon as a place is free. [`News::Ended`] follows, unless the connection breaks.
    pub(super) fn start(&mut self, command: Command, connection: &mut ReadConnection, now: Instant) {
        self.waiting.push_back(command);
        self.send_waiting(connection, now);
    }

    /// The connection is closed, and nothing fills the memory of any command: all that have not ended are returned.
    pub(super) fn disconnected(&mut self) -> Vec<Command> {
        self.pinged = None;
        self.idle = (CONTROL + 1..self.places.len()).rev().collect();
        let calls = self.places.iter_mut().filter_map(Option::take);
        let sent = calls.filter_map(|call| match call.task {
            Task::Command(command) => Some(command),
            Task::Question | Task::Sign => None,
        });
        sent.chain(self.waiting.drain(..)).collect()
    }

    /// What has happened next.
    pub(super) fn next_news(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    /// Takes everything in that the connection has received.
    pub(super) fn receive(
        &mut self,
        connection: &mut ReadConnection,
        now: Instant,
    ) -> Result<(), SessionError> {
        self.heard = now;
        self.pinged = None;
        while let Some(item) = connection.inbox_mut().next()? {
            match item {
                Item::Record(record) => self.record(record, connection)?,
                Item::Payload(arrival) => self.place(&arrival, connection)?,
                Item::Filled(arrival) => self.filled(&arrival)?,
            }
        }
        connection.expect_long(self.commands().any(is_long));
        self.send_waiting(connection, now);
        Ok(())
    }

    /// When [`Self::beat`] is to be called; a server that has no command owes nothing.
    pub(super) fn alarm(&self, patience: Duration) -> Option<Instant> {
        let calls = self.places.iter().skip(CONTROL + 1).flatten();
        let oldest = calls.map(|call| call.sent).min()?;
        let sign = match self.pinged {
            Some(pinged) => pinged + patience,
            None => self.heard.max(oldest) + PING_AFTER,
        };
        Some(sign.min(oldest + CALL_MAX))
    }

    /// Asks a server for a sign of life that has commands and has not given one for a while.
    ///
    /// # Errors
    ///
    /// When it was asked and has been silent for as long as `patience`, or has left a call unanswered for much longer.
    pub(super) fn beat(
        &mut self,
        patience: Duration,
        connection: &mut ReadConnection,
        now: Instant,
    ) -> Result<(), SessionError> {
        if self.alarm(patience).is_none_or(|alarm| now < alarm) {
            return Ok(());
        }
        let calls = self.places.iter().skip(CONTROL + 1).flatten();
        let oldest = calls.map(|call| call.sent).min().unwrap_or(now);
        if self.pinged.is_some_and(|pinged| pinged + patience <= now) || oldest + CALL_MAX <= now {
            return Err(SessionError::Silent(now - self.heard.max(oldest)));
        }
        self.pinged = Some(now);
        // One that was asked for may not have come yet, though other answers have.
        if self.places.get(CONTROL).is_some_and(Option::is_none) {
            let sign = Call::nfs(v3::procedure::NULL, &());
            self.control(Task::Sign, &sign, connection, now);
        }
        Ok(())
    }

    fn commands(&self) -> impl Iterator<Item = &Command> {
        self.places.iter().flatten().filter_map(|call| match &call.task {
            Task::Command(command) => Some(command),
            Task::Question | Task::Sign => None,
        })
    }

    fn send_waiting(&mut self, connection: &mut ReadConnection, now: Instant) {
        while !self.waiting.is_empty()
            && let Some(place) = self.idle.pop()
            && let Some(command) = self.waiting.pop_front()
        {
            if is_long(&command) {
                connection.expect_long(true);
            }
            self.send(place, command, connection, now);
        }
    }

    fn send(&mut self, place: usize, command: Command, connection: &mut ReadConnection, now: Instant) {
        let read = v3::Read {
            handle: self.target.expect("a file was found before it is read"),
            offset: command.offset_bytes,
            count: u32::try_from(command.len_bytes()).expect("a READ is of 1 MiB at most"),
        };
        let xid = self.next_xid(place, IsRead::Yes);
        let mut writer = Writer::behind(std::mem::take(&mut self.scratch));
        let record = Record::begin(&mut writer);
        let call = rpc::Call {
            xid: xid.0,
            program: rpc::program::NFS,
            version: v3::NFS_VERSION,
            procedure: v3::procedure::READ,
            credential: self.credential.as_ref(),
        };
        call.put(&mut writer);
        read.put(&mut writer);
        record.finish(&mut writer, 0);
        connection.outbox().write(writer.bytes());
        self.scratch = writer.into_bytes();
        self.scratch.clear();
        self.occupy(place, xid, Task::Command(command), now);
    }

    /// Sends a call of a procedure, or for a sign of life.
    fn control(&mut self, task: Task, call: &Call, connection: &mut ReadConnection, now: Instant) {
        // Its reply is never cut into payload and rest, whatever it is.
        let xid = self.next_xid(CONTROL, IsRead::No);
        let mut writer = Writer::default();
        let record = Record::begin(&mut writer);
        let header = rpc::Call {
            xid: xid.0,
            program: call.program,
            version: call.version,
            procedure: call.procedure,
            credential: self.credential.as_ref(),
        };
        header.put(&mut writer);
        writer.append(&call.arguments);
        record.finish(&mut writer, 0);
        connection.outbox().write(writer.bytes());
        self.occupy(CONTROL, xid, task, now);
    }

    fn next_xid(&mut self, place: usize, is_read: IsRead) -> Xid {
        self.serial = self.serial.wrapping_add(1);
        Xid::new(self.serial, place, is_read == IsRead::Yes)
    }

    fn occupy(&mut self, place: usize, xid: Xid, task: Task, now: Instant) {
        let place = self
            .places
            .get_mut(place)
            .expect("a place that was free is there");
        assert!(place.is_none(), "one call at a time is in a place");
        *place = Some(Sent { xid, task, sent: now });
    }

    fn record(&mut self, record: Vec<u8>, connection: &mut ReadConnection) -> Result<(), SessionError> {
        if Direction::of(&record)? == Direction::Call {
            return Err(SessionError::Protocol(
                "it calls, and nothing was offered to be called",
            ));
        }
        let mut reader = Reader::new(&record);
        let reply = rpc::Reply::parse(&mut reader)?;
        let place = self.known(Xid(reply.xid))?;
        match self.task(place) {
            Task::Question => {
                self.clear(place);
                self.news.push_back(News::Answered(record));
                return Ok(());
            }
            // Whatever it says, it lives.
            Task::Sign => drop(self.clear(place)),
            Task::Command(command) => {
                reply.outcome?;
                let outcome = read(command, reader.rest())?;
                self.end(place, outcome);
            }
        }
        connection.inbox_mut().recycle(record);
        Ok(())
    }

    /// Says where the data of a READ go.
    fn place(
        &self,
        arrival: &Arrival<ReadPayload>,
        connection: &mut ReadConnection,
    ) -> Result<(), SessionError> {
        let place = self.known(Xid(arrival.xid))?;
        let end = arrival.len_bytes as u64;
        match self.task(place) {
            Task::Command(command) if end <= command.len_bytes() => {
                let segments = &command.segments;
                let inbox = connection.inbox_mut();
                inbox.place(|out| segments::slice(segments, 0..end, out));
                Ok(())
            }
            _ => Err(SessionError::Protocol("data that was not asked for")),
        }
    }

    fn filled(&mut self, arrival: &Arrival<ReadPayload>) -> Result<(), SessionError> {
        let place = self.known(Xid(arrival.xid))?;
        let outcome = Outcome {
            bytes: u32::try_from(arrival.len_bytes).expect("it was seen to fit"),
            is_end: arrival.payload.eof,
        };
        self.end(place, Ok(outcome));
        Ok(())
    }

    fn end(&mut self, place: usize, outcome: Result<Outcome, Status>) {
        if let Some(Task::Command(command)) = self.clear(place) {
            self.news.push_back(News::Ended(Ended { command, outcome }));
        }
    }

    /// A place has no call any more.
    fn clear(&mut self, place: usize) -> Option<Task> {
        if place != CONTROL {
            self.idle.push(place);
        }
        let call = self.places.get_mut(place).and_then(Option::take);
        call.map(|call| call.task)
    }

    fn task(&self, place: usize) -> &Task {
        let call = self.places.get(place).and_then(Option::as_ref);
        &call.expect("a known place has a call").task
    }

    fn known(&self, xid: Xid) -> Result<usize, SessionError> {
        let place = xid.slot();
        let call = self.places.get(place).and_then(Option::as_ref);
        let is_known = call.is_some_and(|call| call.xid == xid);
        let unknown = SessionError::Protocol("an answer to what was not asked");
        is_known.then_some(place).ok_or(unknown)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IsRead {
    Yes,
    No,
}

/// Whether so many data come that they are received where they belong.
fn is_long(command: &Command) -> bool {
    command.len_bytes() > STAGED_BYTES_MAX
}

/// Takes a reply to a READ in that came as a record: one that has failed, or is in more than one fragment.
fn read(command: &Command, results: &[u8]) -> Result<Result<Outcome, Status>, SessionError> {
    let result = match ReadResult::parse(results)? {
        Ok(result) => result,
        Err(status) => return Ok(Err(status)),
    };
    if result.data.len() as u64 > command.len_bytes() {
        return Err(SessionError::Protocol("data that was not asked for"));
    }
    segments::fill(&command.segments, result.data);
    Ok(Ok(Outcome {
        bytes: u32::try_from(result.data.len()).expect("it was seen to fit"),
        is_end: result.eof,
    }))
}
