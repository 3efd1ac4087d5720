//! Calls that have taken a slot: when they are carried out, and in how many parts.

use std::time::{Duration, Instant};

use super::io::Admitted;
use super::session::Arrival;
use super::state::State;
use crate::nfs::v4::{
    Arguments, CallCompound, Operation, ReplyWriter, Results, Sequence, SequenceResult, Status,
};
use crate::nfs::xdr::Writer;
use crate::sim::medium::Horizon;

/// A call that is being carried out, or will be.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) client: u64,
    /// Where it came from. The session may be over.
    pub(super) session: u64,
    pub(super) sequence: Sequence,
    /// Who waits for the answer.
    pub(super) connection: u64,
    pub(super) xid: u32,
    /// What is to be done.
    pub(super) arguments: Vec<u8>,
    pub(super) due: Instant,
    /// What had been written when it came.
    pub(super) horizon: Horizon,
    /// A WRITE that was let in.
    admitted: Option<Admitted>,
}

/// Whether a connection waits for a task.
pub(super) fn is_busy_with(task: &Task, connection: u64) -> bool {
    task.connection == connection
}

impl State {
    /// A compound behind a SEQUENCE comes.
    pub(super) fn sequenced(
        &mut self,
        (connection, xid): (u64, u32),
        arguments: &[u8],
        compound: &CallCompound<'_>,
        sequence: &Sequence,
    ) {
        self.expire_silent();
        let refused = |status| failed(compound, Operation::SEQUENCE, status);
        let Some(number) = self.session(sequence.session_id) else {
            return self.reply(connection, xid, &refused(Status::BADSESSION));
        };
        let mishaps = self.options.mishaps;
        let is_idle = !self.tasks.iter().any(|task| task.session == number);
        if is_idle && self.dice.one_in(mishaps.forgets_one_in) {
            self.sessions.remove(&number);
            return self.reply(connection, xid, &refused(Status::BADSESSION));
        }
        if self.dice.one_in(mishaps.delay_one_in) {
            return self.reply(connection, xid, &refused(Status::DELAY));
        }
        let quirks = self.options.quirks;
        let most = self.options.limits.message_bytes_max;
        if arguments.len() as u64 > most.into() {
            let len = arguments.len();
            self.complaints.push(format!(
                "a call of {len} bytes in a session where {most} are the most"
            ));
        }
        let Some(session) = self.sessions.get_mut(&number) else {
            return;
        };
        if quirks.needs_binding && !session.bound.contains(&connection) {
            return self.reply(connection, xid, &refused(Status::CONN_NOT_BOUND_TO_SESSION));
        }
        session.bound.insert(connection);
        let client = session.client;
        match session.arrive(sequence, arguments, &quirks, &mut self.complaints) {
            Arrival::Refused(status) => self.reply(connection, xid, &refused(status)),
            Arrival::Again(answer) => self.reply(connection, xid, &answer),
            Arrival::Uncached if quirks.refuses_at_second && compound.operations.len() > 1 => {
                let result = self.said(number, client, sequence);
                self.reply(connection, xid, &uncached(compound, result));
            }
            Arrival::Uncached => self.reply(connection, xid, &refused(Status::RETRY_UNCACHED_REP)),
            Arrival::Busy => {
                let same = self
                    .tasks
                    .iter_mut()
                    .find(|task| task.session == number && task.sequence.slot_id == sequence.slot_id);
                match same.filter(|_| quirks.joins_retries) {
                    Some(task) => (task.connection, task.xid) = (connection, xid),
                    None => self.reply(connection, xid, &refused(Status::DELAY)),
                }
            }
            Arrival::New => {
                self.late += u64::from(changes(compound) && self.is_late(client));
                self.clients.renew(client, self.now());
                let is_slow = self.dice.one_in(mishaps.slow_one_in);
                let wait = if is_slow {
                    self.while_(mishaps.slow_max)
                } else {
                    Duration::ZERO
                };
                self.tasks.push(Task {
                    client,
                    session: number,
                    sequence: *sequence,
                    connection,
                    xid,
                    arguments: arguments.to_vec(),
                    due: self.now() + wait,
                    horizon: self.tree.medium.horizon(),
                    admitted: None,
                });
            }
        }
    }

    fn while_(&mut self, max: Duration) -> Duration {
        let nanos = u64::try_from(max.as_nanos()).unwrap_or(u64::MAX - 1);
        Duration::from_nanos(self.dice.below(nanos + 1))
    }

    /// What the server says to a SEQUENCE.
    pub(super) fn said(&mut self, session: u64, client: u64, sequence: &Sequence) -> SequenceResult {
        let flags = self.flags(client);
        let Some(session) = self.sessions.get_mut(&session) else {
            return SequenceResult {
                session_id: sequence.session_id,
                sequence_id: sequence.sequence_id,
                slot_id: sequence.slot_id,
                highest_slot_id: sequence.highest_slot_id,
                target_highest_slot_id: sequence.highest_slot_id,
                status_flags: flags,
            };
        };
        if self.dice.one_in(self.options.mishaps.recall_one_in) {
            let slots = u64::from(session.highest()) + 1;
            session.target = u32::try_from(self.dice.below(slots)).unwrap_or(0);
        }
        session.result(sequence, flags)
    }

    /// Carries out what is due, in any order.
    pub(super) fn advance(&mut self) {
        self.expire_silent();
        let life = self.life;
        loop {
            let now = self.now();
            let is_due = |(place, task): (usize, &Task)| (task.due <= now).then_some(place);
            let due: Vec<usize> = self.tasks.iter().enumerate().filter_map(is_due).collect();
            if due.is_empty() {
                return;
            }
            let place = self.dice.pick(&due);
            let task = self.tasks.remove(place);
            self.carry_out(task);
            if self.life != life {
                return;
            }
        }
    }

    /// Whether something that this client has asked for is half done.
    pub(super) fn is_at_work_for(&self, client: u64) -> bool {
        self.tasks
            .iter()
            .any(|task| task.client == client && task.admitted.is_some())
    }

    /// Whether there is a call that is not carried out yet.
    pub(super) fn is_working(&self) -> bool {
        !self.tasks.is_empty()
    }

    fn carry_out(&mut self, mut task: Task) {
        if let Some(mut admitted) = task.admitted.take() {
            self.write_piece(&mut admitted, task.client);
            if admitted.is_done() {
                return self.written(&task, &admitted);
            }
            task.admitted = Some(admitted);
            let slow_max = self.options.mishaps.slow_max;
            task.due = self.now() + self.while_(slow_max) / 2;
            return self.tasks.push(task);
        }
        let arguments = std::mem::take(&mut task.arguments);
        let compound = CallCompound::parse(&arguments).expect("it was parsed when it came");
        if let [_, Arguments::Putfh(handle), Arguments::Write(write)] = compound.operations.as_slice()
            && self.dice.one_in(self.options.mishaps.slow_one_in)
            && let Some(admitted) = self.admit_slow(task.client, handle, write)
        {
            task.admitted = Some(admitted);
            return self.tasks.push(task);
        }
        let life = self.life;
        let answer = self.execute(&task, &compound);
        if self.life == life {
            self.answered(&task, answer);
        }
    }

    /// The last part of a WRITE was carried out.
    fn written(&mut self, task: &Task, admitted: &Admitted) {
        let result = admitted.result();
        let mut writer = Writer::default();
        let mut reply = ReplyWriter::new(&mut writer, b"");
        reply.put(&Results::Sequence(self.said(
            task.session,
            task.client,
            &task.sequence,
        )));
        reply.put(&Results::Putfh);
        reply.put(&Results::Write(result));
        reply.finish();
        self.answered(task, writer.into_bytes());
    }

    fn answered(&mut self, task: &Task, answer: Vec<u8>) {
        let keeps = self.options.quirks.keeps_replies || task.sequence.cache_this;
        if let Some(session) = self.sessions.get_mut(&task.session) {
            session.done(task.sequence.slot_id, keeps.then(|| answer.clone()));
        }
        self.clients.renew(task.client, self.now());
        if !self.dice.one_in(self.options.mishaps.mutes_one_in) {
            self.reply(task.connection, task.xid, &answer);
        }
        self.perhaps_call(task.connection, task.sequence.session_id);
    }
}

/// Whether it changes the content of an image, or its size.
fn changes(compound: &CallCompound<'_>) -> bool {
    let [_, Arguments::Putfh(_), change, ..] = compound.operations.as_slice() else {
        return false;
    };
    matches!(
        change,
        Arguments::Write(_) | Arguments::Deallocate(_) | Arguments::Setattr(_)
    )
}

/// An answer of one result: that it has failed.
pub(super) fn failed(compound: &CallCompound<'_>, operation: Operation, status: Status) -> Vec<u8> {
    let mut writer = Writer::default();
    ReplyWriter::new(&mut writer, compound.tag).failed(operation, status);
    writer.into_bytes()
}

/// An answer that says of the SEQUENCE that it was carried out, and not what of the rest.
fn uncached(compound: &CallCompound<'_>, result: SequenceResult) -> Vec<u8> {
    let mut writer = Writer::default();
    let mut reply = ReplyWriter::new(&mut writer, compound.tag);
    reply.put(&Results::Sequence(result));
    let second = compound.operations.get(1).map(Arguments::operation);
    reply.failed(second.unwrap_or(Operation::ILLEGAL), Status::RETRY_UNCACHED_REP);
    writer.into_bytes()
}
