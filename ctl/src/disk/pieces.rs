//! Bytes in pieces, and which of them are zeros.

use std::ops::Range;

/// As much as is read at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// The unit in which zeros stay holes: the smallest cluster, and the block of most file systems.
pub(crate) const GRAIN_BYTES: usize = 4096;

/// `bytes` in pieces that fit in memory.
pub(crate) fn pieces(bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = bytes.start;
    std::iter::from_fn(move || {
        (at < bytes.end).then(|| {
            let start = at;
            at = bytes.end.min(start + PIECE_BYTES);
            start..at
        })
    })
}

/// How long a range is, as memory.
pub(crate) fn len_of(bytes: &Range<u64>) -> usize {
    usize::try_from(bytes.end - bytes.start).expect("pieces fit in memory")
}

/// What a part of a buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    /// Nothing but zeros.
    Zeros,
    /// Something else too.
    Data,
}

/// `buffer` in runs of grains that are alike, each with where it starts.
pub(crate) fn runs(buffer: &[u8]) -> impl Iterator<Item = (usize, Holds, &[u8])> {
    let grains = buffer.chunks(GRAIN_BYTES).map(|grain| {
        if grain.iter().all(|byte| *byte == 0) {
            Holds::Zeros
        } else {
            Holds::Data
        }
    });
    let mut grains = grains.peekable();
    let mut at = 0;
    std::iter::from_fn(move || {
        let holds = grains.next()?;
        let start = at;
        at += GRAIN_BYTES;
        while grains.next_if(|other| *other == holds).is_some() {
            at += GRAIN_BYTES;
        }
        at = at.min(buffer.len());
        Some((start, holds, buffer.get(start..at)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_found_in_whole_grains_and_nothing_is_left_out() {
        let mut buffer = vec![0; 5 * GRAIN_BYTES + 100];
        buffer
            .iter_mut()
            .skip(GRAIN_BYTES + 5)
            .take(GRAIN_BYTES)
            .for_each(|byte| *byte = 1);
        let found: Vec<_> = runs(&buffer)
            .map(|(at, holds, part)| (at, holds, part.len()))
            .collect();
        assert_eq!(
            found,
            [
                (0, Holds::Zeros, GRAIN_BYTES),
                (GRAIN_BYTES, Holds::Data, 2 * GRAIN_BYTES),
                (3 * GRAIN_BYTES, Holds::Zeros, 2 * GRAIN_BYTES + 100),
            ]
        );
        assert_eq!(runs(&[]).count(), 0);
    }

    #[test]
    fn pieces_are_the_range() {
        let all: Vec<_> = pieces(512..512 + 2 * PIECE_BYTES + 7).collect();
        let middle = 512 + PIECE_BYTES;
        assert_eq!(
            all,
            [
                512..middle,
                middle..middle + PIECE_BYTES,
                middle + PIECE_BYTES..middle + PIECE_BYTES + 7
            ]
        );
    }
}
