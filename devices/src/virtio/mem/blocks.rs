//! Which blocks of the region are plugged, for all who reach guest memory by its addresses.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// The blocks of a region of guest memory, plugged or not.
///
/// The device changes it. Virtqueues look at it for every address: what is not plugged is no memory for them. A request that
/// was taken before its buffer was unplugged goes on, into memory that the guest has given up; the region stays mapped, so
/// that harms nobody.
#[derive(Debug)]
pub struct Blocks {
    start: u64,
    block_bytes: u64,
    count: u64,
    words: Box<[AtomicU64]>,
}

const BITS: u64 = u64::BITS as u64;

/// What several blocks are together (5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockState {
    Plugged,
    Unplugged,
    Mixed,
}

impl Blocks {
    /// Those of a region of `size_bytes` at `start`, none of them plugged.
    ///
    /// # Panics
    ///
    /// When the region is not whole blocks.
    pub fn new(start: u64, size_bytes: u64, block_bytes: u64) -> Self {
        assert!(
            block_bytes.is_power_of_two() && size_bytes.is_multiple_of(block_bytes),
            "a region is whole blocks"
        );
        let count = size_bytes / block_bytes;
        Self {
            start,
            block_bytes,
            count,
            words: (0..count.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Where the guest has the region.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Bytes of the region.
    pub fn size_bytes(&self) -> u64 {
        self.count * self.block_bytes
    }

    /// The plugged parts of the region, in bytes from its beginning, each as long as can be.
    pub fn plugged(&self) -> impl Iterator<Item = Range<u64>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = (next..self.count).find(|block| self.is_plugged(*block))?;
            let end = (first..self.count).find(|block| !self.is_plugged(*block));
            next = end.unwrap_or(self.count);
            Some(first * self.block_bytes..next * self.block_bytes)
        })
    }

    /// How many bytes from `offset_bytes` on are plugged; no more are looked at than are needed for `wanted_bytes`.
    #[inline]
    pub(in crate::virtio) fn plugged_from(&self, offset_bytes: u64, wanted_bytes: u64) -> u64 {
        let first = offset_bytes / self.block_bytes;
        let end = offset_bytes.saturating_add(wanted_bytes.max(1));
        let mut block = first;
        while block < self.count && block * self.block_bytes < end && self.is_plugged(block) {
            block += 1;
        }
        (block * self.block_bytes).saturating_sub(offset_bytes)
    }

    #[inline]
    fn is_plugged(&self, block: u64) -> bool {
        let index = usize::try_from(block / BITS).unwrap_or(usize::MAX);
        let word = self
            .words
            .get(index)
            .map_or(0, |word| word.load(Ordering::Acquire));
        word >> (block % BITS) & 1 != 0
    }

    /// How many blocks are plugged.
    pub(super) fn plugged_count(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Acquire).count_ones());
        self.words.iter().map(ones).sum()
    }

    /// What the blocks with these numbers are, of which there is at least one.
    pub(super) fn state(&self, blocks: Range<u64>) -> BlockState {
        let all = blocks.end - blocks.start;
        match blocks.filter(|block| self.is_plugged(*block)).count() as u64 {
            0 => BlockState::Unplugged,
            plugged if plugged == all => BlockState::Plugged,
            _ => BlockState::Mixed,
        }
    }

    /// Plugs or unplugs the blocks with these numbers.
    pub(super) fn set(&self, blocks: Range<u64>, state: BlockState) {
        for block in blocks {
            let index = usize::try_from(block / BITS).expect("this is a 64-bit monitor");
            let word = self
                .words
                .get(index)
                .expect("blocks are checked to be in the region");
            let bit = 1 << (block % BITS);
            match state {
                BlockState::Plugged => word.fetch_or(bit, Ordering::AcqRel),
                BlockState::Unplugged => word.fetch_and(!bit, Ordering::AcqRel),
                BlockState::Mixed => unreachable!("a block is plugged or not"),
            };
        }
    }

    /// One bit for each block that is plugged, the lowest first.
    pub(super) fn save(&self) -> Vec<u64> {
        self.words
            .iter()
            .map(|word| word.load(Ordering::Acquire))
            .collect()
    }

    /// Takes up what [`Self::save`] gave elsewhere; `false` if that is not of a region of so many blocks.
    pub(super) fn restore(&self, plugged: &[u64]) -> bool {
        let beyond = match self.count % BITS {
            0 => 0,
            rest => u64::MAX << rest,
        };
        let last = plugged.last().copied().unwrap_or(0);
        if plugged.len() != self.words.len() || last & beyond != 0 {
            return false;
        }
        for (word, saved) in self.words.iter().zip(plugged) {
            word.store(*saved, Ordering::Release);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 4 << 30;
    const BLOCK: u64 = 2 << 20;

    #[test]
    fn what_is_plugged_is_told_from_any_byte_on() {
        let blocks = Blocks::new(START, 70 * BLOCK, BLOCK);
        assert_eq!(blocks.plugged_from(0, 1), 0);
        blocks.set(62..66, BlockState::Plugged);
        assert_eq!(blocks.plugged_from(62 * BLOCK + 5, 1), BLOCK - 5);
        assert_eq!(blocks.plugged_from(62 * BLOCK + 5, 4 * BLOCK), 4 * BLOCK - 5);
        assert_eq!(blocks.plugged_from(62 * BLOCK, u64::MAX), 4 * BLOCK);
        assert_eq!(blocks.plugged_from(61 * BLOCK, 2 * BLOCK), 0);
        assert_eq!(blocks.plugged_from(66 * BLOCK, 1), 0);
        for beyond in [70 * BLOCK, u64::MAX] {
            assert_eq!(blocks.plugged_from(beyond, 1), 0);
        }
        assert!(blocks.plugged().eq(std::iter::once(62 * BLOCK..66 * BLOCK)));
    }

    #[test]
    fn a_saved_region_of_another_size_is_refused() {
        let blocks = Blocks::new(START, 70 * BLOCK, BLOCK);
        for saved in [&[][..], &[0], &[0, 1 << 6], &[0, u64::MAX], &[0, 0, 0]] {
            assert!(!blocks.restore(saved), "{saved:?}");
        }
        assert!(blocks.restore(&[1, 1 << 5]));
        assert_eq!(blocks.plugged_count(), 2);
    }

    proptest! {
        #[test]
        fn a_region_comes_back_as_it_was(numbers in prop::collection::vec(0..70_u64, 0..40)) {
            let blocks = Blocks::new(START, 70 * BLOCK, BLOCK);
            for number in &numbers {
                blocks.set(*number..number + 1, BlockState::Plugged);
            }
            let again = Blocks::new(START, 70 * BLOCK, BLOCK);
            prop_assert!(again.restore(&blocks.save()));
            prop_assert_eq!(again.save(), blocks.save());
            let plugged: u64 = again.plugged().map(|range| range.end - range.start).sum();
            prop_assert_eq!(plugged, again.plugged_count() * BLOCK);
            for number in 0..70 {
                let is_in = numbers.contains(&number);
                prop_assert_eq!(again.state(number..number + 1) == BlockState::Plugged, is_in);
            }
        }
    }
}
