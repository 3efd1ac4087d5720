//! Which pages a target does not have, as the two sides tell each other.
//!
//! ```text
//!   number of a page (8, little endian)  bitmap from there on (8 each)     the lowest bit is the first page
//!   nothing                                                                that was all
//! ```

use std::io::{BufRead, Write};

use super::super::wire::{Kind, Wire, WireError};
use crate::snapshot::memory::{PAGE_BYTES, PageSet, PageSetError};

/// Most words of a bitmap in one frame: those of 2 GiB.
const WORDS_MAX: usize = 8 << 10;
const WORD_BYTES: usize = 8;
/// Longest body of a frame, in bytes.
pub const ABSENT_BYTES_MAX: usize = WORD_BYTES + WORDS_MAX * WORD_BYTES;
const WORD_PAGES: u64 = 64;

/// Why it is not taken what a side says of absent pages.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum AbsentError {
    #[error("a bitmap of absent pages is no whole number of words")]
    Partial,
    #[error(
        "bitmaps of absent pages do not follow each other: one begins at page {first}, and the last ended at {end}"
    )]
    Order { first: u64, end: u64 },
    #[error("it was not told of all absent pages")]
    Open,
    #[error(transparent)]
    Outside(#[from] PageSetError),
}

/// Tells of all pages of `set`. Where there is none for long nothing is said.
///
/// # Errors
///
/// When the connection has ended.
pub fn send<S: BufRead + Write>(wire: &mut Wire<S>, set: &PageSet) -> Result<(), WireError> {
    let pages = set.size_bytes() / PAGE_BYTES as u64;
    let most = WORDS_MAX as u64 * WORD_PAGES;
    let mut from = 0;
    while let Some(run) = set.next_run(from, 1) {
        let first = run.start / WORD_PAGES * WORD_PAGES;
        let count = most.min(pages - first);
        let words: Vec<[u8; WORD_BYTES]> = set
            .bitmap(first, count)
            .into_iter()
            .map(u64::to_le_bytes)
            .collect();
        let last = words.iter().rposition(|word| *word != [0; WORD_BYTES]);
        let told = words.get(..=last.unwrap_or_default()).unwrap_or(&words);
        wire.send(Kind::Absent, &[&first.to_le_bytes(), told.as_flattened()])?;
        from = first + count;
    }
    wire.send(Kind::Absent, &[])?;
    wire.flush()
}

/// What is being told of absent pages.
#[derive(Debug)]
pub struct Telling {
    set: PageSet,
    /// Behind the last page that was told of.
    end: u64,
    is_whole: bool,
}

impl Telling {
    /// Nothing was told yet of a memory of `size_bytes`.
    pub fn new(size_bytes: u64) -> Self {
        Self {
            set: PageSet::empty(size_bytes),
            end: 0,
            is_whole: false,
        }
    }

    /// Takes the body of a frame. Says whether that was all.
    ///
    /// # Errors
    ///
    /// When it cannot be, of this memory or after what was told before.
    pub fn take(&mut self, body: &[u8]) -> Result<bool, AbsentError> {
        if body.is_empty() && !self.is_whole {
            self.is_whole = true;
            return Ok(true);
        }
        let (words, rest) = body.as_chunks::<WORD_BYTES>();
        let [first, bitmap @ ..] = words else {
            return Err(AbsentError::Partial);
        };
        if bitmap.is_empty() || !rest.is_empty() {
            return Err(AbsentError::Partial);
        }
        let first = u64::from_le_bytes(*first);
        if self.is_whole || first < self.end {
            return Err(AbsentError::Order { first, end: self.end });
        }
        let bitmap: Vec<u64> = bitmap.iter().map(|word| u64::from_le_bytes(*word)).collect();
        // The last word may be of a memory that ends within it.
        let all = self.set.size_bytes() / PAGE_BYTES as u64;
        let told = bitmap.len() as u64 * WORD_PAGES;
        let pages = match all.checked_sub(first) {
            Some(left) if left < told && told - left < WORD_PAGES => left,
            _ => told,
        };
        self.set.insert_bitmap(first, pages, &bitmap)?;
        self.end = first + pages;
        Ok(false)
    }

    /// Whether something was told.
    pub fn has_begun(&self) -> bool {
        self.is_whole || self.end > 0
    }

    /// What was told; from now on that is nothing.
    ///
    /// # Errors
    ///
    /// When it was not all.
    pub fn finish(&mut self) -> Result<PageSet, AbsentError> {
        if !self.is_whole {
            return Err(AbsentError::Open);
        }
        let next = Self::new(self.set.size_bytes());
        Ok(std::mem::replace(self, next).set)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 5 << 30;
    const PAGES: u64 = SIZE / PAGE_BYTES as u64;

    fn told(set: &PageSet) -> (PageSet, usize) {
        let mut wire = Wire::new(Cursor::new(Vec::new()));
        send(&mut wire, set).unwrap();
        wire.stream().set_position(0);
        let (mut telling, mut frames) = (Telling::new(set.size_bytes()), 0);
        while let Ok((Kind::Absent, body)) = wire.receive() {
            frames += 1;
            if telling.take(body).unwrap() {
                break;
            }
        }
        (telling.finish().unwrap(), frames)
    }

    #[test]
    fn where_nothing_is_absent_nothing_is_said() {
        let mut set = PageSet::empty(SIZE);
        assert_eq!(told(&set), (set.clone(), 1));
        set.insert(PAGES - 1, PAGES);
        assert_eq!(told(&set), (set.clone(), 2));
        let full = PageSet::full(SIZE);
        assert_eq!(told(&full), (full.clone(), 4));
        // A memory that ends within a word.
        let odd = PageSet::full(3 << 20 | 64 << 10);
        assert_eq!(told(&odd), (odd.clone(), 2));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_set_arrives_as_it_is(runs in prop::collection::vec((0..PAGES, 1..70_000_u64), 0..20)) {
            let mut set = PageSet::empty(SIZE);
            runs.iter().for_each(|(first, count)| set.insert(*first, first + count));
            prop_assert_eq!(told(&set).0, set);
        }

        #[test]
        fn whatever_is_told_lies_within_the_memory(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
        ) {
            let mut telling = Telling::new(1 << 20);
            for body in bodies {
                if telling.take(&body).is_err() {
                    break;
                }
            }
            if let Ok(set) = telling.finish() {
                prop_assert!(set.runs().all(|run| run.end <= 256));
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let body = |first: u64, words: usize| [first.to_le_bytes().to_vec(), vec![0xff; words * 8]].concat();
        let refused = |bodies: &[Vec<u8>]| {
            let mut telling = Telling::new(1 << 20);
            let (last, before) = bodies.split_last().unwrap();
            for body in before {
                telling.take(body).unwrap();
            }
            telling.take(last).unwrap_err()
        };
        for partial in [vec![0; 7], vec![0; 8], vec![0; 17]] {
            assert!(matches!(refused(&[partial]), AbsentError::Partial));
        }
        assert!(matches!(refused(&[body(256, 1)]), AbsentError::Outside(_)));
        assert!(matches!(refused(&[body(0, 5)]), AbsentError::Outside(_)));
        assert!(matches!(
            refused(&[body(u64::MAX - 63, 1)]),
            AbsentError::Outside(_)
        ));
        assert!(matches!(refused(&[body(8, 1)]), AbsentError::Outside(_)));
        // A page is told of once, so that telling comes to an end.
        assert!(matches!(
            refused(&[body(64, 1), body(64, 1)]),
            AbsentError::Order { .. }
        ));
        assert!(matches!(
            refused(&[body(64, 1), body(0, 1)]),
            AbsentError::Order { .. }
        ));
        assert!(matches!(
            refused(&[Vec::new(), body(0, 1)]),
            AbsentError::Order { .. }
        ));
        assert!(matches!(refused(&[Vec::new(), Vec::new()]), AbsentError::Partial));
        let mut open = Telling::new(1 << 20);
        assert!(!open.has_begun());
        assert!(!open.take(&body(0, 1)).unwrap());
        assert!(open.has_begun());
        assert!(matches!(open.finish(), Err(AbsentError::Open)));
    }
}
