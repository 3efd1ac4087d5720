//! The sessions of a simulated server: slots, and what each was asked for last (RFC 8881, 2.10.6).

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::options::Quirks;
use crate::nfs::v4::callback::CbSequenceResult;
use crate::nfs::v4::{Sequence, SequenceResult, SessionId, Status};

/// A session of a client.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) client: u64,
    slots: Vec<Slot>,
    /// The highest slot that the server would like to be used.
    pub(super) target: u32,
    /// Connections that carry it.
    pub(super) bound: BTreeSet<u64>,
    /// What the server calls the client's program.
    pub(super) callback_program: u32,
    /// The number of the next call of the server, and that of the one under way.
    callback_sequence: u32,
    callback: Option<u32>,
}

#[derive(Debug, Default)]
struct Slot {
    sequence_id: u32,
    is_busy: bool,
    asked: u64,
    answer: Option<Vec<u8>>,
}

/// What becomes of a call in a slot.
#[derive(Debug)]
pub(super) enum Arrival {
    /// It is to be carried out.
    New,
    /// It was, and this was the answer.
    Again(Vec<u8>),
    /// It was, and the answer is not known any more.
    Uncached,
    /// It is being carried out.
    Busy,
    /// It is none.
    Refused(Status),
}

impl Session {
    pub(super) fn new(client: u64, slots: u32, callback_program: u32, connection: u64) -> Self {
        Self {
            client,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            target: slots - 1,
            bound: BTreeSet::from([connection]),
            callback_program,
            callback_sequence: 1,
            callback: None,
        }
    }

    /// A call arrives; `compound` is all that it asks for.
    pub(super) fn arrive(
        &mut self,
        sequence: &Sequence,
        compound: &[u8],
        quirks: &Quirks,
        complaints: &mut Vec<String>,
    ) -> Arrival {
        let Some(slot) = self.slots.get_mut(index(sequence.slot_id)) else {
            complaints.push(format!("slot {} is none of the session", sequence.slot_id));
            return Arrival::Refused(Status::BADSLOT);
        };
        if sequence.highest_slot_id < sequence.slot_id {
            complaints.push(format!("slot {} is above the highest", sequence.slot_id));
            return Arrival::Refused(Status::BAD_HIGH_SLOT);
        }
        let asked = digest(compound);
        if sequence.sequence_id == slot.sequence_id.wrapping_add(1) {
            if slot.is_busy {
                complaints.push(format!(
                    "a call in slot {}, whose last has not ended",
                    sequence.slot_id
                ));
                return Arrival::Refused(Status::SEQ_MISORDERED);
            }
            *slot = Slot {
                sequence_id: sequence.sequence_id,
                is_busy: true,
                asked,
                answer: None,
            };
            return Arrival::New;
        }
        if sequence.sequence_id != slot.sequence_id || sequence.sequence_id == 0 {
            // An old connection may deliver what is over; nobody waits for an answer.
            if sequence.sequence_id.wrapping_sub(slot.sequence_id) < u32::MAX / 2 {
                complaints.push(format!(
                    "call {} in slot {}, where {} was the last",
                    sequence.sequence_id, sequence.slot_id, slot.sequence_id
                ));
            }
            return Arrival::Refused(Status::SEQ_MISORDERED);
        }
        if slot.is_busy {
            return Arrival::Busy;
        }
        match &slot.answer {
            _ if quirks.finds_false_retries && slot.asked != asked => {
                Arrival::Refused(Status::SEQ_FALSE_RETRY)
            }
            Some(answer) => Arrival::Again(answer.clone()),
            None => Arrival::Uncached,
        }
    }

    /// The call of a slot was carried out. `answer` is kept for replays.
    pub(super) fn done(&mut self, slot: u32, answer: Option<Vec<u8>>) {
        if let Some(slot) = self.slots.get_mut(index(slot)) {
            slot.is_busy = false;
            slot.answer = answer;
        }
    }

    /// What the server says to a slot.
    pub(super) fn result(&self, sequence: &Sequence, status_flags: u32) -> SequenceResult {
        SequenceResult {
            session_id: sequence.session_id,
            sequence_id: sequence.sequence_id,
            slot_id: sequence.slot_id,
            highest_slot_id: self.highest(),
            target_highest_slot_id: self.target,
            status_flags,
        }
    }

    pub(super) fn highest(&self) -> u32 {
        u32::try_from(self.slots.len() - 1).expect("slots are few")
    }

    /// Begins a call of the server, if none is under way: its number.
    pub(super) fn call(&mut self, xid: u32) -> Option<u32> {
        if self.callback.is_some() {
            return None;
        }
        self.callback = Some(xid);
        Some(self.callback_sequence)
    }

    /// Whether a call of the server is under way that has this number.
    pub(super) fn is_called_by(&self, xid: u32) -> bool {
        self.callback == Some(xid)
    }

    /// What the client answers to it. Whether that makes sense.
    pub(super) fn called(
        &mut self,
        id: SessionId,
        status: Status,
        result: Option<&CbSequenceResult>,
    ) -> bool {
        self.callback = None;
        let Some(result) = result else {
            return status != Status::OK;
        };
        let is_right =
            result.session_id == id && result.sequence_id == self.callback_sequence && result.slot_id == 0;
        self.callback_sequence += 1;
        is_right
    }
}

fn digest(compound: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    compound.hash(&mut hasher);
    hasher.finish()
}

fn index(slot: u32) -> usize {
    usize::try_from(slot).expect("this is a 64-bit monitor")
}
