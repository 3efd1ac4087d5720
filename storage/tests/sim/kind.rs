//! The kinds of images that are simulated.

use std::fs::File;

use coracle_storage::backend::{Access, Backend, Discard, Geometry};
use coracle_storage::overlay::format::{
    BITMAP_OFFSET_BYTES, BaseIdentity, DATA_OFFSET_BYTES, HEADER_BYTES, Header,
};
use coracle_storage::overlay::{Lifetime, Overlay};
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

pub(crate) const KINDS: &[Kind] = &[
    Kind {
        create: create_raw,
        open: open_raw,
    },
    Kind {
        create: create_overlay,
        open: open_overlay,
    },
];

const SECTOR_BYTES: u64 = 512;

/// The file of a raw image, or of the base of an overlay.
const IMAGE: FileSlot = FileSlot(0);
/// The file of an overlay.
const OVERLAY: FileSlot = FileSlot(1);

fn create_raw(medium: &Medium, dice: &mut Dice) -> Vec<u8> {
    let content = content(dice);
    medium.add(&content);
    content
}

fn open_raw(medium: &Medium) -> Box<dyn Backend> {
    Box::new(raw(medium, Access::ReadWrite))
}

fn create_overlay(medium: &Medium, dice: &mut Dice) -> Vec<u8> {
    let mut content = create_raw(medium, dice);
    let base = BaseIdentity {
        path: "base.img".to_owned(),
        size_bytes: content.len() as u64,
        fingerprint: 0,
    };
    let more_bytes = dice.pick(&[0, 0, 1, 20]) * SECTOR_BYTES;
    let header = Header {
        cluster_bytes: dice.pick(&[4096, 4096, 16384]),
        ..Header::new(base.size_bytes + more_bytes, base).unwrap()
    };
    medium.add(&header.encode().unwrap());
    medium.extend(OVERLAY, DATA_OFFSET_BYTES + header.size_bytes);
    content.resize(usize::try_from(header.size_bytes).unwrap(), 0);
    content
}

fn open_overlay(medium: &Medium) -> Box<dyn Backend> {
    let headers = medium.read(OVERLAY, 0, 2 * HEADER_BYTES as u64);
    let header = Header::decode(&headers.try_into().unwrap()).unwrap();
    let len_bytes = medium.len_bytes(OVERLAY);
    assert!(
        len_bytes >= DATA_OFFSET_BYTES + header.size_bytes,
        "an overlay of {} bytes lies in a file of {len_bytes}",
        header.size_bytes
    );
    let words = header.size_bytes.div_ceil(header.cluster_bytes).div_ceil(64);
    let bits = medium.read(OVERLAY, BITMAP_OFFSET_BYTES, 8 * words);
    let base = Box::new(raw(medium, Access::ReadOnly));
    Box::new(Overlay::new(base, nothing(), header, &bits, Lifetime::Kept))
}

fn raw(medium: &Medium, access: Access) -> Raw {
    let geometry = Geometry {
        size_bytes: medium.len_bytes(IMAGE),
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access,
        discard: Discard::Supported,
    };
    Raw::new(nothing(), geometry)
}

/// A descriptor: the simulated reactor counts them, and looks at none.
fn nothing() -> File {
    File::open("/dev/null").unwrap()
}

/// What an image holds before anything happens: a disk of a few sectors, mostly.
fn content(dice: &mut Dice) -> Vec<u8> {
    let sectors = match dice.below(64) {
        0 => 2048 + dice.below(4096),
        1..=16 => 1 + dice.below(16),
        _ => 16 + dice.below(256),
    };
    match dice.below(3) {
        0 => vec![0; usize::try_from(sectors * SECTOR_BYTES).unwrap()],
        _ => (0..sectors * SECTOR_BYTES / 8)
            .flat_map(|_| dice.draw().to_le_bytes())
            .collect(),
    }
}
