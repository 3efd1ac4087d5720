//! Which pages of guest memory this process has written: KVM's log has the guest's own writes only.

use std::sync::atomic::{AtomicU64, Ordering};

use coracle_storage::request::Segment;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A page, as KVM's dirty log and a snapshot have it.
pub const PAGE_BYTES: u64 = 4096;

/// One bit for each page of a guest's memory, set by whoever writes there.
///
/// Shared by all devices of a machine whose pages are tracked. A page is marked after it was written and before the guest
/// hears of it, so what is taken before the page is copied is never too little; a page may be marked in vain.
#[derive(Debug)]
pub struct DirtyPages {
    regions: Box<[Region]>,
}

#[derive(Debug)]
struct Region {
    start: u64,
    len_bytes: u64,
    /// Where it is mapped; only compared.
    host: u64,
    words: Box<[AtomicU64]>,
}

impl DirtyPages {
    /// Nothing in `memory` is marked.
    pub fn new(memory: &GuestMemoryMmap) -> Self {
        let regions = memory.iter().map(|region| Region {
            start: region.start_addr().raw_value(),
            len_bytes: region.len(),
            host: host_address(region.as_ptr()),
            words: (0..region.len().div_ceil(PAGE_BYTES * u64::from(u64::BITS)))
                .map(|_| AtomicU64::new(0))
                .collect(),
        });
        Self {
            regions: regions.collect(),
        }
    }

    /// Marks the pages of `len_bytes` at `address`. What is not memory has no pages.
    pub fn mark(&self, address: GuestAddress, len_bytes: u64) {
        let start = address.raw_value();
        for region in &self.regions {
            let from = start.max(region.start);
            let to = start
                .saturating_add(len_bytes)
                .min(region.start + region.len_bytes);
            if from < to {
                region.mark(from - region.start, to - from);
            }
        }
    }

    /// Marks the pages of `segment`, which lies in one region, as those of a chain do.
    #[inline]
    pub(super) fn mark_segment(&self, segment: &Segment) {
        let host = host_address(segment.address());
        for region in &self.regions {
            let offset_bytes = host.wrapping_sub(region.host);
            if offset_bytes < region.len_bytes {
                return region.mark(offset_bytes, segment.len_bytes() as u64);
            }
        }
    }

    /// The marks, and none are left: for each region of the memory, in its order, one bit a page, the lowest first.
    pub fn take(&self) -> Vec<Vec<u64>> {
        // Acquire: what was written before a mark is there to be copied.
        let taken = |word: &AtomicU64| match word.load(Ordering::Relaxed) {
            // Most of them, where the memory is large.
            0 => 0,
            _ => word.swap(0, Ordering::Acquire),
        };
        self.regions
            .iter()
            .map(|region| region.words.iter().map(taken).collect())
            .collect()
    }
}

impl Region {
    /// Marks a range that begins in the region.
    #[inline]
    fn mark(&self, offset_bytes: u64, len_bytes: u64) {
        let Some(last_bytes) = len_bytes.checked_sub(1) else {
            return;
        };
        let bits = u64::from(u64::BITS);
        let first = offset_bytes / PAGE_BYTES;
        let last = (offset_bytes + last_bytes) / PAGE_BYTES;
        let words = self.words.iter().zip(0_u64..);
        let skip = usize::try_from(first / bits).expect("this is a 64-bit monitor");
        for (word, number) in words.skip(skip).take_while(|(_, number)| *number <= last / bits) {
            let from = first.max(number * bits) - number * bits;
            let to = last.min(number * bits + bits - 1) - number * bits;
            let mask = u64::MAX << from & u64::MAX >> (bits - 1 - to);
            // Release, and not left out where the bits are set: whoever takes them now must see what was written.
            word.fetch_or(mask, Ordering::Release);
        }
    }
}

fn host_address(host: *mut u8) -> u64 {
    host.addr() as u64
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const FIRST_PAGES: u64 = 130;
    const SECOND_PAGES: u64 = 3;
    const SECOND_START: u64 = 1000 * PAGE_BYTES;

    /// Two regions with a gap; the first has more than two words of pages.
    fn memory() -> GuestMemoryMmap {
        let bytes = |pages: u64| usize::try_from(pages * PAGE_BYTES).unwrap();
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), bytes(FIRST_PAGES)),
            (GuestAddress(SECOND_START), bytes(SECOND_PAGES)),
        ])
        .unwrap()
    }

    /// The numbers of the marked pages of the guest.
    fn pages(dirty: &DirtyPages) -> BTreeSet<u64> {
        let starts = [0, SECOND_START / PAGE_BYTES];
        let mut pages = BTreeSet::new();
        for (words, start) in dirty.take().iter().zip(starts) {
            for (word, number) in words.iter().zip(0..) {
                let set = (0..64).filter(|bit| word >> bit & 1 != 0);
                pages.extend(set.map(|bit| start + 64 * number + bit));
            }
        }
        pages
    }

    #[test]
    fn marks_are_taken_once_in_a_word_for_64_pages() {
        let dirty = DirtyPages::new(&memory());
        dirty.mark(GuestAddress(63 * PAGE_BYTES + 4095), 2);
        dirty.mark(GuestAddress(SECOND_START + PAGE_BYTES), PAGE_BYTES);
        assert_eq!(dirty.take(), [vec![1 << 63, 1, 0], vec![2]]);
        assert_eq!(dirty.take(), [vec![0; 3], vec![0]]);
    }

    #[test]
    fn nothing_has_no_pages() {
        let dirty = DirtyPages::new(&memory());
        for (address, len_bytes) in [
            (0, 0),
            (FIRST_PAGES * PAGE_BYTES, PAGE_BYTES),
            (u64::MAX, u64::MAX),
        ] {
            dirty.mark(GuestAddress(address), len_bytes);
        }
        assert_eq!(pages(&dirty), BTreeSet::new());
    }

    proptest! {
        #[test]
        fn exactly_the_pages_of_the_ranges_are_marked(
            ranges in prop::collection::vec((0..1010 * PAGE_BYTES, 0..300 * PAGE_BYTES), 0..4),
        ) {
            let dirty = DirtyPages::new(&memory());
            let mut expected = BTreeSet::new();
            for (start, len_bytes) in ranges {
                dirty.mark(GuestAddress(start), len_bytes);
                if len_bytes > 0 {
                    expected.extend(start / PAGE_BYTES..=(start + len_bytes - 1) / PAGE_BYTES);
                }
            }
            let second = SECOND_START / PAGE_BYTES;
            expected.retain(|page| *page < FIRST_PAGES || (second..second + SECOND_PAGES).contains(page));
            prop_assert_eq!(pages(&dirty), expected);
        }
    }
}
