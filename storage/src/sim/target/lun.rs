//! One logical unit of a simulated target: its bytes, its reservation, and what it still has to tell.

use std::collections::{BTreeMap, VecDeque};

use super::cdb::Blocks;
use super::options::Quirks;
use super::refusal::{Attention, Illegal};
use super::reservation::Reservations;
use crate::backend::Access;
use crate::reactor::FileSlot;

/// Size of a logical block, in bytes.
pub const BLOCK_BYTES: u64 = 512;

/// A logical unit with a write-back cache.
#[derive(Debug)]
pub(super) struct LogicalUnit {
    pub(super) number: u16,
    /// Its bytes on the target's medium.
    pub(super) file: FileSlot,
    pub(super) size_bytes: u64,
    pub(super) access: Access,
    pub(super) reservations: Reservations,
    /// Whether a WRITE may ask to be on the medium when it is acknowledged.
    pub(super) takes_fua: bool,
    /// How often it was reset: what arrived before the last time is not carried out.
    pub(super) resets: u64,
    /// What each session has not been told yet.
    attentions: BTreeMap<u64, VecDeque<Attention>>,
}

/// A range of bytes of a logical unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
}

impl LogicalUnit {
    pub(super) fn new(number: u16, file: FileSlot, size_bytes: u64, access: Access, quirks: Quirks) -> Self {
        Self {
            number,
            file,
            size_bytes,
            access,
            reservations: Reservations::new(quirks),
            takes_fua: quirks.takes_fua,
            resets: 0,
            attentions: BTreeMap::new(),
        }
    }

    /// Forgets what does not survive the target's process.
    pub(super) fn power_on(&mut self, quirks: Quirks) {
        self.reservations = Reservations::new(quirks);
        self.takes_fua = quirks.takes_fua;
        self.attentions.clear();
    }

    /// How many blocks it has.
    pub(super) fn block_count(&self) -> u64 {
        self.size_bytes / BLOCK_BYTES
    }

    /// Where blocks lie, if they all exist.
    pub(super) fn extent(&self, blocks: Blocks) -> Result<Extent, Illegal> {
        let end = blocks.first.checked_add(blocks.count.into());
        if end.is_none_or(|end| end > self.block_count()) {
            return Err(Illegal::LbaOutOfRange);
        }
        Ok(Extent {
            offset_bytes: blocks.first * BLOCK_BYTES,
            len_bytes: u64::from(blocks.count) * BLOCK_BYTES,
        })
    }

    /// A session will be told, once.
    pub(super) fn alarm(&mut self, session: u64, attention: Attention) {
        let attentions = self.attentions.entry(session).or_default();
        if !attentions.contains(&attention) {
            attentions.push_back(attention);
        }
    }

    /// What a session is told now, instead of having its command carried out.
    pub(super) fn take_attention(&mut self, session: u64) -> Option<Attention> {
        self.attentions.get_mut(&session)?.pop_front()
    }

    /// A session is over.
    pub(super) fn forget(&mut self, session: u64) {
        self.attentions.remove(&session);
    }
}
