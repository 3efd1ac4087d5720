//! The end of a logical unit that its guest is not shown: there the lease's records are, and what says that they are.
//!
//! ```text
//!   0                          guest_bytes                                  capacity
//!   │ what the guest sees      │ header │ slot 0 │ … │ slot 7 │ unused      │
//!                              └ pieces of 4096 bytes, or a block ┘
//! ```
//!
//! A unit is formatted by zeros in the slots and then, durably, the header. The record of epoch n goes durably into
//! slot n mod 8, by whoever has the unit's reservation: nobody else can write then, and so nobody makes the same step. A
//! write that was torn is a step that did not happen; it is the only damage that a crash explains.

mod header;
#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::lease::{Record, RecordError};

pub use self::header::{FormatId, HEADER_BYTES, Header, HeaderError, IDENTITY_BYTES_MAX};

/// As many records as are kept.
pub const SLOTS: u64 = 8;

/// The tail has at least this size: room for the pieces, and for what comes to mind later.
const TAIL_BYTES_MIN: u64 = 1 << 20;

const PIECE_BYTES_MIN: u32 = 4096;

/// With larger blocks the pieces would not fit.
const BLOCK_BYTES_MAX: u32 = 65536;

/// Where everything is in a unit that is formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    capacity_bytes: u64,
    block_bytes: u32,
    guest_bytes: u64,
}

impl Tail {
    /// The tail of a unit of `capacity_bytes`; `None` if nothing would be left for the guest, or if no unit has such
    /// a size or such blocks.
    pub fn layout(capacity_bytes: u64, block_bytes: u32) -> Option<Self> {
        let is_block = block_bytes.is_power_of_two() && (512..=BLOCK_BYTES_MAX).contains(&block_bytes);
        if !is_block || !capacity_bytes.is_multiple_of(u64::from(block_bytes)) {
            return None;
        }
        let piece_bytes = u64::from(block_bytes.max(PIECE_BYTES_MIN));
        let shown = capacity_bytes.checked_sub(TAIL_BYTES_MIN)?;
        let guest_bytes = shown - shown % piece_bytes;
        (guest_bytes > 0).then_some(Self {
            capacity_bytes,
            block_bytes,
            guest_bytes,
        })
    }

    /// The size of the unit when it was formatted.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// The unit's blocks.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// What the guest sees: everything before the header.
    pub fn guest_bytes(&self) -> u64 {
        self.guest_bytes
    }

    /// How long the header and each slot is: whole blocks.
    pub fn piece_bytes(&self) -> u64 {
        u64::from(self.block_bytes.max(PIECE_BYTES_MIN))
    }

    /// Where the header is.
    pub fn header(&self) -> Range<u64> {
        self.guest_bytes..self.guest_bytes + self.piece_bytes()
    }

    /// Where the slots are, one behind the other.
    pub fn slots(&self) -> Range<u64> {
        let start = self.header().end;
        start..start + SLOTS * self.piece_bytes()
    }

    /// Where the record of `epoch` goes.
    pub fn slot_of(&self, epoch: u64) -> Range<u64> {
        let start = self.slots().start + epoch % SLOTS * self.piece_bytes();
        start..start + self.piece_bytes()
    }

    /// What is written to the slot of `record`.
    pub fn encode_record(&self, record: &Record) -> Vec<u8> {
        let mut slot = record.text().into_bytes();
        slot.resize(self.piece_len(), 0);
        slot
    }

    /// The newest record of [`Tail::slots`]; `None` before the first one.
    ///
    /// One slot that cannot be read is passed over where the step after the newest record goes: that step was torn, and
    /// so did not happen. Others are where only older records can be. Two in a row behind the newest
    /// record could be two steps that did happen, and then nobody knows who has the unit.
    ///
    /// # Errors
    ///
    /// When it is not known which record is the newest.
    ///
    /// # Panics
    ///
    /// When `bytes` are not as many as the slots have.
    pub fn newest(&self, bytes: &[u8]) -> Result<Option<Record>, UnreadableTail> {
        let slots_bytes = self.slots().end - self.slots().start;
        assert_eq!(bytes.len() as u64, slots_bytes, "all slots are read at once");
        let slots: Vec<Slot> = (0..)
            .zip(bytes.chunks_exact(self.piece_len()))
            .map(|(number, bytes)| Slot::parse(number, bytes))
            .collect();
        let newest = slots
            .iter()
            .filter_map(Slot::record)
            .max_by_key(|record| record.epoch);
        // Without a record the first step is the next one.
        let next = newest.map_or(1, |record| record.epoch.wrapping_add(1) % SLOTS);
        let from_next = slots.iter().cycle().skip(slot_index(next));
        let torn = from_next
            .take(slots.len())
            .take_while(|slot| slot.is_damaged())
            .count();
        let is_explained = match newest {
            Some(_) => torn <= 1,
            // Nothing but the first step has been tried.
            None => slots.iter().filter(|slot| slot.is_damaged()).count() == torn && torn <= 1,
        };
        if is_explained {
            return Ok(newest.cloned());
        }
        Err(UnreadableTail {
            // The slot behind those has something older, and so the step that would have gone there was not made.
            newest_possible: newest.map(|record| record.epoch.saturating_add(torn as u64)),
            slots: damaged(&slots),
        })
    }

    fn piece_len(&self) -> usize {
        usize::try_from(self.piece_bytes()).expect("a piece has at most 64 KiB")
    }
}

/// Why it is not known who has a unit.
///
/// Whoever breaks the lease writes a record with the number after `newest_possible`, and then zeros into the slots
/// that are named: in this order, so that a crash in between leaves what is unreadable unreadable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the newest lease record in the unit's reserved tail cannot be read: {}",
    slots.iter().map(|(slot, why)| format!("slot {slot}: {why}")).collect::<Vec<_>>().join("; ")
)]
pub struct UnreadableTail {
    /// The newest step that can have been made; `None` if no record is left to count from.
    pub newest_possible: Option<u64>,
    /// The slots that cannot be read, and why.
    pub slots: Vec<(u64, SlotError)>,
}

/// Why a slot has no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// Its content.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// It is whole, and belongs elsewhere.
    #[error("it says of itself that it is number {0}, which has another slot: it was copied")]
    Number(u64),
}

/// What is in a slot.
enum Slot {
    /// Zeros, as formatting leaves them.
    Empty,
    Whole(Record),
    Damaged(SlotError),
}

impl Slot {
    fn parse(number: u64, bytes: &[u8]) -> Self {
        let Some(last) = bytes.iter().rposition(|byte| *byte != 0) else {
            return Self::Empty;
        };
        let (text, _) = bytes.split_at(last + 1);
        match Record::parse(text) {
            Ok(record) if record.epoch % SLOTS == number => Self::Whole(record),
            Ok(record) => Self::Damaged(SlotError::Number(record.epoch)),
            Err(error) => Self::Damaged(error.into()),
        }
    }

    fn record(&self) -> Option<&Record> {
        match self {
            Self::Whole(record) => Some(record),
            Self::Empty | Self::Damaged(_) => None,
        }
    }

    fn is_damaged(&self) -> bool {
        matches!(self, Self::Damaged(_))
    }
}

fn slot_index(slot: u64) -> usize {
    usize::try_from(slot).expect("there are eight slots")
}

fn damaged(slots: &[Slot]) -> Vec<(u64, SlotError)> {
    let numbered = (0..).zip(slots);
    let damaged = numbered.filter_map(|(number, slot)| match slot {
        Slot::Damaged(error) => Some((number, *error)),
        Slot::Empty | Slot::Whole(_) => None,
    });
    damaged.collect()
}
