//! Guest memory on its way: pages out of the memory of a guest that runs, into that of one that does not yet.

use std::io::{BufRead, Write};

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::wire::{Kind, PAGES_BYTES_MAX, Wire, WireError};
use crate::memory::make_resident;
use crate::snapshot::memory::{PAGE_BYTES, PageSet};

/// Why pages are not taken.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum PagesError {
    #[error("a message of pages is no whole number of them")]
    Partial,
    #[error("{count} pages at page {first} do not lie within the guest's memory")]
    Outside { first: u64, count: u64 },
}

/// The pages of a memory in the order of its addresses, without the gap for devices.
#[derive(Debug)]
pub struct Ordered<'a> {
    memory: &'a GuestMemoryMmap,
}

impl<'a> Ordered<'a> {
    /// Those of `memory`, each region of which is a whole number of pages.
    pub fn new(memory: &'a GuestMemoryMmap) -> Self {
        Self { memory }
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
    fn read(&self, first: u64, bytes: &mut [u8]) -> Option<()> {
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
    fn parts(&self, first: u64, count: u64) -> Result<Vec<Part>, PagesError> {
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
struct Part {
    start: GuestAddress,
    /// The number of the first one.
    first: u64,
    pages: u64,
}

/// A memory into which pages come. It begins with zeros.
#[derive(Debug)]
pub struct Landing<'a> {
    ordered: Ordered<'a>,
    /// The pages that may be something else than zeros by now.
    written: PageSet,
}

impl<'a> Landing<'a> {
    /// That of `memory`, which nobody has touched.
    pub fn new(memory: &'a GuestMemoryMmap) -> Self {
        let ordered = Ordered::new(memory);
        Self {
            written: PageSet::empty(ordered.count() * PAGE_BYTES as u64),
            ordered,
        }
    }

    /// How many pages it has.
    pub fn count(&self) -> u64 {
        self.ordered.count()
    }

    /// Takes the body of a frame of pages, which go from the connection's buffer to their place. Says how many they were.
    ///
    /// # Errors
    ///
    /// When they are no whole pages of this memory, or the connection has ended.
    pub fn take_pages<S, E>(&mut self, wire: &mut Wire<S>, body_bytes: usize) -> Result<u64, E>
    where
        S: BufRead + Write,
        E: From<WireError> + From<PagesError>,
    {
        let len_bytes = body_bytes
            .checked_sub(NUMBER_BYTES)
            .filter(|len_bytes| *len_bytes > 0 && len_bytes.is_multiple_of(PAGE_BYTES))
            .ok_or(PagesError::Partial)?;
        let first = u64::from_le_bytes(wire.receive_array()?);
        let count = (len_bytes / PAGE_BYTES) as u64;
        let parts = self.ordered.parts(first, count)?;
        let is_new = !self.written.contains(first);
        self.written.insert(first, first + count);
        for part in parts {
            let len_bytes = usize::try_from(part.pages).expect("a message is short") * PAGE_BYTES;
            let (mut at, memory) = (part.start, self.ordered.memory);
            if is_new {
                make_resident(memory, at, len_bytes);
            }
            wire.receive_pieces(len_bytes, |piece| {
                memory
                    .write_slice(piece, at)
                    .expect("a part lies within the memory");
                at = at.unchecked_add(piece.len() as u64);
            })?;
        }
        Ok(count)
    }

    /// Takes the body of a frame of zeros: pages that are zeros already stay untouched. Says how many they were.
    ///
    /// # Errors
    ///
    /// As [`Self::take_pages`].
    pub fn take_zeros<S, E>(&mut self, wire: &mut Wire<S>, body_bytes: usize) -> Result<u64, E>
    where
        S: BufRead + Write,
        E: From<WireError> + From<PagesError>,
    {
        if body_bytes != 2 * NUMBER_BYTES {
            return Err(PagesError::Partial.into());
        }
        let first = u64::from_le_bytes(wire.receive_array()?);
        let count = u64::from_le_bytes(wire.receive_array()?);
        for part in self.ordered.parts(first, count)? {
            let written = |number: &u64| self.written.contains(part.first + number);
            for number in (0..part.pages).filter(written) {
                let address = part.start.unchecked_add(number * PAGE_BYTES as u64);
                let wiped = self.ordered.memory.write_slice(&[0; PAGE_BYTES], address);
                wiped.expect("a part lies within the memory");
            }
        }
        Ok(count)
    }
}

/// The number of a page in a frame.
const NUMBER_BYTES: usize = 8;

/// How far a round is.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// How many pages were sent since this was told last.
    pub pages: u64,
    /// What went over the connection since it was made.
    pub bytes: u64,
}

/// Sends pages by rounds.
#[derive(Debug, Default)]
pub struct Sender {
    buffer: Vec<u8>,
}

impl Sender {
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

    /// Sends the pages of `set` as they are now, and says how many they were; `sent` hears of them a few at a time.
    ///
    /// # Errors
    ///
    /// When the connection has ended, or whatever `sent` says.
    pub fn send<S: BufRead + Write>(
        &mut self,
        wire: &mut Wire<S>,
        memory: &GuestMemoryMmap,
        set: &PageSet,
        mut sent: impl FnMut(Sent) -> Result<(), WireError>,
    ) -> Result<u64, WireError> {
        let ordered = Ordered::new(memory);
        let mut zeros = Zeros::default();
        let mut total = 0;
        for run in set.runs() {
            let mut first = run.start;
            while first < run.end {
                let count = (run.end - first).min((PAGES_BYTES_MAX / PAGE_BYTES) as u64);
                let len_bytes = usize::try_from(count).expect("it is small") * PAGE_BYTES;
                self.buffer.resize(len_bytes, 0);
                ordered
                    .read(first, &mut self.buffer)
                    .expect("a set of pages is one of the memory that it was made for");
                zeros.send_run(wire, first, &self.buffer)?;
                total += count;
                first += count;
                sent(Sent {
                    pages: count,
                    bytes: wire.sent_bytes(),
                })?;
            }
        }
        zeros.end(wire)?;
        Ok(total)
    }
}

/// Pages of zeros that were not told of yet: more may follow.
#[derive(Default)]
struct Zeros {
    first: u64,
    count: u64,
}

impl Zeros {
    /// Sends pages that lie one behind the other, those of zeros by their number alone.
    fn send_run<S: BufRead + Write>(
        &mut self,
        wire: &mut Wire<S>,
        first: u64,
        bytes: &[u8],
    ) -> Result<(), WireError> {
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
                wire.send(Kind::Pages, &[&number.to_le_bytes(), run.as_flattened()])?;
            }
            number += count;
        }
        Ok(())
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
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::memory::{Backing, PageSize, allocate};
    use crate::migration::receive::ReceiveError;

    fn moved(from: &GuestMemoryMmap, landing: &mut Landing<'_>, set: &PageSet) -> u64 {
        let mut wire = Wire::new(Cursor::new(Vec::new()));
        let sent = Sender::default().send(&mut wire, from, set, |_| Ok(())).unwrap();
        wire.stream().set_position(0);
        let mut taken = 0;
        while let Ok((kind, body_bytes)) = wire.receive_head() {
            taken += take(landing, &mut wire, kind, body_bytes).unwrap();
        }
        assert_eq!(sent, taken);
        sent
    }

    fn take(
        landing: &mut Landing<'_>,
        wire: &mut Wire<Cursor<Vec<u8>>>,
        kind: Kind,
        body_bytes: usize,
    ) -> Result<u64, ReceiveError> {
        match kind {
            Kind::Pages => landing.take_pages(wire, body_bytes),
            Kind::Zeros => landing.take_zeros(wire, body_bytes),
            other => panic!("{other:?}"),
        }
    }

    fn taken(landing: &mut Landing<'_>, kind: Kind, body: &[u8]) -> Result<u64, ReceiveError> {
        take(
            landing,
            &mut Wire::new(Cursor::new(body.to_vec())),
            kind,
            body.len(),
        )
    }

    #[test]
    fn memory_arrives_as_it_is_and_zeros_wipe_out_what_was_there() {
        // More than fits below the gap.
        let mib = 3 << 10 | 2;
        let [from, to] = [0, 1].map(|_| allocate(mib, Backing::Anonymous, PageSize::Base).unwrap());
        let (low, high) = (GuestAddress((3 << 30) - 4096), GuestAddress(4 << 30));
        from.write_slice(&[1; 4096], low).unwrap();
        from.write_slice(&[2; 8192], high).unwrap();
        let size_bytes = mib << 20;
        let mut landing = Landing::new(&to);
        let mut set = PageSet::empty(size_bytes);
        set.insert(0, 16);
        from.write_slice(&[9; 4096], GuestAddress(0x5000)).unwrap();
        assert_eq!(moved(&from, &mut landing, &set), 16);
        from.write_slice(&[0; 4096], GuestAddress(0x5000)).unwrap();
        set.insert((3 << 18) - 8, (3 << 18) + 8);
        assert_eq!(moved(&from, &mut landing, &set), 32);
        let mut bytes = [7; 8192];
        to.read_slice(&mut bytes[..4096], low).unwrap();
        assert_eq!(bytes[..4096], [1; 4096]);
        to.read_slice(&mut bytes, high).unwrap();
        assert_eq!(bytes, [2; 8192]);
        to.read_slice(&mut bytes[..4096], GuestAddress(0x5000)).unwrap();
        assert_eq!(bytes[..4096], [0; 4096]);
    }

    #[test]
    fn pages_outside_the_memory_are_refused() {
        let memory = allocate(1, Backing::Anonymous, PageSize::Base).unwrap();
        let mut landing = Landing::new(&memory);
        let pages = |first: u64, len: usize| [&first.to_le_bytes()[..], &vec![1; len]].concat();
        let zeros = |first: u64, count: u64| [first.to_le_bytes(), count.to_le_bytes()].concat();
        assert!(taken(&mut landing, Kind::Pages, &pages(255, 4096)).is_ok());
        for body in [
            pages(256, 4096),
            pages(255, 8192),
            pages(u64::MAX, 4096),
            pages(0, 100),
            pages(0, 0),
        ] {
            assert!(matches!(
                taken(&mut landing, Kind::Pages, &body),
                Err(ReceiveError::Pages(_))
            ));
        }
        assert!(taken(&mut landing, Kind::Zeros, &zeros(0, 256)).is_ok());
        for body in [
            zeros(1, 256),
            zeros(u64::MAX, u64::MAX),
            zeros(0, u64::MAX),
            vec![0; 15],
        ] {
            assert!(matches!(
                taken(&mut landing, Kind::Zeros, &body),
                Err(ReceiveError::Pages(_))
            ));
        }
    }
}
