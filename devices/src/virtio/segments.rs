//! Copies between this process and a list of guest segments: for headers, status bytes and small answers.
#![expect(unsafe_code, reason = "copies through the addresses of segments")]

use coracle_storage::request::Segment;
use vm_memory::VolatileSlice;

/// Bytes in all of `segments`; a chain has at most 2^32.
pub fn len_bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.len_bytes() as u64).sum()
}

/// Fills `to` from `segments`, starting `skip_bytes` in; returns how much there was to copy.
pub fn gather(segments: &[Segment], skip_bytes: usize, to: &mut [u8]) -> usize {
    let mut done = 0;
    for piece in pieces(segments, skip_bytes) {
        let rest = to.get_mut(done..).unwrap_or_default();
        if rest.is_empty() {
            break;
        }
        done += piece.copy_to(rest);
    }
    done
}

/// Writes `from` into `segments`, starting `skip_bytes` in; returns how much there was room for.
pub fn scatter(segments: &[Segment], skip_bytes: usize, from: &[u8]) -> usize {
    let mut done = 0;
    for piece in pieces(segments, skip_bytes) {
        let rest = from.get(done..).unwrap_or_default();
        if rest.is_empty() {
            break;
        }
        let len_bytes = rest.len().min(piece.len());
        piece.copy_from(rest);
        done += len_bytes;
    }
    done
}

/// Keeps the first `len_bytes` of `segments`, or all of them if they have fewer.
pub fn keep_first_bytes(segments: &mut Vec<Segment>, len_bytes: usize) {
    let mut left_bytes = len_bytes;
    segments.retain_mut(|segment| {
        let kept_bytes = left_bytes.min(segment.len_bytes());
        left_bytes -= kept_bytes;
        // The rest is nobody's.
        let _ = segment.split_off(kept_bytes);
        kept_bytes > 0
    });
}

/// The segments as slices that may change under our hands, without their first `skip_bytes`.
fn pieces(segments: &[Segment], skip_bytes: usize) -> impl Iterator<Item = VolatileSlice<'_>> {
    let mut skip_bytes = skip_bytes;
    segments.iter().filter_map(move |segment| {
        let skipped_bytes = skip_bytes.min(segment.len_bytes());
        skip_bytes -= skipped_bytes;
        let left_bytes = segment.len_bytes() - skipped_bytes;
        // SAFETY: whoever made the segment promised that it stays mapped while it is used; the
        // piece lies inside it, and a volatile slice expects others to write.
        let piece = unsafe { VolatileSlice::new(segment.address().wrapping_add(skipped_bytes), left_bytes) };
        (left_bytes > 0).then_some(piece)
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;
    use std::ptr::NonNull;

    /// Segments of two, zero and three bytes over `bytes`.
    fn over(bytes: &mut [u8; 5]) -> [Segment; 3] {
        let start = NonNull::new(bytes.as_mut_ptr()).unwrap();
        // SAFETY: `bytes` outlives the segments in every test below.
        let segment = |skip: usize, len| unsafe {
            Segment::new(NonNull::new(start.as_ptr().wrapping_add(skip)).unwrap(), len)
        };
        [segment(0, 2), segment(2, 0), segment(2, 3)]
    }

    #[test]
    fn a_copy_crosses_segments_and_says_how_far_it_came() {
        let mut bytes = *b"abcde";
        let segments = over(&mut bytes);
        let mut to = [0; 8];
        assert_eq!(len_bytes(&segments), 5);
        assert_eq!(gather(&segments, 0, &mut to[..4]), 4);
        assert_eq!(&to[..4], b"abcd");
        assert_eq!(gather(&segments, 3, &mut to), 2);
        assert_eq!(&to[..2], b"de");
        assert_eq!(gather(&segments, 6, &mut to), 0);
    }

    #[test]
    fn what_is_beyond_the_first_bytes_is_left_out() {
        let mut bytes = *b"abcde";
        for (len_bytes, kept) in [
            (0, ""),
            (1, "a"),
            (2, "ab"),
            (3, "abc"),
            (5, "abcde"),
            (9, "abcde"),
        ] {
            let mut segments = over(&mut bytes).to_vec();
            keep_first_bytes(&mut segments, len_bytes);
            let mut to = [0; 8];
            let length = gather(&segments, 0, &mut to);
            assert_eq!(to.get(..length), Some(kept.as_bytes()));
            assert!(segments.iter().all(|segment| segment.len_bytes() > 0));
        }
    }

    #[test]
    fn a_write_stops_where_the_segments_end() {
        let mut bytes = *b"abcde";
        let segments = over(&mut bytes);
        assert_eq!(scatter(&segments, 1, b"XY"), 2);
        assert_eq!(scatter(&segments, 4, b"ZZ"), 1);
        assert_eq!(&bytes, b"aXYdZ");
    }
}
