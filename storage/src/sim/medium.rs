//! The medium of a simulated host: its files, and the crash that they share.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;

use super::dice::Dice;
use super::file::{Author, NOBODY, SimFile, Writeback};
use crate::reactor::FileSlot;

/// Simulated files; a clone is the same medium. Reactors name the files by [`FileSlot`], in the
/// order in which they were added.
///
/// A change is seen by every reader at once. It survives a crash if a sync covered it: a sync
/// covers what had completed before the sync was submitted. Of anything later a crash keeps any part.
#[derive(Clone, Debug, Default)]
pub struct Medium(Rc<RefCell<Content>>);

#[derive(Debug)]
struct Content {
    files: Vec<SimFile>,
    next: Author,
    in_flight: BTreeSet<Author>,
}

impl Default for Content {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            next: Author(NOBODY.0 + 1),
            in_flight: BTreeSet::new(),
        }
    }
}

/// What had completed at some moment.
#[derive(Debug)]
pub(super) struct Horizon {
    next: Author,
    in_flight: BTreeSet<Author>,
}

impl Horizon {
    fn covers(&self, author: Author) -> bool {
        author < self.next && !self.in_flight.contains(&author)
    }
}

impl Medium {
    /// Adds a file that is whole on the medium.
    pub fn add(&self, content: &[u8]) {
        self.0.borrow_mut().files.push(SimFile::new(content));
    }

    /// What a reader of the file sees now, of `len_bytes` at `offset_bytes`: what lies within the file.
    ///
    /// # Panics
    ///
    /// When there is no such file.
    pub fn read(&self, file: FileSlot, offset_bytes: u64, len_bytes: u64) -> Vec<u8> {
        self.look(file, |file| file.read(offset_bytes, len_bytes))
    }

    /// Makes the file at least `len_bytes` long; what is new is a hole, and on the medium.
    ///
    /// # Panics
    ///
    /// When there is no such file.
    pub fn extend(&self, file: FileSlot, len_bytes: u64) {
        self.change(file, |file| {
            file.reach(len_bytes, NOBODY);
            file.sync(|_| true);
        });
    }

    /// How long the file is now.
    ///
    /// # Panics
    ///
    /// When there is no such file.
    pub fn len_bytes(&self, file: FileSlot) -> u64 {
        self.look(file, SimFile::len_bytes)
    }

    /// Loses what no sync covers, or some of it. Whatever was in flight is over: its reactor is not used any more.
    pub fn crash(&self, dice: &mut Dice) {
        let writeback = match dice.below(8) {
            0 | 1 => Writeback::Nothing,
            2 => Writeback::Everything,
            _ => Writeback::Anything,
        };
        let mut content = self.0.borrow_mut();
        for file in &mut content.files {
            file.crash(writeback, dice);
        }
        content.in_flight.clear();
    }

    /// Whether there is such a file.
    pub(super) fn has(&self, file: FileSlot) -> bool {
        usize::try_from(file.0).is_ok_and(|file| file < self.0.borrow().files.len())
    }

    /// A new operation begins.
    pub(super) fn begin(&self) -> Author {
        let mut content = self.0.borrow_mut();
        let author = content.next;
        content.next = Author(author.0 + 1);
        content.in_flight.insert(author);
        author
    }

    /// The operation is over: from now on a sync that is submitted covers it.
    pub(super) fn end(&self, author: Author) {
        self.0.borrow_mut().in_flight.remove(&author);
    }

    /// What a sync that is submitted now covers.
    pub(super) fn horizon(&self) -> Horizon {
        let content = self.0.borrow();
        Horizon {
            next: content.next,
            in_flight: content.in_flight.clone(),
        }
    }

    /// A sync that was submitted at `horizon` has ended.
    pub(super) fn sync(&self, file: FileSlot, horizon: &Horizon) {
        self.change(file, |file| file.sync(|author| horizon.covers(author)));
    }

    /// A durable write by `author` that was submitted at `horizon` has ended.
    pub(super) fn sync_write(&self, file: FileSlot, range: &Range<u64>, author: Author, horizon: &Horizon) {
        self.change(file, |file| {
            file.sync_write(range, author, |author| horizon.covers(author));
        });
    }

    fn look<T>(&self, file: FileSlot, look: impl FnOnce(&SimFile) -> T) -> T {
        let content = self.0.borrow();
        let place = usize::try_from(file.0).ok();
        let file = place.and_then(|place| content.files.get(place));
        look(file.expect("the file was added to the medium"))
    }

    pub(super) fn change(&self, file: FileSlot, change: impl FnOnce(&mut SimFile)) {
        let mut content = self.0.borrow_mut();
        let place = usize::try_from(file.0).ok();
        let file = place.and_then(|place| content.files.get_mut(place));
        change(file.expect("the file was added to the medium"));
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::indexing_slicing, reason = "a test's panic is its failure")]

    use super::*;

    const FILE: FileSlot = FileSlot(0);

    fn medium() -> Medium {
        let medium = Medium::default();
        medium.add(&[0; 1024]);
        medium
    }

    fn write(medium: &Medium, byte: u8) -> Author {
        let author = medium.begin();
        medium.change(FILE, |file| file.write(0, &[byte; 512], author));
        author
    }

    /// The first byte of the file after each of many crashes of what `prepare` made.
    fn survivors(prepare: impl Fn(&Medium)) -> BTreeSet<u8> {
        let survivor = |seed| {
            let medium = medium();
            prepare(&medium);
            medium.crash(&mut Dice::new(seed));
            medium.read(FILE, 0, 1)[0]
        };
        (0..200).map(survivor).collect()
    }

    #[test]
    fn a_sync_keeps_what_was_complete_when_it_was_submitted_and_no_more() {
        let found = survivors(|medium| {
            let first = write(medium, 1);
            medium.end(first);
            let second = write(medium, 2);
            let horizon = medium.horizon();
            medium.end(second);
            medium.sync(FILE, &horizon);
        });
        assert_eq!(found, BTreeSet::from([1, 2]));
    }

    #[test]
    fn a_crash_keeps_anything_since_the_last_sync() {
        let found = survivors(|medium| {
            for byte in 1..4 {
                medium.end(write(medium, byte));
            }
        });
        assert_eq!(found, BTreeSet::from([0, 1, 2, 3]));
    }

    #[test]
    fn a_durable_write_survives_and_so_does_the_length_that_it_needs() {
        for seed in 0..50 {
            let medium = medium();
            let author = medium.begin();
            let horizon = medium.horizon();
            medium.change(FILE, |file| file.write(2048, &[7; 512], author));
            medium.sync_write(FILE, &(2048..2560), author, &horizon);
            medium.end(author);
            medium.crash(&mut Dice::new(seed));
            assert_eq!(medium.read(FILE, 2048, 512), [7; 512]);
        }
    }

    #[test]
    fn a_length_that_was_not_synced_may_be_lost() {
        let lengths: BTreeSet<u64> = (0..50)
            .map(|seed| {
                let medium = medium();
                let author = medium.begin();
                medium.change(FILE, |file| file.reach(4096, author));
                medium.end(author);
                medium.crash(&mut Dice::new(seed));
                medium.len_bytes(FILE)
            })
            .collect();
        assert_eq!(lengths, BTreeSet::from([1024, 4096]));
    }
}
