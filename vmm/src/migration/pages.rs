//! Guest memory on its way: pages out of the memory of a guest that runs.

use std::io::{BufRead, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::compress::{Damaged, Packer};
use super::wire::{Kind, PAGES_BYTES_MAX, Wire, WireError};
use crate::config::Compression;
use crate::snapshot::memory::{PAGE_BYTES, PageSet};

/// Why pages are not taken.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum PagesError {
    #[error("a message of pages is no whole number of them")]
    Partial,
    #[error("{count} pages at page {first} do not lie within the guest's memory")]
    Outside { first: u64, count: u64 },
    #[error("{0} packed pages are more than a message may have, or none")]
    Count(u64),
    #[error(transparent)]
    Damaged(#[from] Damaged),
}

/// The pages of a memory in the order of its addresses, without the gap for devices.
#[derive(Debug)]
pub struct Ordered {
    memory: Arc<GuestMemoryMmap>,
}

impl Ordered {
    /// Those of `memory`, each region of which is a whole number of pages.
    pub fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        Self { memory }
    }

    /// The memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.memory
            .iter()
            .map(|region| region.len() / PAGE_BYTES as u64)
            .sum()
    }

    /// Where the page `number` is, and how many follow in the same region.
    fn place(&self, number: u64) -> Option<(GuestAddress, u64)> {
        let mut first = 0;
        for region in self.memory.iter() {
            let pages = region.len() / PAGE_BYTES as u64;
            if number < first + pages {
                let offset_bytes = (number - first) * PAGE_BYTES as u64;
                return Some((
                    GuestAddress(region.start_addr().0 + offset_bytes),
                    first + pages - number,
                ));
            }
            first += pages;
        }
        None
    }

    /// Copies pages from `first` on, whatever the guest is doing with them.
    pub(super) fn read(&self, first: u64, bytes: &mut [u8]) -> Option<()> {
        let mut number = first;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (address, pages) = self.place(number)?;
            let pages = pages.min((rest.len() / PAGE_BYTES) as u64);
            let (part, behind) = rest.split_at_mut(usize::try_from(pages).ok()? * PAGE_BYTES);
            self.memory.read_slice(part, address).ok()?;
            number += pages;
            rest = behind;
        }
        Some(())
    }

    /// Where `count` pages from `first` on lie: one part for each region.
    pub(super) fn parts(&self, first: u64, count: u64) -> Result<Vec<Part>, PagesError> {
        let outside = PagesError::Outside { first, count };
        let end = first.checked_add(count).filter(|end| *end <= self.count());
        let Some(end) = end else {
            return Err(outside);
        };
        let mut parts = Vec::new();
        let mut at = first;
        while at < end {
            let Some((start, left)) = self.place(at) else {
                return Err(outside);
            };
            let pages = left.min(end - at);
            parts.push(Part {
                start,
                first: at,
                pages,
            });
            at += pages;
        }
        Ok(parts)
    }
}

/// Pages that lie one behind the other in one region.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) start: GuestAddress,
    /// The number of the first one.
    pub(super) first: u64,
    pub(super) pages: u64,
}

/// The number of a page in a frame.
pub(super) const NUMBER_BYTES: usize = 8;

/// The pages of a round, handed out piece by piece to whoever sends them: each page once.
pub struct Pieces<'a> {
    runs: Mutex<Runs<'a>>,
}

struct Runs<'a> {
    runs: Box<dyn Iterator<Item = Range<u64>> + Send + 'a>,
    /// What is left of the run that was begun.
    begun: Range<u64>,
}

/// Pages of a piece at most: enough that few are waited for, and not so many that one who sends has much more to do than others
/// in the end.
pub const PIECE_PAGES: u64 = (2 << 20) / PAGE_BYTES as u64;

impl<'a> Pieces<'a> {
    /// Those of `set`.
    pub fn new(set: &'a PageSet) -> Self {
        Self {
            runs: Mutex::new(Runs {
                runs: Box::new(set.runs()),
                begun: 0..0,
            }),
        }
    }

    /// The next piece, in place of what is in `piece`. Says whether there is one.
    pub fn next(&self, piece: &mut Vec<Range<u64>>) -> bool {
        piece.clear();
        let mut runs = self.runs.lock().expect("no holder panics");
        let mut room = PIECE_PAGES;
        while room > 0 {
            if runs.begun.is_empty() {
                match runs.runs.next() {
                    Some(run) => runs.begun = run,
                    None => break,
                }
            }
            let first = runs.begun.start;
            let end = runs.begun.end.min(first + room);
            runs.begun.start = end;
            room -= end - first;
            piece.push(first..end);
        }
        !piece.is_empty()
    }
}

/// Sends pages by rounds.
#[derive(Debug)]
pub struct Sender {
    piece: Vec<Range<u64>>,
    buffer: Vec<u8>,
    packer: Packer,
}

impl Sender {
    /// One that packs them as was asked.
    pub fn new(compression: Compression) -> Self {
        Self {
            piece: Vec::new(),
            buffer: Vec::new(),
            packer: Packer::new(compression),
        }
    }

    /// Says that all pages of a memory are zeros but those of `touched`, and says how many they are.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub fn send_zeros<S: BufRead + Write>(
        &mut self,
        wire: &mut Wire<S>,
        touched: &PageSet,
    ) -> Result<u64, WireError> {
        let end = touched.size_bytes() / PAGE_BYTES as u64;
        let (mut first, mut total) = (0, 0);
        for run in touched.runs().chain(std::iter::once(end..end)) {
            if first < run.start {
                let count = run.start - first;
                wire.send(Kind::Zeros, &[&first.to_le_bytes(), &count.to_le_bytes()])?;
                total += count;
            }
            first = run.end;
        }
        Ok(total)
    }

    /// Sends pieces of a round, as their pages are now, until there are no more, and says how many pages they were; `sent` hears
    /// of them a few at a time.
    ///
    /// # Errors
    ///
    /// When the connection has ended, or whatever `sent` says.
    pub fn send<S: BufRead + Write>(
        &mut self,
        wire: &mut Wire<S>,
        ordered: &Ordered,
        pieces: &Pieces<'_>,
        mut sent: impl FnMut(Sent) -> Result<(), WireError>,
    ) -> Result<u64, WireError> {
        let mut zeros = Zeros::default();
        let (mut total, mut before) = (0, wire.sent_bytes());
        self.packer.begin(Instant::now());
        while pieces.next(&mut self.piece) {
            for run in self.piece.iter().flat_map(|run| frames(run.clone())) {
                let pages = run.end - run.start;
                let len_bytes = usize::try_from(pages).expect("it is small") * PAGE_BYTES;
                self.buffer.resize(len_bytes, 0);
                ordered
                    .read(run.start, &mut self.buffer)
                    .expect("a set of pages is one of the memory that it was made for");
                let full_bytes = zeros.send_run(wire, run.start, &self.buffer, &mut self.packer)?;
                total += pages;
                let bytes = wire.sent_bytes() - before;
                before += bytes;
                sent(Sent { pages, bytes })?;
                self.packer.sent(full_bytes, Instant::now());
            }
        }
        zeros.end(wire)?;
        Ok(total)
    }
}

/// What was sent since that was told last.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// How many pages.
    pub pages: u64,
    /// What went over the connection.
    pub bytes: u64,
}

/// The parts of a run that each fit into a frame.
fn frames(run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let most = PAGES_BYTES_MAX / PAGE_BYTES;
    run.clone()
        .step_by(most)
        .map(move |first| first..run.end.min(first + most as u64))
}

/// Pages of zeros that were not told of yet: more may follow.
#[derive(Default)]
struct Zeros {
    first: u64,
    count: u64,
}

impl Zeros {
    /// Sends pages that lie one behind the other, those of zeros by their number alone. Says how many bytes the others were.
    fn send_run<S: BufRead + Write>(
        &mut self,
        wire: &mut Wire<S>,
        first: u64,
        bytes: &[u8],
        packer: &mut Packer,
    ) -> Result<usize, WireError> {
        let mut full_bytes = 0;
        let pages = bytes.as_chunks::<PAGE_BYTES>().0;
        let is_zero = |page: &[u8; PAGE_BYTES]| *page == [0; PAGE_BYTES];
        let mut number = first;
        for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let count = run.len() as u64;
            if run.first().is_some_and(is_zero) {
                if self.first + self.count != number {
                    self.end(wire)?;
                    self.first = number;
                }
                self.count += count;
            } else {
                let plain = run.as_flattened();
                full_bytes += plain.len();
                let first = number.to_le_bytes();
                match packer.pack(plain) {
                    Some(packed) => wire.send(Kind::Packed, &[&first, &count.to_le_bytes(), packed])?,
                    None => wire.send(Kind::Pages, &[&first, plain])?,
                }
            }
            number += count;
        }
        Ok(full_bytes)
    }

    fn end<S: BufRead + Write>(&mut self, wire: &mut Wire<S>) -> Result<(), WireError> {
        if self.count > 0 {
            wire.send(
                Kind::Zeros,
                &[&self.first.to_le_bytes(), &self.count.to_le_bytes()],
            )?;
        }
        self.count = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_in_one_piece_whoever_asks() {
        let size_bytes = 64 << 20;
        let mut set = PageSet::empty(size_bytes);
        for first in (0..8000).step_by(3) {
            set.insert(first, first + 1);
        }
        set.insert(9000, 15_000);
        let pieces = Pieces::new(&set);
        let taken = std::thread::scope(|scope| {
            let take = || {
                let (mut all, mut piece) = (Vec::new(), Vec::new());
                while pieces.next(&mut piece) {
                    let pages: u64 = piece.iter().map(|run| run.end - run.start).sum();
                    assert!(pages <= PIECE_PAGES);
                    all.extend(piece.iter().cloned().flatten());
                }
                all
            };
            let threads = [(); 3].map(|()| scope.spawn(take));
            threads.map(|thread| thread.join().expect("it does not panic"))
        });
        let mut taken = taken.concat();
        taken.sort_unstable();
        assert_eq!(taken, set.runs().flatten().collect::<Vec<_>>());
    }
}
