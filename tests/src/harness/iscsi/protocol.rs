//! iSCSI as the proxy must know it, up to playing the volatile cache of a target.
//!
//! A cache that acknowledges writes by itself gets ahead of the target: the client has seen statuses that the target has
//! not given, and the target has not seen commands that the client has sent. So in volatile mode the two sides count for
//! themselves: CmdSN, StatSN and the tags of tasks are translated.
//!
//! Held are writes that come whole with their command, and only after the target has taken one of the same session since
//! it was last settled who may write: a write that the target would refuse is refused by the target. Use
//! [`super::target::Plan::immediate_bytes`] so that they do come whole.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::pdu::{Digests, HEADER_BYTES, NO_TAG, Pdu, field, opcode, seal, set};
use super::{damage, steps};
use crate::harness::proxy::{Damage, Direction, Kind, Protocol, Step};

/// The protocol on one connection.
#[derive(Debug, Default)]
pub struct Iscsi {
    /// Counts, for all connections, how often it was settled who may write.
    settled: Arc<AtomicU64>,
    negotiated: Digests,
    /// Nothing until the login is over.
    digests: Digests,
    has_logged_in: bool,
    /// The steps of the commands that are not answered, by the client's tag.
    steps: BTreeMap<u32, Step>,
    /// The same commands' tags: the target's and the client's.
    tasks: BTreeMap<u32, Task>,
    next_tag: u32,
    counts: Counts,
    /// What was settled when the target last took a write.
    proven: Option<u64>,
}

/// A command as the target knows it.
#[derive(Clone, Copy, Debug)]
struct Task {
    client_tag: u32,
    is_write: bool,
}

/// How far each side has counted.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// The CmdSN that the client uses next.
    client_command: u32,
    /// The CmdSN that the target expects next.
    target_command: u32,
    /// The StatSN that the target uses next.
    status: u32,
    /// How many more statuses the client has seen.
    ahead: u32,
    /// How many commands the target has room for.
    window: u32,
}

/// FUA in the second byte of a READ or WRITE.
const FUA: u8 = 0x08;

impl Iscsi {
    fn learn(&mut self, pdu: &Pdu<'_>) {
        let text = pdu.data(Digests::default());
        for pair in text.split(|byte| *byte == 0) {
            // Whoever speaks last has chosen.
            match pair {
                b"HeaderDigest=CRC32C" => self.negotiated.header = true,
                b"HeaderDigest=None" => self.negotiated.header = false,
                b"DataDigest=CRC32C" => self.negotiated.data = true,
                b"DataDigest=None" => self.negotiated.data = false,
                _ => {}
            }
        }
        if pdu.ends_login() {
            self.digests = self.negotiated;
        }
    }

    /// Takes note of a command that the client has sent, held or not.
    fn count_command(&mut self, pdu: &Pdu<'_>) {
        if !pdu.is_immediate() && pdu.opcode() != opcode::DATA_OUT {
            self.counts.client_command = pdu.field(field::COMMAND_NUMBER).wrapping_add(1);
        }
    }

    /// Gives a command its number in the target's order, and says what the target has told.
    fn number(&mut self, request: &mut [u8], tag: u32) {
        let pdu = Pdu(request);
        let (is_counted, is_data) = (!pdu.is_immediate(), pdu.opcode() == opcode::DATA_OUT);
        set(request, field::TAG, tag);
        // A Data-Out has no CmdSN.
        if !is_data {
            set(request, field::COMMAND_NUMBER, self.counts.target_command);
            let step = u32::from(is_counted);
            self.counts.target_command = self.counts.target_command.wrapping_add(step);
        }
        set(request, field::EXPECTED_STATUS, self.counts.status);
        seal(request, self.digests);
    }

    fn new_tag(&mut self) -> u32 {
        // The one that means none is 2³² commands away.
        self.next_tag = self.next_tag.wrapping_add(1);
        self.next_tag
    }

    /// The target's tag of one of the client's tasks.
    fn target_tag(&self, client_tag: u32) -> Option<u32> {
        let found = self.tasks.iter().find(|(_, task)| task.client_tag == client_tag);
        found.map(|(tag, _)| *tag)
    }

    /// Takes in the numbers of an answer.
    fn count_status(&mut self, pdu: &Pdu<'_>) {
        if pdu.has_status_number() {
            let next = u32::from(pdu.has_status());
            self.counts.status = pdu.field(field::STATUS_NUMBER).wrapping_add(next);
        }
        let room = pdu.field(field::MAXIMUM_COMMAND);
        self.counts.window = room.wrapping_sub(pdu.field(field::EXPECTED_COMMAND));
    }

    /// Says in an answer which commands have come.
    fn tell_commands(&self, answer: &mut [u8]) {
        let expected = self.counts.client_command;
        set(answer, field::EXPECTED_COMMAND, expected);
        let maximum = expected.wrapping_add(self.counts.window);
        set(answer, field::MAXIMUM_COMMAND, maximum);
    }

    fn is_proven(&self) -> bool {
        self.proven == Some(self.settled.load(Ordering::SeqCst))
    }
}

impl Protocol for Iscsi {
    fn begin(&self) -> Box<dyn Protocol> {
        Box::new(Self {
            settled: Arc::clone(&self.settled),
            ..Self::default()
        })
    }

    fn message_bytes(&self, _: Direction, stream: &[u8]) -> Option<usize> {
        Pdu(stream).bytes(self.digests)
    }

    fn note(&mut self, direction: Direction, message: &[u8]) {
        let pdu = Pdu(message);
        if matches!(pdu.opcode(), opcode::LOGIN | opcode::LOGIN_RESPONSE) {
            return self.learn(&pdu);
        }
        let tag = pdu.field(field::TAG);
        match direction {
            Direction::ToServer => self.steps.extend(steps::of(&pdu).map(|step| (tag, step))),
            Direction::ToClient if pdu.has_status() => drop(self.steps.remove(&tag)),
            Direction::ToClient => {}
        }
    }

    fn step(&self, direction: Direction, message: &[u8]) -> Option<Step> {
        let pdu = Pdu(message);
        let by_tag = || self.steps.get(&pdu.field(field::TAG)).copied();
        match direction {
            Direction::ToServer => steps::of(&pdu),
            Direction::ToClient => steps::of(&pdu).or_else(by_tag),
        }
    }

    fn damaged(&self, direction: Direction, message: &[u8], damage: Damage) -> Option<Vec<u8>> {
        damage::damaged(direction, message, self.digests, damage)
    }

    fn kind(&self, request: &[u8]) -> Kind {
        let pdu = Pdu(request);
        let [operation, options, ..] = pdu.cdb();
        match (pdu.opcode(), operation) {
            (opcode::SCSI_COMMAND, 0x2a | 0xaa | 0x8a) => {
                let expected = usize::try_from(pdu.field(field::EXPECTED_BYTES));
                let is_whole = pdu.is_final() && expected == Ok(pdu.data_bytes());
                if is_whole && options & FUA == 0 && self.is_proven() {
                    Kind::Unstable
                } else {
                    Kind::Other
                }
            }
            // SYNCHRONIZE CACHE; and what changes who may write, or ends commands, comes after all before it.
            (opcode::SCSI_COMMAND, 0x35 | 0x91 | 0x5f) => Kind::Flush,
            (opcode::TASK_MANAGEMENT | opcode::LOGOUT, _) => Kind::Flush,
            _ => Kind::Other,
        }
    }

    fn tag(&self, message: &[u8]) -> u64 {
        u64::from(Pdu(message).field(field::TAG))
    }

    fn acknowledgement(&mut self, request: &[u8]) -> Vec<u8> {
        let pdu = Pdu(request);
        self.count_command(&pdu);
        let mut answer = vec![0; HEADER_BYTES + if self.digests.header { 4 } else { 0 }];
        // Status GOOD of a command that was completed at the target.
        for (place, byte) in answer.iter_mut().zip([opcode::SCSI_RESPONSE, 0x80]) {
            *place = byte;
        }
        set(&mut answer, field::TAG, pdu.field(field::TAG));
        let number = self.counts.status.wrapping_add(self.counts.ahead);
        set(&mut answer, field::STATUS_NUMBER, number);
        self.counts.ahead = self.counts.ahead.wrapping_add(1);
        self.tell_commands(&mut answer);
        seal(&mut answer, self.digests);
        answer
    }

    fn depends(&self, request: &[u8], held: &[u8]) -> bool {
        let (pdu, held) = (Pdu(request), Pdu(held));
        if pdu.opcode() != opcode::SCSI_COMMAND || pdu.logical_unit() != held.logical_unit() {
            return false;
        }
        let [operation, ..] = pdu.cdb();
        match (pdu.blocks(), held.blocks()) {
            (Some(blocks), Some(held)) => blocks.start < held.end && held.start < blocks.end,
            // TEST UNIT READY, REQUEST SENSE, INQUIRY, MODE SENSE, READ CAPACITY, PERSISTENT RESERVE IN, REPORT LUNS.
            _ => !matches!(
                operation,
                0x00 | 0x03 | 0x12 | 0x1a | 0x5a | 0x25 | 0x9e | 0x5e | 0xa0
            ),
        }
    }

    fn keeps_order(&self) -> bool {
        // Simple tasks may be done in any order.
        false
    }

    fn to_server(&mut self, mut request: Vec<u8>) -> Vec<u8> {
        let pdu = Pdu(&request);
        if pdu.opcode() == opcode::LOGIN {
            let next = pdu.field(field::COMMAND_NUMBER);
            self.counts.client_command = next;
            self.counts.target_command = next;
        }
        if !self.has_logged_in || !pdu.is_whole() {
            return request;
        }
        self.count_command(&pdu);
        let client_tag = pdu.field(field::TAG);
        let (operation, code, referenced) = (pdu.cdb()[0], pdu.opcode(), pdu.field(field::EXPECTED_BYTES));
        let is_settling = matches!((code, operation), (opcode::SCSI_COMMAND, 0x5f));
        if is_settling || code == opcode::TASK_MANAGEMENT {
            self.settled.fetch_add(1, Ordering::SeqCst);
        }
        let tag = match code {
            _ if client_tag == NO_TAG => NO_TAG,
            opcode::DATA_OUT => self.target_tag(client_tag).unwrap_or(client_tag),
            _ => {
                let tag = self.new_tag();
                let is_write = steps::of(&pdu) == Some(Step::Write);
                self.tasks.insert(tag, Task { client_tag, is_write });
                tag
            }
        };
        if code == opcode::TASK_MANAGEMENT
            && let Some(task) = self.target_tag(referenced)
        {
            set(&mut request, field::EXPECTED_BYTES, task);
        }
        self.number(&mut request, tag);
        request
    }

    fn write_back(&mut self, mut held: Vec<u8>) -> Vec<u8> {
        let tag = self.new_tag();
        self.number(&mut held, tag);
        held
    }

    fn to_client(&mut self, mut answer: Vec<u8>) -> Vec<u8> {
        let pdu = Pdu(&answer);
        if !pdu.is_whole() {
            return answer;
        }
        self.count_status(&pdu);
        if !self.has_logged_in {
            self.has_logged_in = pdu.ends_login();
            return answer;
        }
        let (tag, number) = (pdu.field(field::TAG), pdu.field(field::STATUS_NUMBER));
        let (has_number, is_good, has_status) = (pdu.has_status_number(), pdu.is_good(), pdu.has_status());
        if let Some(task) = self.tasks.get(&tag).copied() {
            set(&mut answer, field::TAG, task.client_tag);
            if task.is_write && is_good {
                self.proven = Some(self.settled.load(Ordering::SeqCst));
            }
            if has_status {
                self.tasks.remove(&tag);
            }
        }
        if has_number {
            let number = number.wrapping_add(self.counts.ahead);
            set(&mut answer, field::STATUS_NUMBER, number);
        }
        self.tell_commands(&mut answer);
        seal(&mut answer, self.digests);
        answer
    }

    fn swallow(&mut self, answer: &[u8]) -> bool {
        let pdu = Pdu(answer);
        self.count_status(&pdu);
        self.counts.ahead = self.counts.ahead.wrapping_sub(1);
        pdu.opcode() == opcode::SCSI_RESPONSE && pdu.is_good()
    }
}

#[cfg(test)]
mod tests;
