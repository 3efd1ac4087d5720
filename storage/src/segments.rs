//! Pieces of a request's memory, and memory of an image's own, as segments.
#![expect(unsafe_code, reason = "segments are addresses")]

use std::ops::Range;
use std::ptr::NonNull;

use crate::request::Segment;

/// Appends to `out` what `bytes`, counted over all of `segments`, cover.
pub(crate) fn slice(segments: &[Segment], bytes: Range<u64>, out: &mut Vec<Segment>) {
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
pub(crate) fn zero(segments: &[Segment]) {
    for segment in segments {
        // SAFETY: the request that the segment belongs to has not completed, so its memory is mapped
        // and writable (contract of `Segment::new`).
        unsafe { std::ptr::write_bytes(segment.address(), 0, segment.len_bytes()) }
    }
}

/// How many bytes `segments` have together.
pub(crate) fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.len_bytes() as u64).sum()
}

/// Copies `bytes` to the start of `segments`, which have room for them.
pub(crate) fn fill(segments: &[Segment], mut bytes: &[u8]) {
    for segment in segments {
        let (piece, rest) = bytes.split_at(bytes.len().min(segment.len_bytes()));
        // SAFETY: as for `zero`; the piece is no longer than the segment, and is not in guest memory.
        unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), segment.address(), piece.len()) };
        bytes = rest;
    }
    debug_assert!(bytes.is_empty(), "segments have room for what is copied to them");
}

/// Appends what `segments` contain to `out`: one look, whatever a guest does to its memory meanwhile.
pub(crate) fn gather(segments: &[Segment], out: &mut Vec<u8>) {
    for segment in segments {
        out.reserve(segment.len_bytes());
        let end = out.len();
        // SAFETY: as for `zero`; room for the segment was reserved.
        unsafe {
            std::ptr::copy_nonoverlapping(
                segment.address(),
                out.spare_capacity_mut().as_mut_ptr().cast(),
                segment.len_bytes(),
            );
        }
        // SAFETY: so many bytes were written just now.
        unsafe { out.set_len(end + segment.len_bytes()) };
    }
}

/// A segment over memory that an image owns. It stays where it is, and is not looked at, until the
/// operation that carries the segment has ended; an image is not dropped while one is in flight.
pub(crate) fn own<T>(memory: &mut [T]) -> Segment {
    let len_bytes = size_of_val(memory);
    // SAFETY: callers keep the memory, as said above.
    unsafe { Segment::new(NonNull::from(memory).cast(), len_bytes) }
}

/// A segment over bytes that an image owns and that are only sent from: they stay where they are likewise.
pub(crate) fn only_sent(bytes: &[u8]) -> Segment {
    // SAFETY: callers keep the memory, as for `own`, and nothing writes to what is only sent from.
    unsafe { Segment::new(NonNull::from(bytes).cast(), bytes.len()) }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}
