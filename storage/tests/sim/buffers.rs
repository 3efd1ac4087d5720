//! The memory of a simulated guest: cut into segments, and watched after its request has ended.
#![expect(unsafe_code, reason = "segments point into the buffers")]

use std::ptr::NonNull;

use coracle_storage::request::{Request, Segment};
use coracle_storage::sim::dice::Dice;

/// The memory of one request. It stays where it is until the simulation ends.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
}

impl Buffer {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    /// The whole buffer, in segments that are cut anywhere.
    pub(crate) fn segments(&mut self, dice: &mut Dice) -> Vec<Segment> {
        let len_bytes = self.bytes.len();
        let cuts = match dice.below(64) {
            // More than one operation takes.
            0 => 1100,
            1..=20 => dice.index(8),
            _ => 0,
        };
        let mut cuts: Vec<usize> = (0..cuts).map(|_| dice.index(len_bytes + 1)).collect();
        cuts.sort_unstable();
        let ends: Vec<usize> = cuts.iter().copied().chain([len_bytes]).collect();
        let starts = [0].into_iter().chain(cuts);
        let base = self.bytes.as_mut_ptr();
        let segment = |(start, end): (usize, usize)| {
            let address = NonNull::new(base.wrapping_add(start)).unwrap();
            // SAFETY: the buffer is never resized, and is kept until the simulation ends.
            unsafe { Segment::new(address, end - start) }
        };
        starts.zip(ends).map(segment).collect()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// What has ended. Nobody may touch it any more; whoever does is found out.
#[derive(Default)]
pub(crate) struct Graveyard(Vec<(Request, Buffer)>);

/// What fills the memory of requests that have ended.
const POISON: u8 = 0xd9;

impl Graveyard {
    pub(crate) fn bury(&mut self, request: Request, mut buffer: Buffer) {
        buffer.bytes.fill(POISON);
        self.0.push((request, buffer));
    }

    /// Panics when memory was touched after its request had ended.
    pub(crate) fn check(&self) {
        for (request, buffer) in &self.0 {
            assert!(
                buffer.bytes.iter().all(|byte| *byte == POISON),
                "the memory of request {} was written after its completion",
                request.tag
            );
        }
    }
}
