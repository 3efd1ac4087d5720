//! The words of a bitmap that one thread changes and others may look at.

use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::FromZeros;

/// Words of 64 bits with one writer.
///
/// Whoever else looks at them sees each word as it was at some time. It sees all of them as they are when the writer has
/// stood still since before it was told so.
#[derive(Debug)]
pub(super) struct Words(Box<[AtomicU64]>);

impl Words {
    /// So many zeros, which cost the host nothing until they are touched.
    pub(super) fn zeroed(len: usize) -> Self {
        Self(<[AtomicU64]>::new_box_zeroed_with_elems(len).expect("a bitmap fits memory"))
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The word at `place`, which lies within.
    pub(super) fn at(&self, place: usize) -> u64 {
        self.word(place).load(Ordering::Relaxed)
    }

    /// Changes the word at `place`, which lies within; only the one writer does.
    pub(super) fn set(&self, place: usize, word: u64) {
        self.word(place).store(word, Ordering::Relaxed);
    }

    /// The first so many words, as they lie in a file.
    pub(super) fn bytes(&self, words: usize) -> Vec<u8> {
        let words = self.0.iter().take(words);
        words
            .flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes())
            .collect()
    }

    fn word(&self, place: usize) -> &AtomicU64 {
        self.0.get(place).expect("clusters lie within the bitmap")
    }
}
