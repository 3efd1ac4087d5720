//! Writes that a server has acknowledged and may still forget: they lie in its cache until a flush (SYNCHRONIZE CACHE, COMMIT).
//!
//! The guest uses its buffers again as soon as it has been answered, so what it wrote is copied when it is acknowledged. After a
//! reconnection nobody can tell whether the server has forgotten it; it is then written again, before anything else is.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crate::request::{Segment, Space};
use crate::segments;

/// Changes of the medium in the order in which they were acknowledged.
///
/// ```text
///   keep ──► entries ──cover──► a flush is under way ──covered──► those from before it are dropped
///               └── replay: each byte as it was written last, and none twice
/// ```
///
/// A change that the server cannot forget is not kept, but noted where older ones are: they must not be written over it. What was
/// acknowledged while it was under way is none of these: it may have been carried out before or after it.
#[derive(Debug)]
pub(crate) struct Retained {
    entries: VecDeque<Entry>,
    /// Where the bytes of the entries are, oldest first; the last is being filled.
    chunks: VecDeque<Vec<u8>>,
    /// Chunks that were in use: memory that was touched once costs no page fault any more.
    spare: Vec<Vec<u8>>,
    /// The number of the first of the chunks.
    first_chunk: u64,
    /// The number of the next entry.
    next: u64,
    bytes_max: usize,
}

#[derive(Debug)]
struct Entry {
    range: Range<u64>,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    /// With the space that they have, or without.
    Zeroes(Space),
    /// In this chunk, from there on.
    Bytes(u64, usize),
    /// On the medium: what was there at the moment in which it was sent must not be written again.
    OnMedium(Moment),
}

/// A moment in the order of acknowledgements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(u64);

/// Something to be written again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rewrite {
    /// Where, in bytes.
    pub(crate) offset_bytes: u64,
    /// What; nothing stands for zeros.
    pub(crate) bytes: Option<Arc<[u8]>>,
    /// What becomes of the space of zeros.
    pub(crate) space: Space,
    /// How much, in bytes.
    pub(crate) len_bytes: u64,
}

/// What is allocated at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// How much is written again by one command.
const REWRITE_BYTES_MAX: u64 = 256 << 10;

impl Retained {
    /// Nothing, with room for `bytes_max`.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            chunks: VecDeque::new(),
            spare: Vec::new(),
            first_chunk: 0,
            next: 0,
            bytes_max,
        }
    }

    /// Whether nothing is kept.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many bytes are allocated for what is kept. Entries count: zeros have nothing else.
    pub(crate) fn bytes(&self) -> usize {
        self.chunks.len() * CHUNK_BYTES + self.notes_bytes()
    }

    /// How many bytes of that are not copies.
    fn notes_bytes(&self) -> usize {
        self.entries.len() * size_of::<Entry>()
    }

    /// Whether one that zeroes something may be begun: a server that acknowledges and never empties its cache would have us note
    /// them without end.
    pub(crate) fn takes_notes(&self) -> bool {
        self.is_empty() || self.notes_bytes() < self.bytes_max
    }

    /// Whether it is time to have the server empty its cache: half of the room is taken.
    pub(crate) fn is_filling(&self) -> bool {
        self.bytes() * 2 > self.bytes_max
    }

    /// Whether `len_bytes` more can be kept. What cannot is not to be written before there is room.
    pub(crate) fn has_room(&self, len_bytes: u64) -> bool {
        usize::try_from(len_bytes).is_ok_and(|len| self.bytes() + len <= self.bytes_max)
    }

    /// How much room a copy of `len_bytes` takes at most: as many as fit share a chunk, and what they leave of it is lost.
    pub(crate) fn room_of(len_bytes: u64) -> u64 {
        let sharers = CHUNK_BYTES as u64 / len_bytes.max(1);
        match sharers {
            0 => len_bytes,
            sharers => CHUNK_BYTES as u64 / sharers,
        }
    }

    /// Keeps what `segments` contain, which was written at `offset_bytes`.
    pub(crate) fn keep(&mut self, offset_bytes: u64, segments: &[Segment]) {
        let len = segments::total(segments);
        let needed = usize::try_from(len).expect("this is a 64-bit monitor");
        let fits = |chunk: &Vec<u8>| chunk.capacity() - chunk.len() >= needed;
        if !self.chunks.back().is_some_and(fits) {
            let spare = self.spare.pop().filter(fits);
            let chunk = spare.unwrap_or_else(|| Vec::with_capacity(CHUNK_BYTES.max(needed)));
            self.chunks.push_back(chunk);
        }
        let number = self.first_chunk + self.chunks.len() as u64 - 1;
        let chunk = self.chunks.back_mut().expect("one was made, if there was none");
        let content = Content::Bytes(number, chunk.len());
        segments::gather(segments, chunk);
        self.push(offset_bytes..offset_bytes + len, content);
    }

    /// Keeps that a range was zeroed, and what became of its space.
    pub(crate) fn keep_zeroes(&mut self, offset_bytes: u64, len_bytes: u64, space: Space) {
        self.push(offset_bytes..offset_bytes + len_bytes, Content::Zeroes(space));
    }

    /// Takes in that a range was written past the cache, by a command that was sent at the moment `sent`: what was kept of it
    /// before that is not to be written again.
    pub(crate) fn supersede(&mut self, offset_bytes: u64, len_bytes: u64, sent: Moment) {
        let range = offset_bytes..offset_bytes + len_bytes;
        let overlaps = |entry: &Entry| entry.range.start < range.end && range.start < entry.range.end;
        let older = self.entries.iter().zip(self.first()..sent.0);
        if older.map(|(entry, _)| entry).any(overlaps) {
            self.push(range, Content::OnMedium(sent));
        }
    }

    fn push(&mut self, range: Range<u64>, content: Content) {
        self.entries.push_back(Entry { range, content });
        self.next += 1;
    }

    /// The number of the first entry.
    fn first(&self) -> u64 {
        self.next - self.entries.len() as u64
    }

    /// Now: a flush that is sent from here on covers all that was kept before.
    pub(crate) fn now(&self) -> Moment {
        Moment(self.next)
    }

    /// Drops what was kept before `moment`: it is on the medium.
    pub(crate) fn covered(&mut self, moment: Moment) {
        let count = moment.0.saturating_sub(self.first());
        let count = usize::try_from(count).expect("this is a 64-bit monitor");
        self.entries.drain(..count.min(self.entries.len()));
        let oldest = self.entries.iter().find_map(|entry| match entry.content {
            Content::Bytes(chunk, _) => Some(chunk),
            Content::Zeroes(_) | Content::OnMedium(_) => None,
        });
        let end = self.first_chunk + self.chunks.len() as u64;
        let unused = oldest.unwrap_or(end) - self.first_chunk;
        let unused_chunks = ..usize::try_from(unused).expect("this is a 64-bit monitor");
        for mut chunk in self.chunks.drain(unused_chunks) {
            chunk.clear();
            self.spare.push(chunk);
        }
        self.first_chunk += unused;
    }

    /// Gives memory back that is not in use: the disk is idle.
    pub(crate) fn trim(&mut self) {
        self.spare = Vec::new();
    }

    /// Each byte that is kept, as it was written last; pieces do not overlap, and each starts and ends where a write
    /// did or, if it has bytes, at a multiple of `REWRITE_BYTES_MAX` from its start.
    pub(crate) fn replay(&self) -> Vec<Rewrite> {
        let mut newer = Cover::default();
        // What is on the medium, by when it was sent and its own number.
        let mut on_medium = BTreeMap::new();
        let mut rewrites = Vec::new();
        for (number, entry) in (0..self.next).rev().zip(self.entries.iter().rev()) {
            while let Some(last) = on_medium.last_entry()
                && last.key() > &(Moment(number), u64::MAX)
            {
                newer.add(last.remove());
            }
            if let Content::OnMedium(sent) = entry.content {
                on_medium.insert((sent, number), entry.range.clone());
                continue;
            }
            newer.uncovered(&entry.range, |piece| {
                let bytes_max = match entry.content {
                    Content::Bytes(..) => REWRITE_BYTES_MAX,
                    // They take no memory, however many they are.
                    Content::Zeroes(_) | Content::OnMedium(_) => u64::MAX,
                };
                let mut start = piece.start;
                while start < piece.end {
                    let end = piece.end.min(start.saturating_add(bytes_max));
                    rewrites.push(self.rewrite(entry, start..end));
                    start = end;
                }
            });
            newer.add(entry.range.clone());
        }
        rewrites
    }

    fn rewrite(&self, entry: &Entry, piece: Range<u64>) -> Rewrite {
        let bytes = match entry.content {
            Content::Zeroes(_) | Content::OnMedium(_) => None,
            Content::Bytes(chunk, at) => {
                let index = |value: u64| usize::try_from(value).expect("this is a 64-bit monitor");
                let start = at + index(piece.start - entry.range.start);
                let chunk = self.chunks.get(index(chunk - self.first_chunk));
                let bytes = chunk.and_then(|chunk| chunk.get(start..start + index(piece.end - piece.start)));
                Some(Arc::from(
                    bytes.expect("a chunk is kept as long as an entry is in it"),
                ))
            }
        };
        Rewrite {
            offset_bytes: piece.start,
            bytes,
            space: match entry.content {
                Content::Zeroes(space) => space,
                Content::Bytes(..) | Content::OnMedium(_) => Space::Stays,
            },
            len_bytes: piece.end - piece.start,
        }
    }
}

impl Rewrite {
    /// Leaves so much of it at most; the rest is returned.
    pub(crate) fn split_off(&mut self, at_bytes: u64) -> Option<Self> {
        let len_bytes = self.len_bytes.checked_sub(at_bytes).filter(|len| *len > 0)?;
        let at = usize::try_from(at_bytes).expect("this is a 64-bit monitor");
        let (bytes, rest) = match &self.bytes {
            Some(bytes) => {
                let (bytes, rest) = bytes.split_at(at);
                (Some(Arc::from(bytes)), Some(Arc::from(rest)))
            }
            None => (None, None),
        };
        (self.bytes, self.len_bytes) = (bytes, at_bytes);
        Some(Self {
            offset_bytes: self.offset_bytes + at_bytes,
            bytes: rest,
            space: self.space,
            len_bytes,
        })
    }
}

/// Disjoint ranges, sorted.
#[derive(Debug, Default)]
struct Cover(BTreeMap<u64, u64>);

impl Cover {
    /// Calls `each` with every part of `range` that is not covered.
    fn uncovered(&self, range: &Range<u64>, mut each: impl FnMut(Range<u64>)) {
        let mut at = range.start;
        if let Some((_, &end)) = self.0.range(..=at).next_back() {
            at = at.max(end);
        }
        for (&start, &end) in self.0.range(at..range.end.max(at)) {
            if at < start {
                each(at..start);
            }
            at = at.max(end);
        }
        if at < range.end {
            each(at..range.end);
        }
    }

    fn add(&mut self, range: Range<u64>) {
        let (mut start, mut end) = (range.start, range.end);
        while let Some((&other, &other_end)) = self.0.range(..=end).next_back()
            && other_end >= start
        {
            self.0.remove(&other);
            start = start.min(other);
            end = end.max(other_end);
        }
        self.0.insert(start, end);
    }
}

#[cfg(test)]
mod tests;
