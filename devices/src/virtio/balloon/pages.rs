//! Page frame numbers, as the queues for inflating and deflating carry them.
#![expect(unsafe_code, reason = "pages become segments")]

use std::ops::Range;
use std::ptr::NonNull;

use coracle_storage::request::Segment;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::PAGE_BYTES;
use crate::virtio::segments;

/// Numbers that are taken from one buffer. Linux sends 256.
const NUMBERS_MAX: usize = 4096;
const NUMBER_BYTES: usize = 4;

/// The pages of one buffer, from the lowest up, each once.
#[derive(Debug, Default)]
pub(super) struct Pages {
    bytes: Vec<u8>,
    numbers: Vec<u32>,
}

impl Pages {
    /// Reads the numbers of a buffer; `false` if it has too many, or something else at its end, which is left out.
    pub(super) fn read(&mut self, readable: &[Segment]) -> bool {
        let room_bytes = NUMBERS_MAX * NUMBER_BYTES;
        self.bytes.resize(room_bytes, 0);
        let read_bytes = segments::gather(readable, 0, &mut self.bytes);
        let (numbers, rest) = self.bytes.get(..read_bytes).unwrap_or_default().as_chunks();
        self.numbers.clear();
        self.numbers
            .extend(numbers.iter().map(|number| u32::from_le_bytes(*number)));
        self.numbers.sort_unstable();
        self.numbers.dedup();
        rest.is_empty() && segments::len_bytes(readable) <= room_bytes as u64
    }

    /// The pages as ranges of guest addresses, each as long as can be.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.numbers
            .chunk_by(|one, next| *next == one + 1)
            .filter_map(|run| {
                let [first, .., last] = run else {
                    let only = u64::from(*run.first()?);
                    return Some(only * PAGE_BYTES..(only + 1) * PAGE_BYTES);
                };
                Some(u64::from(*first) * PAGE_BYTES..(u64::from(*last) + 1) * PAGE_BYTES)
            })
    }
}

/// A range of guest addresses as it lies in this process, one segment for each region of `memory`; what is no memory is left out.
pub(super) fn segments_of(memory: &GuestMemoryMmap, range: Range<u64>) -> impl Iterator<Item = Segment> {
    memory.iter().filter_map(move |region| {
        let start = range.start.max(region.start_addr().0);
        let end = range.end.min(region.start_addr().0 + region.len());
        let len_bytes = usize::try_from(end.checked_sub(start)?).ok()?;
        let slice = memory.get_slice(GuestAddress(start), len_bytes).ok()?;
        let address = NonNull::new(slice.ptr_guard_mut().as_ptr())?;
        // SAFETY: the range lies in one mapping of `memory`, which the session holds for as long as its worker serves.
        (len_bytes > 0).then(|| unsafe { Segment::new(address, len_bytes) })
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn read(numbers: &[u32], more: &[u8]) -> (bool, Vec<Range<u64>>) {
        let mut bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        bytes.extend(more);
        let address = NonNull::new(bytes.as_mut_ptr()).unwrap();
        // SAFETY: `bytes` outlives the segment.
        let segment = unsafe { Segment::new(address, bytes.len()) };
        let mut pages = Pages::default();
        let is_whole = pages.read(&[segment]);
        (is_whole, pages.runs().collect())
    }

    #[test]
    fn pages_become_ranges_whatever_their_order() {
        assert_eq!(read(&[], &[]), (true, vec![]));
        let (is_whole, runs) = read(&[7, 5, 6, 9, 6, 0, u32::MAX], &[]);
        assert!(is_whole);
        let top = u64::from(u32::MAX) * 4096;
        assert_eq!(
            runs,
            [0..4096, 5 * 4096..8 * 4096, 9 * 4096..10 * 4096, top..top + 4096]
        );
        let (is_whole, runs) = read(&[1], &[9, 9, 9]);
        assert!(!is_whole);
        assert_eq!(runs.first(), Some(&(4096..8192)));
        let many: Vec<u32> = (0..5000).collect();
        let (is_whole, runs) = read(&many, &[]);
        assert!(!is_whole);
        assert_eq!(runs.first(), Some(&(0..4096 * 4096)));
    }

    #[test]
    fn a_range_is_cut_where_memory_ends() {
        let regions = [(GuestAddress(0), 0x4000), (GuestAddress(0x1_0000), 0x4000)];
        let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let lengths = |range| -> Vec<usize> {
            segments_of(&memory, range)
                .map(|segment| segment.len_bytes())
                .collect()
        };
        assert_eq!(lengths(0..0x1000), [0x1000]);
        assert_eq!(lengths(0x3000..0x1_1000), [0x1000, 0x1000]);
        assert!(lengths(0x4000..0x1_0000).is_empty());
        assert!(lengths(0x1_4000..u64::MAX).is_empty());
    }
}
