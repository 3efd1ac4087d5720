//! Pieces of a request's memory, and memory of the overlay's own, as segments.
#![expect(unsafe_code, reason = "segments are addresses")]

use std::ops::Range;
use std::ptr::NonNull;

use crate::request::Segment;

/// Appends to `out` what `bytes`, counted over all of `segments`, cover.
pub(super) fn slice(segments: &[Segment], bytes: Range<u64>, out: &mut Vec<Segment>) {
    let mut at = 0;
    for segment in segments {
        let len = segment.len_bytes() as u64;
        let (first, end) = (bytes.start.max(at), bytes.end.min(at + len));
        if first < end {
            let mut piece = *segment;
            piece.advance(index(first - at));
            let _rest = piece.split_off(index(end - first));
            out.push(piece);
        }
        at += len;
        if at >= bytes.end {
            break;
        }
    }
}

/// Fills the memory of `segments` with zeros.
pub(super) fn zero(segments: &[Segment]) {
    for segment in segments {
        // SAFETY: the request that the segment belongs to has not completed, so its memory is mapped
        // and writable (contract of `Segment::new`).
        unsafe { std::ptr::write_bytes(segment.address(), 0, segment.len_bytes()) }
    }
}

/// A segment over memory that the overlay owns. It stays where it is, and is not looked at, until the
/// operation that carries the segment has ended; an overlay is not dropped while one is in flight.
pub(super) fn own<T>(memory: &mut [T]) -> Segment {
    let len_bytes = size_of_val(memory);
    // SAFETY: callers keep the memory, as said above.
    unsafe { Segment::new(NonNull::from(memory).cast(), len_bytes) }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}
