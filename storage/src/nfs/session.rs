//! One session: calls in its slots, and what becomes of them (RFC 8881, 2.10).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::remote::connection::{ANYTHING_BYTES, Connection};
use crate::remote::streak::{Streak, TRUST_MAX};
use crate::request::Segment;
use crate::segments;

use super::callback;
use super::command::{Action, Command, Ended, Outcome, STAGED_BYTES_MAX, Target};
use super::inbox::{Arrival, Inbox, Item, StreamError};
use super::pulse::Pulse;
use super::rpc::{self, Credential, Direction, Record, RpcError};
use super::v4::status::{Verdict, verdict};
use super::v4::{
    self, Compound, CompoundReply, MalformedReply, Operations, ReplyError, Sequence, SequenceResult,
    SessionId, Status,
};
use super::xdr::{Reader, Writer, XdrError, padding_bytes};
use super::xid::{SLOTS_MAX, Xid};

/// A connection that carries NFS. Who lends memory to it is a slot.
pub(super) type NfsConnection = Connection<Inbox, usize>;

/// What a session has to tell its owner.
#[derive(Debug)]
pub(super) enum News {
    /// A command has ended.
    Ended(Ended),
    /// A procedure's call is answered by this record.
    Answered(Vec<u8>),
}

/// Why a session is of no more use, or only on another connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SessionError {
    /// The stream makes no sense.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A call was not carried out.
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// An answer makes no sense.
    #[error(transparent)]
    Malformed(#[from] MalformedReply),
    /// Something that is neither call nor answer.
    #[error("what it sent is no RPC message: {0}")]
    Xdr(#[from] XdrError),
    /// An answer is not what the protocol has at this point.
    #[error("it broke the protocol: {0}")]
    Protocol(&'static str),
    /// The server does not go on with the session.
    #[error("the server does not go on with the session ({0})")]
    Refused(Status),
    /// It has taken back what was opened or locked.
    #[error("the server says that it has revoked what was open")]
    Revoked,
    /// Nothing was heard of the server.
    #[error("the server has been silent for {} ms", .0.as_millis())]
    Silent(Duration),
    /// A call was not answered, though others were.
    #[error("the server has not answered a call, though it has one that was sent {} s later", .0.as_secs())]
    Unanswered(Duration),
    /// The lease of the client may be over before anything else is heard of the server.
    #[error("the client's lease may be over: the server was last heard {} ms ago", .0.as_millis())]
    Expired(Duration),
}

/// How the server is talked to, in a session or before there is one.
#[derive(Clone, Debug)]
pub(super) struct Manner {
    pub(super) credential: Arc<Credential>,
    /// 1 or 2.
    pub(super) minor_version: u32,
}

/// On what terms a session was made.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub(super) id: SessionId,
    pub(super) manner: Manner,
    /// How many slots it has.
    pub(super) slots: usize,
    /// How long the client keeps what it has without a sign of life.
    pub(super) lease: Duration,
    /// How long a sign of life may take.
    pub(super) patience: Duration,
}

/// The slots of a session. Slot 0 is for procedures and signs of life, the others are for commands.
///
/// ```text
///   start ──► waiting ──a slot is free──► sent ──► answered, and its memory is back: News::Ended
///                                          ▲  └── the connection breaks ──┐
///                                          └── resume: the same call in the same slot ◄┘
/// ```
///
/// A call that was sent stays in its slot until it is answered, on whatever connection: the server carries out one call for
/// each slot and sequence id, however often and late it arrives (2.10.6.1).
#[derive(Debug)]
pub(super) struct Session {
    terms: Terms,
    target: Option<Target>,
    slots: Vec<Slot>,
    /// Slots of commands without a call; the next is at the end.
    idle: Vec<usize>,
    /// How many slots the server wants to be used.
    slots_wanted: usize,
    waiting: VecDeque<Command>,
    /// How many slots have a call, and how many of these are long reads.
    calls: u32,
    long_reads: u32,
    streak: Streak,
    /// Slots whose calls the server was not ready for, and when they are sent again, in that order.
    put_off: VecDeque<(Instant, usize)>,
    /// When calls without an answer were looked for last.
    looked: Instant,
    /// No command is sent: a connection is missing, or the right to send it is not proved.
    is_held: bool,
    /// Whether what is open is known: until then it is no news that some of it was revoked.
    is_aimed: bool,
    /// How many slots had a command that was withdrawn, and may still be carried out.
    withdrawals: u32,
    /// The number of the next call.
    serial: u32,
    pulse: Pulse,
    news: VecDeque<News>,
    /// Memory for the beginnings of calls.
    scratch: Vec<u8>,
}

#[derive(Debug, Default)]
struct Slot {
    /// That of the last call that was carried out.
    sequence_id: u32,
    call: Option<SlotCall>,
}

#[derive(Debug)]
struct SlotCall {
    xid: Xid,
    task: Task,
    sent: Instant,
    /// When it may have been carried out at the earliest: an answer that is given again renews nothing by that.
    begun: Instant,
    /// It was sent before: its answer may be one that was given then.
    is_again: bool,
    /// How often its memory is lent to the outbox.
    lent: u32,
    outcome: Option<Result<Outcome, Status>>,
    /// The server was not ready for it, and is asked again later.
    is_put_off: bool,
}

#[derive(Debug)]
enum Task {
    Command(Command),
    /// What a procedure asks.
    Question(Operations),
    /// Nothing but a sign of life.
    Renewal,
}

/// The slot of procedures and of signs of life.
const CONTROL: usize = 0;
/// How long after a server was not ready for a call it is sent again.
const AGAIN_AFTER: Duration = Duration::from_millis(20);
/// A call that has no answer, though one has that was sent so much later, is sent again on another connection: the answer may
/// have gone to the last one.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// How often such a call is looked for.
const LOOK_PERIOD: Duration = Duration::from_secs(15);

impl Session {
    /// A session on the `terms` on which it was just made.
    pub(super) fn new(terms: Terms, serial: u32, now: Instant) -> Self {
        let slots = terms.slots.clamp(2, SLOTS_MAX);
        let pulse = Pulse::new(terms.lease, terms.patience, now);
        Self {
            terms,
            target: None,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            idle: (1..slots).rev().collect(),
            slots_wanted: slots,
            waiting: VecDeque::new(),
            calls: 0,
            long_reads: 0,
            streak: Streak::default(),
            put_off: VecDeque::new(),
            looked: now,
            is_held: false,
            is_aimed: false,
            withdrawals: 0,
            serial,
            pulse,
            news: VecDeque::new(),
            scratch: Vec::new(),
        }
    }

    /// What it is called.
    pub(super) fn id(&self) -> SessionId {
        self.terms.id
    }

    /// Says which file commands are for, from now on.
    pub(super) fn aim(&mut self, target: Target) {
        self.target = Some(target);
        self.is_aimed = true;
    }

    /// How long the client keeps what it has without a sign of life, as the server says.
    pub(super) fn set_lease(&mut self, lease: Duration) {
        self.pulse.set_lease(lease);
    }

    /// Whether the client certainly still has what it had: only then may anything be written.
    pub(super) fn is_current(&self, now: Instant) -> bool {
        now < self.pulse.expires()
    }

    /// That the client may have lost what it had, if it may.
    pub(super) fn expired(&self, now: Instant) -> Option<SessionError> {
        (!self.is_current(now)).then(|| SessionError::Expired(now - self.pulse.renewed()))
    }

    /// Sends a command as soon as a slot is free.
    pub(super) fn start(&mut self, command: Command, connection: &mut NfsConnection, now: Instant) {
        self.waiting.push_back(command);
        self.send_waiting(connection, now);
    }

    /// Sends what a procedure asks. [`News::Answered`] follows.
    pub(super) fn ask(
        &mut self,
        question: Operations,
        connection: &mut NfsConnection,
        now: Instant,
    ) -> Result<(), Operations> {
        let slot = self.slots.get(CONTROL).expect("a session has two slots at least");
        if slot.call.is_some() {
            return Err(question);
        }
        self.put(CONTROL, Task::Question(question), connection, now);
        Ok(())
    }

    /// Goes on with a new connection. Procedures may ask; commands wait for [`Self::replay`].
    pub(super) fn rejoin(&mut self, connection: &mut NfsConnection, now: Instant) {
        self.pulse.rejoined(now);
        (self.is_held, self.is_aimed) = (true, false);
        let slot = self
            .slots
            .get_mut(CONTROL)
            .expect("a session has two slots at least");
        if let Some(call) = &mut slot.call {
            // Nobody waits for its answer any more. If it was not carried out it will not be: this takes its place.
            call.task = Task::Renewal;
            call.is_again = true;
            self.transmit(CONTROL, connection, now);
        }
    }

    /// Sends every command again that is not answered.
    pub(super) fn replay(&mut self, connection: &mut NfsConnection, now: Instant) {
        self.is_held = false;
        for slot in CONTROL + 1..self.slots.len() {
            if let Some(call) = self.slots.get_mut(slot).and_then(|slot| slot.call.as_mut()) {
                call.is_again = true;
            }
            self.transmit(slot, connection, now);
        }
        connection.expect_long(self.long_reads > 0);
        self.send_waiting(connection, now);
    }

    /// Takes every command back that was sent and not answered, and those that wait; no connection carries the session. What is
    /// sent in the place of the first makes sure that they are not carried out any more: nothing else is before that.
    pub(super) fn withdraw(&mut self) -> Vec<Command> {
        let mut withdrawn = Vec::new();
        for slot in self.slots.iter_mut().skip(CONTROL + 1) {
            let Some(call) = &mut slot.call else { continue };
            match std::mem::replace(&mut call.task, Task::Renewal) {
                Task::Command(command) => {
                    self.withdrawals += 1;
                    self.long_reads -= u32::from(command.is_long_read());
                    withdrawn.push(command);
                }
                other => call.task = other,
            }
        }
        withdrawn.extend(self.waiting.drain(..));
        withdrawn
    }

    /// The connection is closed: nothing uses the memory of any call.
    pub(super) fn disconnected(&mut self) {
        for slot in 0..self.slots.len() {
            if let Some(call) = self.slots.get_mut(slot).and_then(|slot| slot.call.as_mut()) {
                (call.lent, call.is_put_off) = (0, false);
            }
            self.end_if_answered(slot);
        }
        self.put_off.clear();
        self.is_held = true;
    }

    /// What has happened next.
    pub(super) fn next_news(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    /// Every command that has not ended, of a session that is given up while no connection carries it.
    pub(super) fn into_unfinished(self) -> Vec<Command> {
        let sent = self.slots.into_iter().filter_map(|slot| match slot.call?.task {
            Task::Command(command) => Some(command),
            Task::Question(_) | Task::Renewal => None,
        });
        sent.chain(self.waiting).collect()
    }

    /// Takes everything in that the connection has received.
    pub(super) fn receive(
        &mut self,
        connection: &mut NfsConnection,
        now: Instant,
    ) -> Result<(), SessionError> {
        self.pulse.hear(now);
        while let Some(item) = connection.inbox_mut().next()? {
            match item {
                Item::Record(record) => {
                    self.record(&record, connection, now)?;
                    connection.inbox_mut().recycle(record);
                }
                Item::Payload(arrival) => self.place(&arrival, connection)?,
                Item::Filled(arrival) => self.filled(&arrival)?,
            }
        }
        connection.expect_long(self.long_reads > 0);
        self.expect(connection);
        self.send_waiting(connection, now);
        Ok(())
    }

    /// Says how much comes at least, whichever of the calls are answered first.
    fn expect(&mut self, connection: &mut NfsConnection) {
        self.streak.taken_in(self.pulse.heard());
        let awaited = self.slots.iter().filter_map(Slot::awaited);
        let (count, least) = awaited.fold((0, usize::MAX), |(count, least), call| {
            (count + 1, least.min(call.task.answer_bytes()))
        });
        match count {
            // The next one may be about to begin.
            0 if self.streak.goes_on() => connection.expect_as_before(),
            0 => connection.expect(ANYTHING_BYTES),
            _ => connection.expect(self.streak.expects(count, least)),
        }
    }

    /// Takes in that the memory of these slots' calls, which was lent to the outbox, is back. A slot that was answered before
    /// is free only now.
    pub(super) fn returned(
        &mut self,
        lenders: &mut Vec<usize>,
        connection: &mut NfsConnection,
        now: Instant,
    ) {
        if lenders.is_empty() {
            return;
        }
        for slot in lenders.drain(..) {
            if let Some(call) = self.slots.get_mut(slot).and_then(|slot| slot.call.as_mut()) {
                call.lent = call.lent.saturating_sub(1);
            }
            self.end_if_answered(slot);
        }
        if connection.is_open() {
            self.send_waiting(connection, now);
        }
    }

    /// When [`Self::beat`] is to be called.
    pub(super) fn alarm(&self, connection: &NfsConnection) -> Instant {
        let trust = connection.is_trusting().then(|| self.pulse.heard() + TRUST_MAX);
        let again = self.put_off.front().map(|(again, _)| *again);
        let sign_of_life = self.pulse.due(self.calls > 0);
        let expires = self.is_aimed.then(|| self.pulse.expires());
        let alarms = [trust, Some(sign_of_life), expires, again, self.next_look()];
        alarms.into_iter().flatten().min().expect("there is one at least")
    }

    /// Asks a server for a sign of life that has not given one for a while, which also renews the lease of the client.
    ///
    /// # Errors
    ///
    /// When it was asked and has been silent since, or for so long that it may have forgotten the client, or has not answered one
    /// call for long.
    pub(super) fn beat(&mut self, connection: &mut NfsConnection, now: Instant) -> Result<(), SessionError> {
        // A session whose lease is in doubt is being proved.
        if let Some(error) = self.expired(now).filter(|_| self.is_aimed) {
            return Err(error);
        }
        while let Some((_, slot)) = self.put_off.pop_front_if(|(again, _)| *again <= now) {
            self.transmit(slot, connection, now);
        }
        if self.next_look().is_some_and(|look| look <= now) {
            self.looked = now;
            self.look_for_lost_answers()?;
        }
        if connection.is_trusting() && self.pulse.heard() + TRUST_MAX <= now {
            self.streak.broke_off();
            connection.expect(ANYTHING_BYTES);
        }
        if now < self.alarm(connection) {
            return Ok(());
        }
        self.pulse.ask(now)?;
        if self.slots.get(CONTROL).is_some_and(|slot| slot.call.is_none()) {
            self.put(CONTROL, Task::Renewal, connection, now);
        }
        Ok(())
    }

    fn next_look(&self) -> Option<Instant> {
        (self.calls > 0 && !self.is_held).then_some(self.looked + LOOK_PERIOD)
    }

    /// Looks for a call without an answer, though one that was sent long after it has one. (A slow network delays both.)
    fn look_for_lost_answers(&self) -> Result<(), SessionError> {
        let oldest = self.slots.iter().filter_map(Slot::unanswered_since).min();
        let late = oldest.map(|sent| self.pulse.renewed().saturating_duration_since(sent));
        match late {
            Some(late) if late > ANSWER_MAX => Err(SessionError::Unanswered(late)),
            _ => Ok(()),
        }
    }

    fn send_waiting(&mut self, connection: &mut NfsConnection, now: Instant) {
        while !self.is_held
            && self.withdrawals == 0
            && !self.waiting.is_empty()
            && let Some(slot) = self.idle.pop_if(|slot| *slot < self.slots_wanted)
            && let Some(command) = self.waiting.pop_front()
        {
            self.put(slot, Task::Command(command), connection, now);
        }
    }

    /// Puts a call into a slot, and sends it.
    fn put(&mut self, slot: usize, task: Task, connection: &mut NfsConnection, now: Instant) {
        let place = self.slots.get_mut(slot).expect("a slot that was free is there");
        assert!(place.call.is_none(), "one call at a time is in a slot");
        let answer_bytes = task.answer_bytes();
        if self.calls == 0 {
            connection.expect(self.streak.expects(1, answer_bytes));
        }
        connection.expect_at_most(self.streak.expects_at_most(answer_bytes));
        if task.is_long_read() {
            connection.expect_long(true);
        }
        self.calls += 1;
        self.long_reads += u32::from(task.is_long_read());
        place.call = Some(SlotCall {
            xid: Xid(0),
            task,
            sent: now,
            begun: now,
            is_again: false,
            lent: 0,
            outcome: None,
            is_put_off: false,
        });
        self.transmit(slot, connection, now);
    }

    /// Sends the call in a slot, for the first time or again.
    fn transmit(&mut self, slot: usize, connection: &mut NfsConnection, now: Instant) {
        let highest_slot = self.slots.iter().rposition(|slot| slot.call.is_some());
        let Some(place) = self.slots.get_mut(slot) else {
            return;
        };
        let sequence_id = place.sequence_id.wrapping_add(1);
        let Some(call) = &mut place.call else { return };
        self.serial = self.serial.wrapping_add(1);
        call.xid = Xid::new(self.serial, slot, call.task.is_read());
        (call.sent, call.is_put_off) = (now, false);
        call.begun = if call.is_again { call.begun } else { now };
        let number = |slot: usize| u32::try_from(slot).expect("slots are few");
        let sequence = Sequence {
            session_id: self.terms.id,
            sequence_id,
            slot_id: number(slot),
            highest_slot_id: number(highest_slot.unwrap_or(slot)),
            // A procedure begins anew with the next connection, and a command changes nothing if it is done twice.
            cache_this: false,
        };
        let mut writer = Writer::behind(std::mem::take(&mut self.scratch));
        let record = Record::begin(&mut writer);
        call_header(&self.terms.manner, call.xid).put(&mut writer);
        let mut compound = Compound::new(&mut writer, "", self.terms.manner.minor_version);
        compound.sequence(&sequence);
        match &call.task {
            Task::Renewal => compound.finish(),
            Task::Question(question) => {
                compound.append(question);
                compound.finish();
            }
            Task::Command(command) => {
                let target = self
                    .target
                    .expect("a file was opened before anything is done to it");
                command.put(&target, compound);
            }
        }
        let payload = call.task.payload();
        let len = usize::try_from(segments::total(payload)).expect("this is a 64-bit monitor");
        let padding = [0; 3];
        let padding = padding.get(..padding_bytes(len)).unwrap_or_default();
        record.finish(&mut writer, len + padding.len());
        let outbox = connection.outbox();
        outbox.write(writer.bytes());
        if segments::total(payload) <= STAGED_BYTES_MAX {
            outbox.gather(payload);
        } else {
            outbox.lend(payload, slot);
            call.lent += 1;
        }
        outbox.write(padding);
        self.scratch = writer.into_bytes();
        self.scratch.clear();
    }

    fn record(
        &mut self,
        record: &[u8],
        connection: &mut NfsConnection,
        now: Instant,
    ) -> Result<(), SessionError> {
        if Direction::of(record)? == Direction::Call {
            return self.called(record, connection);
        }
        let mut reader = Reader::new(record);
        let reply = rpc::Reply::parse(&mut reader)?;
        let slot = self.known(Xid(reply.xid))?;
        reply.outcome?;
        let mut results = CompoundReply::parse(reader.rest())?;
        match results.sequence() {
            Ok(sequence) => self.carried_out(slot, &sequence)?,
            Err(ReplyError::Malformed(error)) => return Err(error.into()),
            Err(refused) => {
                let status = refused.status().unwrap_or(Status::IO);
                return self.refused(slot, status, connection, now);
            }
        }
        let call = self.slots.get_mut(slot).and_then(|slot| slot.call.as_mut());
        let call = call.expect("a known slot has a call");
        match &call.task {
            // Some servers know that they have carried the SEQUENCE out, and not what became of the rest (see `refused`).
            Task::Command(_) if results.status() == Status::RETRY_UNCACHED_REP => {
                call.is_again = false;
                self.transmit(slot, connection, now);
                Ok(())
            }
            Task::Renewal => {
                self.clear(slot);
                Ok(())
            }
            Task::Question(_) => {
                self.clear(slot);
                self.news.push_back(News::Answered(record.to_vec()));
                Ok(())
            }
            Task::Command(command) => {
                let outcome = match command.outcome(&mut results) {
                    Ok(outcome) => Ok(outcome),
                    Err(ReplyError::Malformed(error)) => return Err(error.into()),
                    Err(refused) => Err(refused.status().unwrap_or(Status::IO)),
                };
                let is_lost = |status: Status| verdict(status) == Verdict::StateLost;
                if std::mem::take(&mut call.is_again) && outcome.is_err_and(is_lost) {
                    // Said before what was lost was opened again.
                    self.transmit(slot, connection, now);
                    return Ok(());
                }
                call.outcome = Some(outcome);
                self.end_if_answered(slot);
                Ok(())
            }
        }
    }

    /// A SEQUENCE was carried out, and the lease of the client is renewed by it, from when that may have been.
    fn carried_out(&mut self, slot: usize, sequence: &SequenceResult) -> Result<(), SessionError> {
        let place = self.slots.get_mut(slot).expect("a known slot is there");
        let sequence_id = place.sequence_id.wrapping_add(1);
        let call = place.call.as_ref().expect("a known slot has a call");
        let is_ours = sequence.session_id == self.terms.id
            && usize::try_from(sequence.slot_id) == Ok(slot)
            && sequence.sequence_id == sequence_id;
        if !is_ours {
            return Err(SessionError::Protocol(
                "an answer is for another slot than its call",
            ));
        }
        let is_again = call.is_again;
        place.sequence_id = sequence_id;
        self.pulse.renew(call.begun);
        let wanted = usize::try_from(sequence.target_highest_slot_id).unwrap_or(usize::MAX);
        self.slots_wanted = wanted.saturating_add(1).clamp(2, self.slots.len());
        if self.is_aimed && !is_again && sequence.status_flags & REVOKED != 0 {
            return Err(SessionError::Revoked);
        }
        Ok(())
    }

    /// A call was not carried out, or was before.
    fn refused(
        &mut self,
        slot: usize,
        status: Status,
        connection: &mut NfsConnection,
        now: Instant,
    ) -> Result<(), SessionError> {
        let place = self.slots.get_mut(slot).expect("a known slot is there");
        let call = place.call.as_mut().expect("a known slot has a call");
        let is_renewal = matches!(call.task, Task::Renewal);
        match status {
            Status::DELAY => {
                call.is_put_off = true;
                self.put_off.push_back((now + AGAIN_AFTER, slot));
            }
            // It was carried out on an earlier connection, and what it came to is not known any more. A second time changes
            // nothing: nobody was told that the first has ended, so nothing was built upon it.
            Status::RETRY_UNCACHED_REP | Status::SEQ_FALSE_RETRY if !is_renewal => {
                call.is_again = false;
                place.sequence_id = place.sequence_id.wrapping_add(1);
                self.transmit(slot, connection, now);
            }
            // What had the slot before it was carried out.
            Status::RETRY_UNCACHED_REP | Status::SEQ_FALSE_RETRY => {
                place.sequence_id = place.sequence_id.wrapping_add(1);
                self.clear(slot);
            }
            status => return Err(SessionError::Refused(status)),
        }
        Ok(())
    }

    /// Says where the data of a READ go.
    fn place(&mut self, arrival: &Arrival, connection: &mut NfsConnection) -> Result<(), SessionError> {
        let slot = self.known(Xid(arrival.xid))?;
        let call = self.slots.get_mut(slot).and_then(|slot| slot.call.as_mut());
        let call = call.expect("a known slot has a call");
        let end = arrival.len_bytes as u64;
        match &call.task {
            Task::Command(command) if command.is_read() && end <= segments::total(&command.segments) => {
                let segments = &command.segments;
                connection
                    .inbox_mut()
                    .place(|out| segments::slice(segments, 0..end, out));
                Ok(())
            }
            _ => Err(SessionError::Protocol("data that was not asked for")),
        }
    }

    fn filled(&mut self, arrival: &Arrival) -> Result<(), SessionError> {
        let slot = self.known(Xid(arrival.xid))?;
        self.carried_out(slot, &arrival.payload.sequence)?;
        let call = self.slots.get_mut(slot).and_then(|slot| slot.call.as_mut());
        let call = call.expect("a known slot has a call");
        call.outcome = Some(Ok(Outcome::Read {
            bytes: u32::try_from(arrival.len_bytes).expect("it was seen to fit"),
            is_end: arrival.payload.eof,
        }));
        self.end_if_answered(slot);
        Ok(())
    }

    /// The server calls.
    fn called(&mut self, record: &[u8], connection: &mut NfsConnection) -> Result<(), SessionError> {
        self.pulse.answered(connection.departures())?;
        let answer = callback::answer(record, self.terms.id)?;
        if let Some(highest) = answer.target_highest_slot {
            self.slots_wanted = highest.saturating_add(1).clamp(2, self.slots.len());
        }
        connection.outbox().write(&answer.record);
        Ok(())
    }

    /// Ends a command that has its answer and its memory.
    fn end_if_answered(&mut self, slot: usize) {
        let Some(place) = self.slots.get_mut(slot) else {
            return;
        };
        let is_over = |call: &mut SlotCall| call.lent == 0 && call.outcome.is_some();
        let Some(call) = place.call.take_if(is_over) else {
            return;
        };
        self.calls -= 1;
        if let (Task::Command(command), Some(outcome)) = (call.task, call.outcome) {
            self.long_reads -= u32::from(command.is_long_read());
            self.streak.answered(command.is_whole(outcome.as_ref()));
            self.news.push_back(News::Ended(Ended { command, outcome }));
        }
        self.free(slot);
    }

    fn clear(&mut self, slot: usize) {
        let call = self.slots.get_mut(slot).and_then(|slot| slot.call.take());
        self.calls -= u32::from(call.is_some());
        if slot != CONTROL
            && matches!(
                call,
                Some(SlotCall {
                    task: Task::Renewal,
                    ..
                })
            )
        {
            self.withdrawals -= 1;
        }
        self.free(slot);
    }

    /// A slot has no call any more. Low ones are used again first: a server keeps memory for each that it has seen.
    fn free(&mut self, slot: usize) {
        if slot != CONTROL {
            let at = self.idle.partition_point(|idle| *idle > slot);
            self.idle.insert(at, slot);
        }
    }

    fn known(&self, xid: Xid) -> Result<usize, SessionError> {
        let slot = xid.slot();
        let call = self.slots.get(slot).and_then(|slot| slot.call.as_ref());
        let is_known = call.is_some_and(|call| call.xid == xid && call.outcome.is_none() && !call.is_put_off);
        let unknown = SessionError::Protocol("an answer to what was not asked");
        is_known.then_some(slot).ok_or(unknown)
    }
}

/// What a server says when the client has lost an open or a lock.
const REVOKED: u32 = SequenceResult::EXPIRED_ALL_STATE_REVOKED
    | SequenceResult::EXPIRED_SOME_STATE_REVOKED
    | SequenceResult::ADMIN_STATE_REVOKED
    | SequenceResult::RESTART_RECLAIM_NEEDED;

/// The header of a call.
pub(super) fn call_header(manner: &Manner, xid: Xid) -> rpc::Call<&Credential> {
    rpc::Call {
        xid: xid.0,
        program: rpc::program::NFS,
        version: v4::VERSION,
        procedure: v4::PROCEDURE_COMPOUND,
        credential: &manner.credential,
    }
}

impl Slot {
    /// Since when its call waits for an answer.
    fn unanswered_since(&self) -> Option<Instant> {
        self.awaited().map(|call| call.sent)
    }

    /// Its call, if that waits for an answer.
    fn awaited(&self) -> Option<&SlotCall> {
        let call = self.call.as_ref()?;
        (call.outcome.is_none() && !call.is_put_off).then_some(call)
    }
}

impl Task {
    fn is_long_read(&self) -> bool {
        matches!(self, Self::Command(command) if command.is_long_read())
    }

    /// How long its answer is at least, if it is a good one.
    fn answer_bytes(&self) -> usize {
        match self {
            Self::Command(command) => command.answer_bytes(),
            Self::Question(_) | Self::Renewal => ANYTHING_BYTES,
        }
    }

    fn is_read(&self) -> bool {
        matches!(self, Self::Command(command) if command.is_read())
    }

    /// What is sent behind the call.
    fn payload(&self) -> &[Segment] {
        match self {
            Self::Command(command) if matches!(command.action, Action::Write { .. }) => &command.segments,
            _ => &[],
        }
    }
}
