//! One simulated file: what a reader sees, and what might be left of it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::dice::Dice;

/// The unit that a crash keeps or loses as a whole, in bytes.
const SECTOR_BYTES: u64 = 512;

/// Names the operation that made a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Author(pub(super) u64);

/// What was there before anything was simulated.
pub(super) const NOBODY: Author = Author(0);

/// A file in a page cache, whose sectors are written back at any time, in any order, or never.
#[derive(Debug)]
pub(super) struct SimFile {
    /// What a reader sees.
    content: Vec<u8>,
    /// For each sector that changed since it was synced, the contents that the medium may hold: the
    /// first is the one that it surely held, the last is what a reader sees.
    sectors: BTreeMap<u64, Vec<Version<Box<[u8]>>>>,
    /// The same for the length of the file.
    lengths: Vec<Version<u64>>,
}

#[derive(Clone, Debug)]
struct Version<T> {
    author: Author,
    value: T,
}

/// What a crash makes of the changes that were not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writeback {
    /// None of them reached the medium.
    Nothing,
    /// All of them did.
    Everything,
    /// Each sector holds any of its contents since the last sync.
    Anything,
}

impl SimFile {
    /// A file of which every byte is on the medium.
    pub(super) fn new(content: Vec<u8>) -> Self {
        let value = content.len() as u64;
        Self {
            content,
            sectors: BTreeMap::new(),
            lengths: vec![Version {
                author: NOBODY,
                value,
            }],
        }
    }

    pub(super) fn content(&self) -> &[u8] {
        &self.content
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.content.len() as u64
    }

    /// The part of `len_bytes` at `offset_bytes` that lies within the file.
    pub(super) fn read(&self, offset_bytes: u64, len_bytes: usize) -> &[u8] {
        let start = index(offset_bytes).min(self.content.len());
        let end = start.saturating_add(len_bytes).min(self.content.len());
        self.content.get(start..end).unwrap_or_default()
    }

    /// Writes `bytes`; the file grows if it has to.
    pub(super) fn write(&mut self, offset_bytes: u64, bytes: &[u8], author: Author) {
        let end_bytes = offset_bytes + bytes.len() as u64;
        self.reach(end_bytes, author);
        let touched = touched(&(offset_bytes..end_bytes));
        self.remember(touched.clone());
        let place = self.content.get_mut(index(offset_bytes)..index(end_bytes));
        place
            .expect("the file reaches as far as the write")
            .copy_from_slice(bytes);
        self.record(touched, author);
    }

    /// Makes a range read as zeros, as far as it lies within the file.
    pub(super) fn zero(&mut self, offset_bytes: u64, len_bytes: u64, author: Author) {
        let end_bytes = (offset_bytes + len_bytes).min(self.len_bytes());
        if offset_bytes < end_bytes {
            self.write(offset_bytes, &vec![0; index(end_bytes - offset_bytes)], author);
        }
    }

    /// Makes the file at least `len_bytes` long.
    pub(super) fn reach(&mut self, len_bytes: u64, author: Author) {
        if len_bytes > self.len_bytes() {
            self.content.resize(index(len_bytes), 0);
            self.lengths.push(Version {
                author,
                value: len_bytes,
            });
        }
    }

    /// The last change by an author that is `settled` is on the medium from now on.
    pub(super) fn sync(&mut self, settled: impl Fn(Author) -> bool) {
        self.sectors.retain(|_, versions| {
            settle(versions, &settled);
            versions.len() > 1
        });
        settle(&mut self.lengths, &settled);
    }

    /// As [`Self::sync`], for the sectors of one write by `author`.
    pub(super) fn sync_write(&mut self, range: &Range<u64>, author: Author) {
        for sector in touched(range) {
            if let Some(versions) = self.sectors.get_mut(&sector) {
                settle(versions, &|of| of == author);
            }
        }
        // Without the length the data could not be found again.
        if let Some(at) = self.lengths.iter().position(|length| length.value >= range.end) {
            self.lengths.drain(..at);
        }
    }

    /// Forgets what the medium does not hold.
    pub(super) fn crash(&mut self, writeback: Writeback, dice: &mut Dice) {
        let mut survivor = |count: usize| match writeback {
            Writeback::Nothing => 0,
            Writeback::Everything => count - 1,
            Writeback::Anything => dice.index(count),
        };
        let length = self.lengths.get(survivor(self.lengths.len()));
        let len_bytes = length.expect("a file has a length").value;
        for (sector, versions) in std::mem::take(&mut self.sectors) {
            let version = versions.get(survivor(versions.len()));
            let bytes = &version.expect("a changed sector has contents").value;
            let place = within(sector, self.content.len());
            let place = self.content.get_mut(place).unwrap_or_default();
            // What lay beyond the end of the file then reads as zeros now.
            let bytes = bytes.iter().chain(std::iter::repeat(&0));
            for (to, from) in place.iter_mut().zip(bytes) {
                *to = *from;
            }
        }
        let mut content = std::mem::take(&mut self.content);
        content.truncate(index(len_bytes));
        *self = Self::new(content);
    }

    /// Keeps what the sectors hold before their first change since the last sync.
    fn remember(&mut self, touched: Range<u64>) {
        for sector in touched {
            let bytes = self.content.get(within(sector, self.content.len()));
            self.sectors.entry(sector).or_insert_with(|| {
                vec![Version {
                    author: NOBODY,
                    value: bytes.unwrap_or_default().into(),
                }]
            });
        }
    }

    fn record(&mut self, touched: Range<u64>, author: Author) {
        for sector in touched {
            let bytes = self.content.get(within(sector, self.content.len()));
            let value = bytes.unwrap_or_default().into();
            if let Some(versions) = self.sectors.get_mut(&sector) {
                versions.push(Version { author, value });
            }
        }
    }
}

/// Drops what cannot come back once the last change that is `settled` is on the medium.
fn settle<T>(versions: &mut Vec<Version<T>>, settled: &impl Fn(Author) -> bool) {
    if let Some(last) = versions.iter().rposition(|version| settled(version.author)) {
        versions.drain(..last);
    }
}

/// The sectors that a range of bytes touches.
fn touched(range: &Range<u64>) -> Range<u64> {
    range.start / SECTOR_BYTES..range.end.div_ceil(SECTOR_BYTES)
}

/// Where a sector lies in a file of `len_bytes`.
fn within(sector: u64, len_bytes: usize) -> Range<usize> {
    let start = index(sector * SECTOR_BYTES).min(len_bytes);
    start..index((sector + 1) * SECTOR_BYTES).min(len_bytes)
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}
