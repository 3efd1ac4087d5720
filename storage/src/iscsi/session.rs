//! One session in its full-feature phase: tasks that are sent, and what becomes of them (RFC 7143, 4.2 and 11).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::remote::connection::ANYTHING_BYTES;
use crate::remote::quota::Quota;
use crate::remote::streak::{Streak, TRUST_MAX};
use crate::request::Segment;
use crate::segments;
use crate::slab::Slab;

use super::inbox::{Arrival, Item, StreamError};
use super::link::{Link, Payload};
use super::login::Negotiated;
use super::pdu::{
    AsyncEvent, BHS_BYTES, Bhs, DataOut, LogoutReason, LogoutRequest, Lun, NopOut, R2t, Residual,
    ScsiCommand, Serial, ServiceResponse, Tag, TargetPdu, TaskAttribute, TaskFunction, TaskManagementRequest,
    TaskOutcome, Window,
};
use super::scsi::cdb::{self, Cdb};
use super::scsi::sense::{Attention, Sense, Status, Verdict, verdict};

/// Which parts of a PDU are protected by a CRC32C.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Digests {
    /// The header.
    pub(super) header: bool,
    /// The data segment.
    pub(super) data: bool,
}

/// A command for the logical unit, and the memory that it fills or sends.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) cdb: Cdb,
    pub(super) transfer: Transfer,
    /// Its memory; empty without a transfer.
    pub(super) segments: Vec<Segment>,
    /// Its sender's own number for it.
    pub(super) cookie: u64,
}

/// In which direction a command moves data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    None,
    In,
    Out,
}

/// How a command has ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) command: Command,
    pub(super) status: Status,
    pub(super) sense: Option<Sense>,
    /// How many bytes it has moved.
    pub(super) moved_bytes: u32,
}

/// What a session has to tell its owner.
#[derive(Debug)]
pub(super) enum News {
    /// A command has ended.
    Ended(Ended),
    /// A reset of the logical unit was answered.
    Reset(TaskOutcome),
    /// The logout was answered.
    LoggedOut,
}

/// Why a session is of no more use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SessionError {
    /// The stream makes no sense.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A PDU is not what the protocol has at this point.
    #[error("it broke the protocol: {0}")]
    Protocol(&'static str),
    /// The target wants it to end.
    #[error("the target ends the session (asynchronous event {0})")]
    Dropped(u8),
    /// The target does not take what it was sent.
    #[error("the target rejected a PDU (reason {0:#04x})")]
    Rejected(u8),
    /// Somebody else has reset the unit, and what it was doing is not answered any more.
    #[error("the unit was reset, and its commands with it")]
    Aborted,
    /// Nothing was heard of the target, not even an answer to a NOP.
    #[error("the target has been silent for {} ms", .0.as_millis())]
    Silent(Duration),
}

/// The tasks of a session.
///
/// ```text
///   start ──► waiting ──the window opens──► sent ──R2T──► Data-Out … ──► response ──► its memory is back: News::Ended
///                                            └── Data-In ──► its memory is filled ─────┘
/// ```
#[derive(Debug)]
pub(super) struct Session {
    terms: Negotiated,
    lun: Lun,
    cmd_sn: Serial,
    max_cmd_sn: Serial,
    exp_stat_sn: Serial,
    tasks: Slab<Task>,
    /// Makes a tag another one than the last that had its place.
    generation: u16,
    /// Tasks that the window keeps back, in order.
    waiting: VecDeque<usize>,
    /// How many long reads are under way.
    long_reads: u32,
    streak: Streak,
    /// How many answers are awaited that are no task's and no ping's.
    orders: u32,
    pulse: Pulse,
    news: VecDeque<News>,
}

#[derive(Debug)]
struct Task {
    command: Command,
    tag: Tag,
    len_bytes: u32,
    /// How far its data have come in, or were asked for.
    at_bytes: u32,
    /// How often its memory is lent to the outbox.
    lent: u32,
    answer: Option<(Status, Option<Sense>, u32)>,
}

/// Whether the target is alive: what was heard last, and what is asked if nothing is.
#[derive(Debug)]
struct Pulse {
    heard: Instant,
    /// When a NOP was sent that is not answered.
    pinged: Option<Instant>,
    /// When a probe was sent that is not answered.
    probed: Option<Instant>,
    patience: Duration,
    /// Of its pings.
    quota: Quota,
}

/// Payloads up to this length are copied: it costs less than a piece of memory of its own.
pub(super) const STAGED_BYTES_MAX: u32 = 16 << 10;
/// An idle session is looked after so often.
const PING_PERIOD: Duration = Duration::from_secs(5);
/// A session with commands under way, of which nothing is heard, is asked so soon.
const PING_BUSY_PERIOD: Duration = Duration::from_secs(1);
/// A probe that is not answered may have been aborted, too: then comes the next.
const PROBE_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// The cookie of a probe; no request has so high a number.
const PROBE: u64 = u64::MAX - 1;
/// Tags of what is no task. A task's tag has a place below 2^16 in its lower half.
const PING_TAG: Tag = Tag(0xffff_fffe);
const RESET_TAG: Tag = Tag(0xffff_fffd);
const LOGOUT_TAG: Tag = Tag(0xffff_fffc);
/// Generations stay below those of the tags above.
const GENERATION_MAX: u16 = 0x7fff;
/// A PDU's place in a session's tags: as many tasks as a session has at most.
const TASKS_MAX: usize = 1 << 16;

impl Session {
    /// A session with a logical unit, on the `terms` of a login that has just ended. `patience`: how long an answer to a NOP
    /// may take.
    pub(super) fn new(terms: Negotiated, lun: Lun, patience: Duration, now: Instant) -> Self {
        Self {
            cmd_sn: terms.cmd_sn,
            max_cmd_sn: terms.window.max_cmd_sn,
            exp_stat_sn: terms.exp_stat_sn,
            terms,
            lun,
            tasks: Slab::with_capacity(64),
            generation: 0,
            waiting: VecDeque::new(),
            long_reads: 0,
            streak: Streak::default(),
            orders: 0,
            pulse: Pulse {
                heard: now,
                pinged: None,
                probed: None,
                patience,
                quota: Quota::default(),
            },
            news: VecDeque::new(),
        }
    }

    /// Sends a command as soon as the target takes one more.
    pub(super) fn start(&mut self, command: Command, connection: &mut Link) {
        let len = segments::total(&command.segments);
        let task = Task {
            len_bytes: u32::try_from(len).expect("a command moves less than 4 GiB"),
            command,
            tag: Tag::RESERVED,
            at_bytes: 0,
            lent: 0,
            answer: None,
        };
        assert!(
            self.tasks.len() < TASKS_MAX,
            "a disk has fewer requests in flight"
        );
        if self.tasks.is_empty() && self.is_streaming(connection) {
            connection.expect(self.streak.expects(1, task.answer_bytes()));
        }
        if task.is_long_read() {
            self.long_reads += 1;
            connection.expect_long(true);
        }
        let place = self.tasks.insert(task);
        self.waiting.push_back(place);
        self.send_waiting(connection);
    }

    /// Asks for a reset of the logical unit. [`News::Reset`] is the answer.
    pub(super) fn reset_unit(&mut self, connection: &mut Link) {
        let request = TaskManagementRequest {
            immediate: true,
            function: TaskFunction::LOGICAL_UNIT_RESET,
            lun: self.lun,
            initiator_task_tag: RESET_TAG,
            referenced_task_tag: Tag::RESERVED,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
            ref_cmd_sn: Serial(0),
            exp_data_sn: 0,
        };
        self.order(&request.bhs(), connection);
    }

    /// Asks for the end of the session. [`News::LoggedOut`] is the answer.
    pub(super) fn logout(&mut self, connection: &mut Link) {
        let request = LogoutRequest {
            immediate: true,
            reason: LogoutReason::CLOSE_SESSION,
            initiator_task_tag: LOGOUT_TAG,
            cid: 0,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
        };
        self.order(&request.bhs(), connection);
    }

    fn order(&mut self, request: &Bhs, connection: &mut Link) {
        self.orders += 1;
        connection.expect_at_most(ANYTHING_BYTES);
        connection.send(request, Payload::NONE);
    }

    /// What has happened next.
    pub(super) fn next_news(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    /// Takes everything in that the connection has received.
    pub(super) fn receive(&mut self, connection: &mut Link, now: Instant) -> Result<(), SessionError> {
        self.pulse.heard = now;
        while let Some(item) = connection.inbox_mut().next()? {
            match item {
                Item::Pdu(pdu, data) => self.pdu(&pdu, &data, connection)?,
                Item::Payload(arrival) => self.place(&arrival, connection)?,
                Item::Filled(arrival) => self.filled(&arrival)?,
            }
        }
        connection.expect_long(self.long_reads > 0);
        self.expect(connection);
        self.send_waiting(connection);
        Ok(())
    }

    /// Whether what comes is known: nothing but answers to commands, whose data go where they belong.
    fn is_streaming(&self, connection: &Link) -> bool {
        self.pulse.pinged.is_none() && self.orders == 0 && !connection.digests().data
    }

    /// Says how much comes at least, whichever of the tasks are answered first.
    fn expect(&mut self, connection: &mut Link) {
        self.streak.taken_in(self.pulse.heard);
        if !self.is_streaming(connection) {
            return connection.expect(ANYTHING_BYTES);
        }
        let awaited = self.tasks.iter().filter(|task| task.is_awaited());
        let (count, least) = awaited.fold((0, usize::MAX), |(count, least), task| {
            (count + 1, least.min(task.answer_bytes()))
        });
        match count {
            // The next one may be about to begin.
            0 if self.streak.goes_on() => connection.expect_as_before(),
            0 => connection.expect(ANYTHING_BYTES),
            _ => connection.expect(self.streak.expects(count, least)),
        }
    }

    /// Takes in that the memory of these tasks, which was lent to the outbox, is back.
    pub(super) fn returned(&mut self, lenders: &mut Vec<Tag>) {
        for tag in lenders.drain(..) {
            let Some(place) = self.place_of(tag) else { continue };
            if let Some(task) = self.tasks.get_mut(place) {
                task.lent -= 1;
            }
            self.end_if_answered(place);
        }
    }

    /// When [`Self::beat`] is to be called.
    pub(super) fn alarm(&self, connection: &Link) -> Instant {
        if connection.is_trusting() {
            return self.pulse.heard + TRUST_MAX;
        }
        match self.pulse.pinged {
            Some(pinged) => pinged.max(self.pulse.heard) + self.pulse.patience,
            None if self.tasks.is_empty() => self.pulse.heard + PING_PERIOD,
            None => self.pulse.heard + PING_BUSY_PERIOD,
        }
    }

    /// Asks a target for a sign of life that has not given one for a while, and the unit whether it is still at work: what
    /// another initiator has aborted is never answered, and only the next command is told why (SAM-5, 5.6.2).
    ///
    /// # Errors
    ///
    /// When it was asked, and has been silent since.
    pub(super) fn beat(&mut self, connection: &mut Link, now: Instant) -> Result<(), SessionError> {
        if now < self.alarm(connection) {
            return Ok(());
        }
        if connection.is_trusting() {
            self.streak.broke_off();
            connection.expect(ANYTHING_BYTES);
            return Ok(());
        }
        if let Some(pinged) = self.pulse.pinged {
            return Err(SessionError::Silent(now - pinged));
        }
        self.pulse.pinged = Some(now);
        connection.expect_at_most(ANYTHING_BYTES);
        let ping = NopOut {
            immediate: true,
            lun: Lun::default(),
            initiator_task_tag: PING_TAG,
            target_transfer_tag: Tag::RESERVED,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
        };
        connection.send(&ping.bhs(), Payload::NONE);
        let may_probe = self
            .pulse
            .probed
            .is_none_or(|probed| probed + PROBE_AGAIN_AFTER <= now);
        if !self.tasks.is_empty() && may_probe {
            self.pulse.probed = Some(now);
            self.start(
                Command {
                    cdb: cdb::test_unit_ready(),
                    transfer: Transfer::None,
                    segments: Vec::new(),
                    cookie: PROBE,
                },
                connection,
            );
        }
        Ok(())
    }

    /// Every command that has not ended. The connection is closed: nothing uses their memory any more.
    pub(super) fn into_unfinished(mut self) -> Vec<Command> {
        let commands = self.tasks.take_all().map(|task| task.command);
        commands.filter(|command| command.cookie != PROBE).collect()
    }

    fn send_waiting(&mut self, connection: &mut Link) {
        while !self.max_cmd_sn.is_before(self.cmd_sn)
            && let Some(place) = self.waiting.pop_front()
        {
            self.send(place, connection);
        }
    }

    fn send(&mut self, place: usize, connection: &mut Link) {
        self.generation = (self.generation + 1) & GENERATION_MAX;
        let place_bits = u32::try_from(place).expect("a place is below TASKS_MAX");
        let tag = Tag(u32::from(self.generation) << 16 | place_bits);
        let task = self.tasks.get_mut(place).expect("a task waits in its place");
        task.tag = tag;
        let len = task.len_bytes;
        let is_out = task.command.transfer == Transfer::Out;
        let unsolicited = match is_out {
            true if !self.terms.initial_r2t => len.min(self.terms.first_burst_length),
            _ => 0,
        };
        let immediate = match is_out {
            true if self.terms.immediate_data => len
                .min(self.terms.first_burst_length)
                .min(self.terms.target_max_recv_data_segment_length),
            _ => 0,
        };
        let command = ScsiCommand {
            immediate: false,
            is_final: unsolicited <= immediate,
            read: task.command.transfer == Transfer::In,
            write: is_out,
            attribute: TaskAttribute::Simple,
            lun: self.lun,
            initiator_task_tag: tag,
            expected_data_transfer_length: len,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
            cdb: task.command.cdb,
        };
        self.cmd_sn = self.cmd_sn.next();
        let header = command.bhs().with_data_segment(immediate);
        task.send_data(&header, 0, immediate, connection);
        task.at_bytes = immediate;
        if unsolicited > immediate {
            let ticket = Ticket {
                lun: self.lun,
                transfer: Tag::RESERVED,
                exp_stat_sn: self.exp_stat_sn,
                segment_bytes_max: self.terms.target_max_recv_data_segment_length,
            };
            task.send_burst(&ticket, unsolicited - immediate, connection);
        }
        connection.expect_at_most(self.streak.expects_at_most(task.answer_bytes()));
    }

    fn pdu(&mut self, pdu: &TargetPdu, data: &[u8], connection: &mut Link) -> Result<(), SessionError> {
        self.count(pdu)?;
        match pdu {
            TargetPdu::ScsiResponse(response) => {
                if response.response != ServiceResponse::COMMAND_COMPLETED {
                    return Err(SessionError::Protocol("a command failed in the target itself"));
                }
                let place = self.known(response.initiator_task_tag)?;
                self.check_whole(place, Status(response.status), response.residual)?;
                self.answered(place, Status(response.status), Sense::of_response(data))
            }
            TargetPdu::R2t(r2t) => self.ready_to_transfer(r2t, connection),
            TargetPdu::NopIn(ping) => {
                if ping.initiator_task_tag == PING_TAG {
                    self.pulse.pinged = None;
                }
                if ping.target_transfer_tag != Tag::RESERVED {
                    if !self.pulse.quota.takes_one(connection.departures()) {
                        let why = "it asks and asks for signs of life, and takes none";
                        return Err(SessionError::Protocol(why));
                    }
                    let pong = NopOut {
                        immediate: true,
                        lun: ping.lun,
                        initiator_task_tag: Tag::RESERVED,
                        target_transfer_tag: ping.target_transfer_tag,
                        cmd_sn: self.cmd_sn,
                        exp_stat_sn: self.exp_stat_sn,
                    };
                    connection.send(&pong.bhs(), Payload::NONE);
                }
                Ok(())
            }
            TargetPdu::TaskManagementResponse(response) if response.initiator_task_tag == RESET_TAG => {
                self.orders = self.orders.saturating_sub(1);
                self.news.push_back(News::Reset(response.response));
                Ok(())
            }
            TargetPdu::LogoutResponse(response) if response.initiator_task_tag == LOGOUT_TAG => {
                self.orders = self.orders.saturating_sub(1);
                self.news.push_back(News::LoggedOut);
                Ok(())
            }
            // What it has to say by it comes as a UNIT ATTENTION, too.
            TargetPdu::Async(event) if event.async_event == AsyncEvent::SCSI => Ok(()),
            TargetPdu::Async(event) => Err(SessionError::Dropped(event.async_event.0)),
            TargetPdu::Reject(reject) => Err(SessionError::Rejected(reject.reason.0)),
            TargetPdu::DataIn(_)
            | TargetPdu::LoginResponse(_)
            | TargetPdu::TextResponse(_)
            | TargetPdu::TaskManagementResponse(_)
            | TargetPdu::LogoutResponse(_) => Err(SessionError::Protocol("an answer to what was not asked")),
        }
    }

    /// Keeps count of the numbers of commands and statuses.
    fn count(&mut self, pdu: &TargetPdu) -> Result<(), SessionError> {
        self.open_window(pdu.window());
        if let Some(number) = pdu.status_number() {
            if number != self.exp_stat_sn {
                return Err(SessionError::Protocol("a status is missing, or comes twice"));
            }
            self.exp_stat_sn = number.next();
        }
        Ok(())
    }

    /// The window only ever opens; an older one overtaken by a newer says nothing (RFC 7143, 4.2.2.1).
    fn open_window(&mut self, window: Window) {
        let makes_sense = !window
            .max_cmd_sn
            .is_before(Serial(window.exp_cmd_sn.0.wrapping_sub(1)));
        if makes_sense && self.max_cmd_sn.is_before(window.max_cmd_sn) {
            self.max_cmd_sn = window.max_cmd_sn;
        }
    }

    /// Says where the data of a Data-In go.
    fn place(&mut self, arrival: &Arrival, connection: &mut Link) -> Result<(), SessionError> {
        let place = self.known(arrival.header.initiator_task_tag)?;
        let task = self.tasks.get_mut(place).expect("a known task is in its place");
        let start = u64::from(task.at_bytes);
        let end = start + arrival.len_bytes as u64;
        let fits = task.command.transfer == Transfer::In
            && arrival.header.buffer_offset == task.at_bytes
            && end <= u64::from(task.len_bytes);
        if !fits {
            return Err(SessionError::Protocol("data that was not asked for"));
        }
        let segments = &task.command.segments;
        connection
            .inbox_mut()
            .place(|out| segments::slice(segments, start..end, out));
        Ok(())
    }

    fn filled(&mut self, arrival: &Arrival) -> Result<(), SessionError> {
        self.count(&TargetPdu::DataIn(arrival.header))?;
        let place = self.known(arrival.header.initiator_task_tag)?;
        let task = self.tasks.get_mut(place).expect("a known task is in its place");
        task.at_bytes += u32::try_from(arrival.len_bytes).expect("it was seen to fit");
        match arrival.header.status {
            Some(end) => {
                self.check_whole(place, Status(end.status), end.residual)?;
                self.answered(place, Status(end.status), None)
            }
            None => Ok(()),
        }
    }

    fn ready_to_transfer(&mut self, r2t: &R2t, connection: &mut Link) -> Result<(), SessionError> {
        let place = self.known(r2t.initiator_task_tag)?;
        let task = self.tasks.get_mut(place).expect("a known task is in its place");
        let wanted = r2t.desired_data_transfer_length;
        // In order, and each byte once: DataSequenceInOrder is Yes and no error is recovered within a connection.
        let fits = task.command.transfer == Transfer::Out
            && task.answer.is_none()
            && r2t.buffer_offset == task.at_bytes
            && wanted > 0
            && wanted <= task.len_bytes - task.at_bytes
            && r2t.target_transfer_tag != Tag::RESERVED;
        if !fits {
            return Err(SessionError::Protocol("it asks for data that there is not"));
        }
        let ticket = Ticket {
            lun: self.lun,
            transfer: r2t.target_transfer_tag,
            exp_stat_sn: self.exp_stat_sn,
            segment_bytes_max: self.terms.target_max_recv_data_segment_length,
        };
        task.send_burst(&ticket, wanted, connection);
        Ok(())
    }

    /// A READ or WRITE that is said to have gone well has moved everything, or says how much it has not.
    fn check_whole(&mut self, place: usize, status: Status, residual: Residual) -> Result<(), SessionError> {
        let task = self.tasks.get_mut(place).expect("a known task is in its place");
        let is_short = status == Status::GOOD && task.at_bytes < task.len_bytes;
        if is_short && residual == Residual::None && cdb::moves_blocks(&task.command.cdb) {
            return Err(SessionError::Protocol(
                "a command is done before all of its data was moved",
            ));
        }
        Ok(())
    }

    fn answered(&mut self, place: usize, status: Status, sense: Option<Sense>) -> Result<(), SessionError> {
        let task = self.tasks.get_mut(place).expect("a known task is in its place");
        if task.answer.is_some() {
            return Err(SessionError::Protocol("a command is answered twice"));
        }
        if task.command.cookie == PROBE {
            self.tasks.remove(place);
            self.pulse.probed = None;
            return match verdict(status, sense) {
                Verdict::Retry(Attention::Reset | Attention::Cleared) => Err(SessionError::Aborted),
                _ => Ok(()),
            };
        }
        task.answer = Some((status, sense, task.at_bytes));
        self.end_if_answered(place);
        Ok(())
    }

    /// Ends a task that has its answer and its memory.
    fn end_if_answered(&mut self, place: usize) {
        let is_over = |task: &mut Task| task.lent == 0 && task.answer.is_some();
        if !self.tasks.get_mut(place).is_some_and(is_over) {
            return;
        }
        if let Some(task) = self.tasks.remove(place)
            && let Some((status, sense, moved_bytes)) = task.answer
        {
            self.long_reads -= u32::from(task.is_long_read());
            self.streak
                .answered(status == Status::GOOD && task.at_bytes == task.len_bytes);
            let command = task.command;
            self.news.push_back(News::Ended(Ended {
                command,
                status,
                sense,
                moved_bytes,
            }));
        }
    }

    fn known(&mut self, tag: Tag) -> Result<usize, SessionError> {
        self.place_of(tag)
            .ok_or(SessionError::Protocol("it speaks of a command that there is not"))
    }

    fn place_of(&mut self, tag: Tag) -> Option<usize> {
        let place = usize::try_from(tag.0 & 0xffff).ok()?;
        let task = self.tasks.get_mut(place)?;
        (task.tag == tag).then_some(place)
    }
}

/// What the Data-Out PDUs of one burst have in common.
struct Ticket {
    lun: Lun,
    transfer: Tag,
    exp_stat_sn: Serial,
    segment_bytes_max: u32,
}

impl Task {
    fn is_long_read(&self) -> bool {
        self.command.transfer == Transfer::In && self.len_bytes > STAGED_BYTES_MAX
    }

    /// Whether it was sent, and something of the target is to come.
    fn is_awaited(&self) -> bool {
        self.tag != Tag::RESERVED && self.answer.is_none()
    }

    /// How much comes next at least, if all goes well.
    fn answer_bytes(&self) -> usize {
        let left_bytes = self.len_bytes - self.at_bytes;
        let data_bytes = match self.command.transfer {
            Transfer::In => left_bytes,
            // The target is not to wait for its R2T to be seen.
            Transfer::Out if left_bytes > 0 => return ANYTHING_BYTES,
            Transfer::Out | Transfer::None => 0,
        };
        BHS_BYTES + usize::try_from(data_bytes).expect("this is a 64-bit monitor")
    }

    /// Sends the next `burst_bytes` of the task's data.
    fn send_burst(&mut self, ticket: &Ticket, burst_bytes: u32, connection: &mut Link) {
        let end = self.at_bytes + burst_bytes;
        let mut data_sn = 0;
        while self.at_bytes < end {
            let len = (end - self.at_bytes).min(ticket.segment_bytes_max);
            let data_out = DataOut {
                is_final: self.at_bytes + len == end,
                lun: ticket.lun,
                initiator_task_tag: self.tag,
                target_transfer_tag: ticket.transfer,
                exp_stat_sn: ticket.exp_stat_sn,
                data_sn,
                buffer_offset: self.at_bytes,
            };
            let header = data_out.bhs().with_data_segment(len);
            self.send_data(&header, self.at_bytes, len, connection);
            self.at_bytes += len;
            data_sn += 1;
        }
    }

    /// Sends a PDU with `len` bytes of the task's data, from `start` on.
    fn send_data(&mut self, header: &Bhs, start: u32, len: u32, connection: &mut Link) {
        if len == 0 {
            return connection.send(header, Payload::NONE);
        }
        let mut pieces = Vec::new();
        let range = u64::from(start)..u64::from(start) + u64::from(len);
        segments::slice(&self.command.segments, range, &mut pieces);
        if self.len_bytes <= STAGED_BYTES_MAX || connection.digests().data {
            return connection.send(header, Payload::Copied(&pieces));
        }
        connection.send(header, Payload::Lent(&pieces, self.tag));
        self.lent += 1;
    }
}

#[cfg(test)]
mod tests;
