//! What a simulated guest asks of its disk.

use coracle_storage::request::{Durability, Operation, Space};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::oracle::{Effect, SECTOR_BYTES};

/// One request, without its memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub(crate) operation: Operation,
    pub(crate) offset_bytes: u64,
    pub(crate) len_bytes: u64,
    pub(crate) durability: Durability,
}

/// The character of one guest.
pub(crate) struct Workload {
    /// Where most requests go, so that they meet.
    hot_sectors: u64,
    sectors_max: u64,
    /// Requests in flight at most.
    pub(crate) depth: usize,
    /// One in so many requests is a flush.
    flush_one_in: u64,
}

impl Workload {
    pub(crate) fn draw(dice: &mut Dice) -> Self {
        Self {
            hot_sectors: dice.pick(&[4, 16, 64]),
            sectors_max: dice.pick(&[1, 4, 16, 16, 128]),
            depth: dice.pick(&[1, 2, 4, 8, 16, 32]),
            flush_one_in: dice.pick(&[4, 12, 40]),
        }
    }

    /// What is asked next of a disk of `size_bytes`.
    pub(crate) fn wish(&self, size_bytes: u64, dice: &mut Dice) -> Wish {
        let wish = |operation, offset_bytes, len_bytes| Wish {
            operation,
            offset_bytes,
            len_bytes,
            durability: Durability::Cached,
        };
        if dice.one_in(self.flush_one_in) {
            return wish(Operation::Flush, 0, 0);
        }
        if dice.one_in(60) {
            let more_bytes = dice.below(32) * SECTOR_BYTES;
            return wish(Operation::Grow, 0, size_bytes + more_bytes);
        }
        let durability = match dice.below(4) {
            0 => Durability::Durable,
            _ => Durability::Cached,
        };
        let operation = match dice.below(20) {
            0..=7 => Operation::Read,
            8..=15 => Operation::Write,
            16 | 17 => Operation::Discard,
            18 => Operation::WriteZeroes {
                space: Space::MayBeFreed,
            },
            _ => Operation::WriteZeroes { space: Space::Stays },
        };
        let (offset_bytes, len_bytes) = self.range(operation, size_bytes, dice);
        Wish {
            durability,
            ..wish(operation, offset_bytes, len_bytes)
        }
    }

    /// The same of an image that knows its holes: it may also be asked where data are, from there to the end of the disk.
    pub(crate) fn wish_of_sparse(&self, size_bytes: u64, dice: &mut Dice) -> Wish {
        let wish = self.wish(size_bytes, dice);
        if wish.operation != Operation::Read || !dice.one_in(8) {
            return wish;
        }
        Wish {
            operation: Operation::FindData,
            len_bytes: size_bytes - wish.offset_bytes,
            ..wish
        }
    }

    fn range(&self, operation: Operation, size_bytes: u64, dice: &mut Dice) -> (u64, u64) {
        let sectors = size_bytes / SECTOR_BYTES;
        let offset = match dice.below(3) {
            0 => dice.below(sectors),
            _ => dice.below(sectors.min(self.hot_sectors)),
        };
        let has_memory = matches!(operation, Operation::Read | Operation::Write);
        let sectors_max = match dice.below(16) {
            // To the end of the disk.
            0 if !has_memory => return (offset * SECTOR_BYTES, (sectors - offset) * SECTOR_BYTES),
            _ => self.sectors_max.min(sectors - offset),
        };
        (
            offset * SECTOR_BYTES,
            (1 + dice.below(sectors_max)) * SECTOR_BYTES,
        )
    }
}

impl Wish {
    /// The same in the words of the oracle.
    pub(crate) fn effect(&self) -> Effect {
        match self.operation {
            // A raise has nothing that could be read.
            Operation::Read
            | Operation::FindData
            | Operation::Raise
            | Operation::Yield
            | Operation::TakeBack => Effect::Read,
            Operation::Write => Effect::Write,
            Operation::Flush => Effect::Flush,
            Operation::Discard => Effect::Discard,
            Operation::WriteZeroes { .. } => Effect::Zero,
            Operation::Grow => Effect::Grow,
        }
    }
}
