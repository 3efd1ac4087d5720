//! The kinds of images that can be simulated: how each is laid out on a medium, and opened.
#![expect(unsafe_code, reason = "a look at an image reads into a buffer of its own")]

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::backend::{Access, Backend, Discard, Geometry, Step};
use crate::overlay::format::{BITMAP_OFFSET_BYTES, BaseIdentity, DATA_OFFSET_BYTES, HEADER_BYTES, Header};
use crate::overlay::{Lifetime, Overlay};
use crate::raw::Raw;
use crate::reactor::{FileSlot, Patience, Reactor, Wake};
use crate::request::{Durability, Operation, Request, Segment};
use crate::sim::dice::Dice;
use crate::sim::medium::Medium;
use crate::sim::reactor::SimReactor;

/// How an image of one kind comes to be.
pub struct Kind {
    /// Lays the image's files out on an empty medium; what a guest reads from it at first.
    pub create: fn(&Medium, &mut Dice) -> Vec<u8>,
    /// Opens the image as it lies on the medium now.
    pub open: fn(&Medium) -> Box<dyn Backend>,
}

/// All of them.
pub const KINDS: &[Kind] = &[
    Kind {
        create: create_raw,
        open: open_raw,
    },
    Kind {
        create: create_overlay,
        open: open_overlay,
    },
];

/// The longest read of [`content`], in bytes.
const LOOK_BYTES: u64 = 128 * SECTOR_BYTES;

/// All that an image holds, of which nothing else is asked, read on a host that does not fail.
///
/// # Panics
///
/// When it cannot be read.
pub fn content(image: &mut dyn Backend, mut io: SimReactor) -> Vec<u8> {
    let registered = io.register(&image.files());
    registered.expect("an image has few files");
    let size_bytes = image.geometry().size_bytes;
    let mut content = vec![0; index(size_bytes)];
    for (number, place) in (0..).zip(content.chunks_mut(index(LOOK_BYTES))) {
        let len_bytes = place.len();
        // SAFETY: the buffer outlives the request, which has ended when `carry_out` returns.
        let segment = unsafe { Segment::new(NonNull::from(place).cast(), len_bytes) };
        let request = Request {
            tag: number,
            operation: Operation::Read,
            offset_bytes: number * LOOK_BYTES,
            len_bytes: len_bytes as u64,
            durability: Durability::Cached,
            segments: vec![segment],
        };
        carry_out(request, image, &mut io);
    }
    content
}

fn carry_out(request: Request, image: &mut dyn Backend, io: &mut SimReactor) {
    let mut step = image.start(request, io);
    while !matches!(step, Step::Done(_)) {
        let mut wakes = Vec::new();
        let waited = io.wait(Patience::UntilEvent, &mut wakes);
        assert!(waited.is_ok() && !wakes.is_empty(), "a look at the disk was lost");
        for wake in wakes {
            if let Wake::Done(event) = wake {
                step = image.resume(event, io);
            }
        }
    }
    assert!(
        matches!(&step, Step::Done(completion) if completion.outcome.is_ok()),
        "a disk cannot be read: {step:?}"
    );
}

const SECTOR_BYTES: u64 = 512;

/// The file of a raw image, or of the base of an overlay.
const IMAGE: FileSlot = FileSlot(0);
/// The file of an overlay.
const OVERLAY: FileSlot = FileSlot(1);

fn create_raw(medium: &Medium, dice: &mut Dice) -> Vec<u8> {
    let content = fresh(dice);
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
    let header = Header::new(base.size_bytes + more_bytes, base).expect("a simulated disk is small");
    let header = Header {
        cluster_bytes: dice.pick(&[4096, 4096, 16384]),
        ..header
    };
    medium.add(&header.encode().expect("the name of the base is short"));
    medium.extend(OVERLAY, DATA_OFFSET_BYTES + header.size_bytes);
    content.resize(index(header.size_bytes), 0);
    content
}

fn open_overlay(medium: &Medium) -> Box<dyn Backend> {
    let headers = medium.read(OVERLAY, 0, 2 * HEADER_BYTES as u64);
    let headers = headers
        .try_into()
        .expect("the file is long enough for its headers");
    let header = Header::decode(&headers).expect("a header is on the medium from the beginning");
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
fn nothing() -> Arc<File> {
    Arc::new(File::open("/dev/null").expect("every host has one"))
}

/// What an image holds before anything happens: a disk of a few sectors, mostly.
fn fresh(dice: &mut Dice) -> Vec<u8> {
    let sectors = match dice.below(64) {
        0 => 2048 + dice.below(4096),
        1..=16 => 1 + dice.below(16),
        _ => 16 + dice.below(256),
    };
    match dice.below(3) {
        0 => vec![0; index(sectors * SECTOR_BYTES)],
        _ => (0..sectors * SECTOR_BYTES / 8)
            .flat_map(|_| dice.draw().to_le_bytes())
            .collect(),
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}
