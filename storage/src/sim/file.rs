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
    /// What a reader sees; a sector that is missing is a hole.
    content: BTreeMap<u64, Sector>,
    len_bytes: u64,
    /// For each sector that changed since it was synced, the contents that the medium may hold: the
    /// first is the one that it surely held, the last is what a reader sees.
    sectors: BTreeMap<u64, Vec<Version<Sector>>>,
    /// The same for the length of the file.
    lengths: Vec<Version<u64>>,
}

type Sector = Box<[u8; SECTOR]>;

/// The same unit, to count with.
const SECTOR: usize = 512;

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
    /// A file of `content`, every byte of it on the medium.
    pub(super) fn new(content: &[u8]) -> Self {
        let mut file = Self {
            content: BTreeMap::new(),
            len_bytes: 0,
            sectors: BTreeMap::new(),
            lengths: vec![Version {
                author: NOBODY,
                value: 0,
            }],
        };
        file.write(0, content, NOBODY);
        file.sync(|_| true);
        file
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The part of `len_bytes` at `offset_bytes` that lies within the file.
    pub(super) fn read(&self, offset_bytes: u64, len_bytes: u64) -> Vec<u8> {
        let end_bytes = offset_bytes.saturating_add(len_bytes).min(self.len_bytes);
        let mut bytes = Vec::with_capacity(index(end_bytes.saturating_sub(offset_bytes)));
        for (sector, part) in parts(offset_bytes..end_bytes) {
            match self.content.get(&sector) {
                Some(content) => bytes.extend_from_slice(content.get(part).unwrap_or_default()),
                None => bytes.resize(bytes.len() + part.len(), 0),
            }
        }
        bytes
    }

    /// The first `len_bytes` as far as they are surely on the medium.
    pub(super) fn read_synced(&self, len_bytes: u64) -> Vec<u8> {
        let mut bytes = self.read(0, len_bytes);
        let (sectors, _) = bytes.as_chunks_mut::<SECTOR>();
        for (number, versions) in &self.sectors {
            let place = sectors.get_mut(index(*number));
            if let (Some(place), Some(synced)) = (place, versions.first()) {
                *place = *synced.value;
            }
        }
        bytes
    }

    /// Writes `bytes`; the file grows if it has to.
    pub(super) fn write(&mut self, offset_bytes: u64, mut bytes: &[u8], author: Author) {
        let end_bytes = offset_bytes + bytes.len() as u64;
        self.reach(end_bytes, author);
        for (sector, part) in parts(offset_bytes..end_bytes) {
            let (now, later) = bytes.split_at(part.len());
            bytes = later;
            self.change(sector, author, |content| {
                let place = content.get_mut(part);
                place.expect("a part lies in its sector").copy_from_slice(now);
            });
        }
    }

    /// Makes a range read as zeros, as far as it lies within the file.
    pub(super) fn zero(&mut self, offset_bytes: u64, len_bytes: u64, author: Author) {
        let end_bytes = (offset_bytes + len_bytes).min(self.len_bytes);
        for (sector, part) in parts(offset_bytes..end_bytes) {
            self.change(sector, author, |content| {
                content.get_mut(part).unwrap_or_default().fill(0);
            });
        }
    }

    /// Makes the file at least `len_bytes` long.
    pub(super) fn reach(&mut self, len_bytes: u64, author: Author) {
        if len_bytes > self.len_bytes {
            self.len_bytes = len_bytes;
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

    /// As [`Self::sync`], of what a file system brings to the medium with one write by `author`: its
    /// sectors, and the inode with any length that is `settled`.
    pub(super) fn sync_write(
        &mut self,
        range: &Range<u64>,
        author: Author,
        settled: impl Fn(Author) -> bool,
    ) {
        for (sector, _) in parts(range.clone()) {
            if let Some(versions) = self.sectors.get_mut(&sector) {
                settle(versions, &|of| of == author);
            }
        }
        settle(&mut self.lengths, &|of| of == author || settled(of));
    }

    /// Forgets what the medium does not hold.
    pub(super) fn crash(&mut self, writeback: Writeback, dice: &mut Dice) {
        let mut survivor = |count: usize| match writeback {
            Writeback::Nothing => 0,
            Writeback::Everything => count - 1,
            Writeback::Anything => dice.index(count),
        };
        let length = self.lengths.get(survivor(self.lengths.len()));
        self.len_bytes = length.expect("a file has a length").value;
        for (sector, mut versions) in std::mem::take(&mut self.sectors) {
            let version = versions.swap_remove(survivor(versions.len()));
            self.content.insert(sector, version.value);
        }
        // What lay beyond the end is gone, and reads as zeros if the file grows again.
        let end = self.len_bytes.div_ceil(SECTOR_BYTES);
        self.content.split_off(&end);
        let tail = index(self.len_bytes % SECTOR_BYTES);
        if tail > 0
            && let Some(last) = self.content.get_mut(&(end - 1))
        {
            last.get_mut(tail..).unwrap_or_default().fill(0);
        }
        self.lengths = vec![Version {
            author: NOBODY,
            value: self.len_bytes,
        }];
    }

    fn change(&mut self, sector: u64, author: Author, change: impl FnOnce(&mut [u8])) {
        let content = self
            .content
            .entry(sector)
            .or_insert_with(|| Box::new([0; SECTOR]));
        let versions = self.sectors.entry(sector).or_insert_with(|| {
            vec![Version {
                author: NOBODY,
                value: content.clone(),
            }]
        });
        change(content.as_mut_slice());
        versions.push(Version {
            author,
            value: content.clone(),
        });
    }
}

/// Drops what cannot come back once the last change that is `settled` is on the medium.
fn settle<T>(versions: &mut Vec<Version<T>>, settled: &impl Fn(Author) -> bool) {
    if let Some(last) = versions.iter().rposition(|version| settled(version.author)) {
        versions.drain(..last);
    }
}

/// The sectors that a range of bytes touches, each with the part of it that lies in the range.
fn parts(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let range = range.start..range.end.max(range.start);
    let sectors = range.start / SECTOR_BYTES..range.end.div_ceil(SECTOR_BYTES);
    sectors.map(move |sector| {
        let first = sector * SECTOR_BYTES;
        let start = range.start.saturating_sub(first);
        let end = (range.end - first).min(SECTOR_BYTES);
        (sector, index(start)..index(end))
    })
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}
