//! The kinds of images that are simulated.

use std::fs::File;

use coracle_storage::backend::{Access, Backend, Discard, Geometry};
use coracle_storage::raw::Raw;
use coracle_storage::reactor::FileSlot;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::medium::Medium;

/// How an image of one kind comes to be.
pub(crate) struct Kind {
    /// Lays the image's files out on an empty medium; what a guest reads from it at first.
    pub(crate) create: fn(&Medium, &mut Dice) -> Vec<u8>,
    /// Opens the image as it lies on the medium now.
    pub(crate) open: fn(&Medium) -> Box<dyn Backend>,
}

pub(crate) const KINDS: &[Kind] = &[Kind {
    create: create_raw,
    open: open_raw,
}];

const SECTOR_BYTES: u64 = 512;

fn create_raw(medium: &Medium, dice: &mut Dice) -> Vec<u8> {
    let content = content(dice);
    medium.add(&content);
    content
}

fn open_raw(medium: &Medium) -> Box<dyn Backend> {
    let geometry = Geometry {
        size_bytes: medium.len_bytes(FileSlot(0)),
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access: Access::ReadWrite,
        discard: Discard::Supported,
    };
    // The simulated reactor counts descriptors and looks at none.
    Box::new(Raw::new(File::open("/dev/null").unwrap(), geometry))
}

/// What an image holds before anything happens: a disk of a few sectors, mostly.
fn content(dice: &mut Dice) -> Vec<u8> {
    let sectors = match dice.below(64) {
        0 => 2048 + dice.below(4096),
        1..=16 => 1 + dice.below(16),
        _ => 16 + dice.below(256),
    };
    let len_bytes = usize::try_from(sectors * SECTOR_BYTES).unwrap();
    let byte = u8::try_from(dice.below(3)).unwrap();
    vec![byte; len_bytes]
}
