//! What a simulated guest asks of its disk, and what it has to hear.

use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::oracle::{Effect, SECTOR_BYTES};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

/// One request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    pub(super) kind: u32,
    pub(super) effect: Effect,
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
    /// Of a discard or a write-zeroes.
    pub(super) flags: u32,
}

/// The longest read or write, in sectors.
pub(super) const SECTORS_MAX: u64 = 16;

impl Wish {
    /// What is asked next of a disk of `size_bytes`; most requests meet at its beginning.
    pub(super) fn draw(size_bytes: u64, dice: &mut Dice) -> Self {
        let sectors = size_bytes / SECTOR_BYTES;
        let offset = match dice.below(3) {
            0 => dice.below(sectors),
            _ => dice.below(sectors.min(8)),
        };
        let count = 1 + dice.below(SECTORS_MAX.min(sectors - offset));
        let (kind, effect, flags) = match dice.below(20) {
            0..=6 => (VIRTIO_BLK_T_IN, Effect::Read, 0),
            7..=13 => (VIRTIO_BLK_T_OUT, Effect::Write, 0),
            14..=16 => {
                return Self {
                    kind: VIRTIO_BLK_T_FLUSH,
                    effect: Effect::Flush,
                    offset_bytes: 0,
                    len_bytes: 0,
                    flags: 0,
                };
            }
            17 => (VIRTIO_BLK_T_DISCARD, Effect::Discard, 0),
            flags => (VIRTIO_BLK_T_WRITE_ZEROES, Effect::Zero, u32::from(flags == 18)),
        };
        Self {
            kind,
            effect,
            offset_bytes: offset * SECTOR_BYTES,
            len_bytes: count * SECTOR_BYTES,
            flags,
        }
    }

    /// How many bytes of data its chain carries.
    pub(super) fn data_bytes(&self) -> u64 {
        match self.effect {
            Effect::Read | Effect::Write => self.len_bytes,
            Effect::Zero | Effect::Discard => 16,
            Effect::Flush | Effect::Grow => 0,
        }
    }
}
