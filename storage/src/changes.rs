//! Which blocks of an image its guest has changed, for whoever copies it meanwhile.
//!
//! A change counts when it is complete, and not when it is begun:
//!
//! ```text
//!   guest's write    started ─────── the bytes land ─────── marked, and only then answered
//!   whoever copies               taken ──► read
//! ```
//!
//! A block that is read after the bytes have landed has them. One that is read before is marked after it was read, and so it is
//! among those that are taken next, however long the write was in flight and whenever the marks were taken meanwhile. Marks at
//! the start would add nothing: what they say is taken before the bytes are there. When nothing is in flight any more, all
//! changes are marked: the last look finds what is left.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// What is marked as one, in bytes.
pub const BLOCK_BYTES: u64 = 64 << 10;

/// Where the workers of one disk mark what they have changed, if somebody wants to know.
#[derive(Debug, Default)]
pub struct Changes {
    is_watched: AtomicBool,
    marked: Mutex<Blocks>,
}

/// Somebody who wants to know; when it is dropped nothing is marked any more.
#[derive(Debug)]
pub struct Watch {
    changes: Arc<Changes>,
    size_bytes: u64,
}

/// Blocks of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blocks {
    words: Vec<u64>,
    size_bytes: u64,
}

const NO_PANIC: &str = "no holder of the marks panics";
const WORD_BLOCKS: u64 = u64::BITS as u64;

impl Changes {
    /// Has everything be marked that is complete from now on. There is one who watches at a time.
    pub fn watch(self: &Arc<Self>, size_bytes: u64) -> Watch {
        *self.lock() = Blocks::none(size_bytes);
        // What is complete and finds nobody watching has landed before whoever watches reads its first block.
        self.is_watched.store(true, Ordering::SeqCst);
        Watch {
            changes: Arc::clone(self),
            size_bytes,
        }
    }

    /// Says that `range` of the image may have changed: after it has, and before anybody is told. Costs next to nothing while
    /// nobody watches.
    pub fn mark(&self, range: Range<u64>) {
        if self.is_watched.load(Ordering::SeqCst) {
            self.lock().insert(range);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.marked.lock().expect(NO_PANIC)
    }
}

impl Watch {
    /// The blocks that were marked since the last time; from now on they count as not marked.
    pub fn take(&self) -> Blocks {
        std::mem::replace(&mut self.changes.lock(), Blocks::none(self.size_bytes))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.changes.is_watched.store(false, Ordering::SeqCst);
        *self.changes.lock() = Blocks::default();
    }
}

impl Blocks {
    /// None of those of an image of that size.
    pub fn none(size_bytes: u64) -> Self {
        let words = size_bytes.div_ceil(BLOCK_BYTES).div_ceil(WORD_BLOCKS);
        Self {
            words: vec![0; usize::try_from(words).expect("this is a 64-bit monitor")],
            size_bytes,
        }
    }

    /// Adds those that `range` touches; what of it lies beyond the image is left out.
    pub fn insert(&mut self, range: Range<u64>) {
        let end = range.end.min(self.size_bytes);
        if range.start >= end {
            return;
        }
        let (first, last) = (range.start / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
        for word in first / WORD_BLOCKS..=last / WORD_BLOCKS {
            let from = first.saturating_sub(word * WORD_BLOCKS);
            let to = (last - word * WORD_BLOCKS).min(WORD_BLOCKS - 1);
            let bits = (u64::MAX >> (WORD_BLOCKS - 1 - to)) & (u64::MAX << from);
            let place = usize::try_from(word)
                .ok()
                .and_then(|word| self.words.get_mut(word));
            *place.expect("the image has a bit for each of its blocks") |= bits;
        }
    }

    /// Adds those of `other`, of the same image.
    pub fn insert_all(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// How much they are, in bytes.
    pub fn bytes(&self) -> u64 {
        self.ranges().map(|range| range.end - range.start).sum()
    }

    /// Whether there is one.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Where they lie, in bytes and in order; those that touch are one range.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next(at, true)?;
            let end = self.next(first, false).unwrap_or(u64::MAX);
            at = end;
            let end = end.saturating_mul(BLOCK_BYTES).min(self.size_bytes);
            Some(first * BLOCK_BYTES..end)
        })
    }

    /// The first block from `block` on that is one of them, or is none.
    fn next(&self, block: u64, is_in: bool) -> Option<u64> {
        let first = block / WORD_BLOCKS;
        let words = self.words.iter().zip(0..);
        let mut words = words.skip(usize::try_from(first).unwrap_or(usize::MAX));
        words.find_map(|(word, number): (&u64, u64)| {
            let word = if is_in { *word } else { !*word };
            let from = block.saturating_sub(number * WORD_BLOCKS);
            let word = word & (u64::MAX << from);
            (word != 0).then(|| number * WORD_BLOCKS + u64::from(word.trailing_zeros()))
        })
    }
}

#[cfg(test)]
mod tests;
