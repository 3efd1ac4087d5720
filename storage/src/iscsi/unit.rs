//! What is known of a logical unit.

use super::scsi::cdb::Blocks;
use super::scsi::designator::Designator;
use super::tail::Tail;

/// A logical unit, as it described itself when the session began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    /// By what it is known again.
    pub(super) identity: Option<Designator>,
    /// What it addresses, in bytes.
    pub(super) block_bytes: u32,
    /// What its medium likes best, in bytes.
    pub(super) physical_block_bytes: u32,
    /// All of it, in bytes.
    pub(super) capacity_bytes: u64,
    /// What a guest may see of it: without the reserved tail.
    pub(super) size_bytes: u64,
    /// What it says of its protection and its cache; nothing while another session has it reserved.
    pub(super) mode: Option<UnitMode>,
    /// Its limits.
    pub(super) limits: Limits,
    /// Where lease records are kept on it.
    pub(super) tail: Option<Tail>,
}

/// What a unit's mode pages say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UnitMode {
    /// Whether it takes no writes.
    pub(super) is_write_protected: bool,
    /// What acknowledges writes.
    pub(super) cache: Cache,
}

/// What stands between a write and the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cache {
    /// Nothing: an acknowledged write is on the medium (WCE is 0).
    None,
    /// A cache that forgets (WCE is 1); whether FUA passes it by.
    Volatile(Fua),
}

/// Whether a write may ask to be on the medium when it is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fua {
    Supported,
    Missing,
}

/// How much one command may do, in blocks. Zero: the command is not supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// READ and WRITE.
    pub(super) transfer_blocks: u32,
    /// UNMAP, with one descriptor.
    pub(super) unmap_blocks: u32,
    /// WRITE SAME(16).
    pub(super) write_same_blocks: u32,
    /// Whether WRITE SAME(16) may free what it zeroes, and that reads as zeros.
    pub(super) write_same_unmaps: bool,
}

impl Limits {
    /// What a command does at most, whatever the unit takes: 1 MiB of data.
    pub(super) const TRANSFER_BYTES_MAX: u32 = 1 << 20;

    /// Those that the unit has `now`; what it could not do, or was not to, it is not asked for again.
    pub(super) fn renewed(&self, now: &Self) -> Self {
        let unless_missing = |before: u32, now: u32| if before == 0 { 0 } else { now };
        Self {
            transfer_blocks: now.transfer_blocks,
            unmap_blocks: unless_missing(self.unmap_blocks, now.unmap_blocks),
            write_same_blocks: unless_missing(self.write_same_blocks, now.write_same_blocks),
            write_same_unmaps: self.write_same_unmaps && now.write_same_unmaps,
        }
    }
}

impl Unit {
    /// What acknowledges writes; a unit that has not said is taken at its worst.
    pub(super) fn cache(&self) -> Cache {
        self.mode.map_or(Cache::Volatile(Fua::Missing), |mode| mode.cache)
    }

    /// Whether it takes no writes, as far as it has said.
    pub(super) fn is_write_protected(&self) -> bool {
        self.mode.is_some_and(|mode| mode.is_write_protected)
    }

    /// Takes in that it has no cache to speak of.
    pub(super) fn has_no_cache(&mut self) {
        if let Some(mode) = &mut self.mode {
            mode.cache = Cache::None;
        }
    }

    /// Takes in that its mode parameters have changed: it may have a cache now, and FUA may be gone. What they are is asked
    /// when the next session begins.
    pub(super) fn has_other_parameters(&mut self) {
        if let Some(mode) = &mut self.mode {
            mode.cache = Cache::Volatile(Fua::Missing);
        }
    }

    /// A range of bytes as blocks; it starts and ends at one.
    pub(super) fn blocks(&self, offset_bytes: u64, len_bytes: u64) -> Blocks {
        let block = u64::from(self.block_bytes);
        Blocks {
            lba: offset_bytes / block,
            count: u32::try_from(len_bytes / block).expect("a command's length was limited"),
        }
    }
}
