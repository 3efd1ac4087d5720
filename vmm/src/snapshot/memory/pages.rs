//! Sets of pages: those that were written, or that may hold something.

use super::{CHUNK_BYTES, CHUNK_PAGES, PAGE_BYTES};

/// A set of the pages of a memory, by their place in its file: one mask of 16 pages for each chunk.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet(Vec<u16>);

/// A bitmap that is not one of this memory.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a bitmap of {pages} pages at page {first_page} does not lie within a memory of {pages_max} pages")]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub struct PageSetError {
    pub first_page: u64,
    pub pages: u64,
    pub pages_max: u64,
}

const WORD_CHUNKS: usize = 64 / CHUNK_PAGES;

impl PageSet {
    /// No page of a memory of `size_bytes`, which is a multiple of a chunk.
    pub fn empty(size_bytes: u64) -> Self {
        Self(vec![0; chunks_of(size_bytes)])
    }

    /// Every page.
    pub fn full(size_bytes: u64) -> Self {
        Self(vec![u16::MAX; chunks_of(size_bytes)])
    }

    pub(super) fn of_masks(masks: Vec<u16>) -> Self {
        Self(masks)
    }

    pub(super) fn masks(&self) -> &[u16] {
        &self.0
    }

    pub(super) fn mask(&self, chunk: usize) -> u16 {
        self.0.get(chunk).copied().unwrap_or(0)
    }

    /// The size of the memory, in bytes.
    pub fn size_bytes(&self) -> u64 {
        (self.0.len() * CHUNK_BYTES) as u64
    }

    /// How many pages there are in it.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|mask| u64::from(mask.count_ones())).sum()
    }

    /// The pages, as ranges of those that lie one behind the other.
    pub fn runs(&self) -> impl Iterator<Item = std::ops::Range<u64>> {
        runs(&self.0).map(|run| run.start as u64..run.end as u64)
    }

    /// Whether `page` is in it.
    pub fn contains(&self, page: u64) -> bool {
        let chunk = usize::try_from(page / CHUNK_PAGES as u64).unwrap_or(usize::MAX);
        self.mask(chunk) & 1 << (page % CHUNK_PAGES as u64) != 0
    }

    /// Adds the pages from `first` on, before `end`; what lies outside the memory is left out.
    pub fn insert(&mut self, first: u64, end: u64) {
        self.change(first, end, |mask, ones| *mask |= ones);
    }

    /// Has `change` what each chunk has of the pages from `first` on, before `end`.
    fn change(&mut self, first: u64, end: u64, change: impl Fn(&mut u16, u16)) {
        let end = end.min(self.size_bytes() / PAGE_BYTES as u64);
        let per_chunk = CHUNK_PAGES as u64;
        let mut page = first;
        while page < end {
            let stop = end.min((page / per_chunk + 1) * per_chunk);
            let ones = u16::MAX >> (per_chunk - (stop - page)) << (page % per_chunk);
            let chunk = usize::try_from(page / per_chunk).expect("this is a 64-bit monitor");
            if let Some(mask) = self.0.get_mut(chunk) {
                change(mask, ones);
            }
            page = stop;
        }
    }

    /// Adds the pages of `bitmap`, whose first bit is page `first_page`, as KVM's log of a slot has it. Bits past the last of its
    /// `pages` are not looked at.
    ///
    /// # Errors
    ///
    /// When they do not lie within the memory at whole chunks.
    pub fn insert_bitmap(&mut self, first_page: u64, pages: u64, bitmap: &[u64]) -> Result<(), PageSetError> {
        let error = PageSetError {
            first_page,
            pages,
            pages_max: self.size_bytes() / PAGE_BYTES as u64,
        };
        let per_chunk = CHUNK_PAGES as u64;
        let is_within = first_page
            .checked_add(pages)
            .is_some_and(|end| end <= error.pages_max)
            && first_page.is_multiple_of(per_chunk)
            && pages.is_multiple_of(per_chunk);
        if !is_within || (bitmap.len() as u64) < pages.div_ceil(64) {
            return Err(error);
        }
        let index = |number: u64| usize::try_from(number).expect("this is a 64-bit monitor");
        let masks = self.0.iter_mut().skip(index(first_page / per_chunk));
        let of_word = |word: &u64| {
            let bytes = word.to_le_bytes();
            let halves: [u16; WORD_CHUNKS] = [0, 1, 2, 3].map(|half| {
                let pair = bytes.get(2 * half..2 * half + 2);
                pair.and_then(|pair| pair.try_into().ok())
                    .map_or(0, u16::from_le_bytes)
            });
            halves
        };
        for (mask, added) in masks
            .take(index(pages / per_chunk))
            .zip(bitmap.iter().flat_map(of_word))
        {
            *mask |= added;
        }
        Ok(())
    }

    /// Takes the pages from `first` on, before `end`, out of it.
    pub fn remove(&mut self, first: u64, end: u64) {
        self.change(first, end, |mask, ones| *mask &= !ones);
    }

    /// The first pages of it from `page` on that lie one behind the other, `max` of them at most.
    pub fn next_run(&self, page: u64, max: u64) -> Option<std::ops::Range<u64>> {
        let per_chunk = CHUNK_PAGES as u64;
        let pages = self.size_bytes() / PAGE_BYTES as u64;
        let mut first = page;
        while first < pages && !self.contains(first) {
            let chunk = usize::try_from(first / per_chunk).expect("this is a 64-bit monitor");
            first = match self.mask(chunk) {
                0 => (first / per_chunk + 1) * per_chunk,
                _ => first + 1,
            };
        }
        let run = (first..pages.min(first.saturating_add(max))).take_while(|page| self.contains(*page));
        let count = run.count() as u64;
        (count > 0).then(|| first..first + count)
    }

    /// The pages from `first_page` on, both whole chunks, as a bitmap of the kind that [`Self::insert_bitmap`] takes.
    pub fn bitmap(&self, first_page: u64, pages: u64) -> Vec<u64> {
        let chunk = |number: u64| usize::try_from(number / CHUNK_PAGES as u64).unwrap_or(usize::MAX);
        let (first, count) = (chunk(first_page), chunk(pages));
        let masks = self.0.iter().skip(first).take(count).copied();
        let masks: Vec<u16> = masks.collect();
        let word = |masks: &[u16]| {
            let bits = masks.iter().rev();
            bits.fold(0, |word, mask| word << CHUNK_PAGES | u64::from(*mask))
        };
        masks.chunks(WORD_CHUNKS).map(word).collect()
    }

    /// Adds what is in `other`, of the same memory.
    ///
    /// # Panics
    ///
    /// When it is of a memory of another size.
    pub fn insert_all(&mut self, other: &Self) {
        assert!(self.0.len() == other.0.len(), "both are sets of the same memory");
        for (mask, added) in self.0.iter_mut().zip(&other.0) {
            *mask |= added;
        }
    }
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} pages", self.count(), self.0.len() * CHUNK_PAGES)
    }
}

/// How many chunks `size_bytes` are.
pub(super) fn chunks_of(size_bytes: u64) -> usize {
    let size = usize::try_from(size_bytes).expect("this is a 64-bit monitor");
    assert!(
        size.is_multiple_of(CHUNK_BYTES),
        "a guest's memory is a whole number of MiB"
    );
    size / CHUNK_BYTES
}

/// The runs of ones in `masks`, as ranges of pages counted from the first mask.
pub(super) fn runs(masks: &[u16]) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = next_one(masks, from, |mask| mask)?;
        let end = next_one(masks, start, |mask| !mask);
        from = end.unwrap_or(masks.len() * CHUNK_PAGES);
        Some(start..from)
    })
}

/// The first page from `from` on that is a one in what `of` makes of its mask. Sets of a large memory are mostly masks without.
fn next_one(masks: &[u16], from: usize, of: impl Fn(u16) -> u16) -> Option<usize> {
    let mut masks = masks.iter().zip(0..).skip(from / CHUNK_PAGES);
    let (first, chunk) = masks.next()?;
    let behind = of(*first) & u16::MAX << (from % CHUNK_PAGES);
    let (ones, chunk) = match behind {
        0 => masks
            .map(|(mask, chunk)| (of(*mask), chunk))
            .find(|(ones, _)| *ones != 0)?,
        behind => (behind, chunk),
    };
    Some(chunk * CHUNK_PAGES + ones.trailing_zeros() as usize)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    #[test]
    fn a_range_of_pages_is_in_and_its_neighbours_are_not() {
        for (first, end) in [(0, 1), (15, 17), (16, 32), (3, 200), (255, 256)] {
            let mut set = PageSet::empty(SIZE);
            set.insert(first, end);
            let found: Vec<u64> = (0..256).filter(|page| set.contains(*page)).collect();
            assert_eq!(found, (first..end).collect::<Vec<_>>());
            assert_eq!(set.count(), end - first);
        }
        let mut set = PageSet::empty(SIZE);
        set.insert(250, 300);
        set.insert(400, 500);
        assert_eq!(set.count(), 6);
        assert!(!set.contains(256) && !set.contains(u64::MAX));
    }

    #[test]
    fn a_bitmap_of_a_slot_is_added_at_its_place() {
        let mut set = PageSet::empty(SIZE);
        set.insert_bitmap(64, 32, &[1 | 1 << 17 | 1 << 40]).unwrap();
        set.insert_bitmap(128, 128, &[0, 1 << 63]).unwrap();
        let found: Vec<u64> = (0..256).filter(|page| set.contains(*page)).collect();
        // Bit 40 is no page of a slot of 32.
        assert_eq!(found, [64, 81, 255]);
    }

    #[test]
    fn what_is_taken_out_is_not_in_and_its_neighbours_are() {
        let mut set = PageSet::full(SIZE);
        for (first, end) in [(0, 1), (15, 17), (40, 90), (255, 300), (400, 500)] {
            set.remove(first, end);
        }
        let found: Vec<_> = set.runs().collect();
        assert_eq!(found, [1..15, 17..40, 90..255]);
    }

    #[test]
    fn the_next_run_is_looked_for_from_a_page_on() {
        let mut set = PageSet::empty(SIZE);
        set.insert(30, 50);
        set.insert(200, 256);
        assert_eq!(set.next_run(0, 8), Some(30..38));
        assert_eq!(set.next_run(38, 100), Some(38..50));
        assert_eq!(set.next_run(50, 1), Some(200..201));
        assert_eq!(set.next_run(255, u64::MAX), Some(255..256));
        assert_eq!(set.next_run(256, 8), None);
        assert_eq!(set.next_run(u64::MAX, 8), None);
    }

    #[test]
    fn a_bitmap_of_a_set_makes_the_same_set() {
        let mut set = PageSet::empty(SIZE);
        for (first, end) in [(0, 1), (15, 17), (63, 130), (255, 256)] {
            set.insert(first, end);
        }
        let mut again = PageSet::empty(SIZE);
        for (first, pages) in [(0, 64), (64, 16), (80, 176)] {
            again
                .insert_bitmap(first, pages, &set.bitmap(first, pages))
                .unwrap();
        }
        assert_eq!(again, set);
    }

    #[test]
    fn a_bitmap_outside_the_memory_is_refused() {
        let mut set = PageSet::empty(SIZE);
        for (first, pages, words) in [
            (0, 272, 5),
            (256, 16, 1),
            (u64::MAX - 15, 16, 1),
            (8, 16, 1),
            (0, 128, 1),
        ] {
            let refused = set.insert_bitmap(first, pages, &vec![u64::MAX; words]);
            assert!(refused.is_err(), "{first} {pages}");
        }
        assert_eq!(set.count(), 0);
    }

    #[test]
    fn runs_go_on_over_the_ends_of_masks() {
        let masks = [0b1100_0000_0000_0001, 0b11, 0, u16::MAX];
        let found: Vec<_> = runs(&masks).collect();
        assert_eq!(found, [0..1, 14..18, 48..64]);
        let far = [vec![0; 1000], vec![1 << 15, u16::MAX, 0, 1]].concat();
        let found: Vec<_> = runs(&far).collect();
        assert_eq!(found, [16_015..16_032, 16_048..16_049]);
        assert_eq!(runs(&[]).count(), 0);
        assert_eq!(runs(&[0, 0]).count(), 0);
    }
}
