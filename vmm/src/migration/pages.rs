//! Guest memory on its way: pages out of the memory of a guest that runs, into that of one that does not yet.

use std::io::{Read, Write};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::wire::{Kind, PAGES_BYTES_MAX, Wire, WireError};
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

    /// Takes what a frame of pages has.
    ///
    /// # Errors
    ///
    /// When it is not whole pages of this memory.
    pub fn take_pages(&self, body: &[u8]) -> Result<u64, PagesError> {
        let (first, bytes) = body.split_first_chunk().ok_or(PagesError::Partial)?;
        let (first, count) = (u64::from_le_bytes(*first), (bytes.len() / PAGE_BYTES) as u64);
        if bytes.is_empty() || !bytes.len().is_multiple_of(PAGE_BYTES) {
            return Err(PagesError::Partial);
        }
        let mut rest = bytes;
        for (start, pages) in self.parts(first, count)? {
            let len_bytes = usize::try_from(pages).expect("a message is short") * PAGE_BYTES;
            let (part, behind) = rest.split_at(len_bytes);
            self.memory
                .write_slice(part, start)
                .map_err(|_| PagesError::Outside { first, count })?;
            rest = behind;
        }
        Ok(count)
    }

    /// Takes what a frame of zeros has: pages that are zeros already stay untouched.
    ///
    /// # Errors
    ///
    /// As [`Self::take_pages`].
    pub fn take_zeros(&self, body: &[u8]) -> Result<u64, PagesError> {
        let [a, b] = body.as_chunks::<8>().0 else {
            return Err(PagesError::Partial);
        };
        let (first, count) = (u64::from_le_bytes(*a), u64::from_le_bytes(*b));
        let mut page = [0; PAGE_BYTES];
        for (start, pages) in self.parts(first, count)? {
            for number in 0..pages {
                let address = GuestAddress(start.0 + number * PAGE_BYTES as u64);
                let outside = |_| PagesError::Outside { first, count };
                self.memory.read_slice(&mut page, address).map_err(outside)?;
                if page != [0; PAGE_BYTES] {
                    self.memory
                        .write_slice(&[0; PAGE_BYTES], address)
                        .map_err(outside)?;
                }
            }
        }
        Ok(count)
    }

    /// Where `count` pages from `first` on lie: one part for each region.
    fn parts(&self, first: u64, count: u64) -> Result<Vec<(GuestAddress, u64)>, PagesError> {
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
            parts.push((start, pages));
            at += pages;
        }
        Ok(parts)
    }
}

/// Sends pages by rounds.
#[derive(Debug, Default)]
pub struct Sender {
    buffer: Vec<u8>,
}

impl Sender {
    /// Sends the pages of `set` as they are now, and says how many they were.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub fn send<S: Read + Write>(
        &mut self,
        wire: &mut Wire<S>,
        memory: &GuestMemoryMmap,
        set: &PageSet,
        mut sent: impl FnMut(u64) -> Result<(), WireError>,
    ) -> Result<u64, WireError> {
        let ordered = Ordered::new(memory);
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
                send_run(wire, first, &self.buffer)?;
                total += count;
                first += count;
                sent(count)?;
            }
        }
        Ok(total)
    }
}

/// Sends pages that lie one behind the other, those of zeros by their number alone.
fn send_run<S: Read + Write>(wire: &mut Wire<S>, first: u64, bytes: &[u8]) -> Result<(), WireError> {
    let pages = bytes.as_chunks::<PAGE_BYTES>().0;
    let is_zero = |page: &[u8; PAGE_BYTES]| *page == [0; PAGE_BYTES];
    let mut number = first;
    for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let count = run.len() as u64;
        if run.first().is_some_and(is_zero) {
            wire.send(Kind::Zeros, &[&number.to_le_bytes(), &count.to_le_bytes()])?;
        } else {
            wire.send(Kind::Pages, &[&number.to_le_bytes(), run.as_flattened()])?;
        }
        number += count;
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::memory::{Backing, PageSize, allocate};

    fn moved(from: &GuestMemoryMmap, to: &GuestMemoryMmap, set: &PageSet) -> u64 {
        let mut wire = Wire::new(Cursor::new(Vec::new()));
        let sent = Sender::default().send(&mut wire, from, set, |_| Ok(())).unwrap();
        wire.stream().set_position(0);
        let ordered = Ordered::new(to);
        let mut taken = 0;
        while let Ok((kind, body)) = wire.receive() {
            taken += match kind {
                Kind::Pages => ordered.take_pages(body).unwrap(),
                Kind::Zeros => ordered.take_zeros(body).unwrap(),
                other => panic!("{other:?}"),
            };
        }
        assert_eq!(sent, taken);
        sent
    }

    #[test]
    fn memory_arrives_as_it_is_and_zeros_wipe_out_what_was_there() {
        // More than fits below the gap.
        let mib = 3 << 10 | 2;
        let [from, to] = [0, 1].map(|_| allocate(mib, Backing::Anonymous, PageSize::Base).unwrap());
        let (low, high) = (GuestAddress((3 << 30) - 4096), GuestAddress(4 << 30));
        from.write_slice(&[1; 4096], low).unwrap();
        from.write_slice(&[2; 8192], high).unwrap();
        to.write_slice(&[9; 4096], GuestAddress(0x5000)).unwrap();
        let size_bytes = mib << 20;
        let mut set = PageSet::empty(size_bytes);
        set.insert(0, 16);
        set.insert((3 << 18) - 8, (3 << 18) + 8);
        assert_eq!(moved(&from, &to, &set), 32);
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
        let ordered = Ordered::new(&memory);
        let pages = |first: u64, len: usize| [&first.to_le_bytes()[..], &vec![1; len]].concat();
        let zeros = |first: u64, count: u64| [first.to_le_bytes(), count.to_le_bytes()].concat();
        assert!(ordered.take_pages(&pages(255, 4096)).is_ok());
        for body in [
            pages(256, 4096),
            pages(255, 8192),
            pages(u64::MAX, 4096),
            pages(0, 100),
            pages(0, 0),
        ] {
            assert!(ordered.take_pages(&body).is_err());
        }
        assert!(ordered.take_zeros(&zeros(0, 256)).is_ok());
        for body in [
            zeros(1, 256),
            zeros(u64::MAX, u64::MAX),
            zeros(0, u64::MAX),
            vec![0; 15],
        ] {
            assert!(ordered.take_zeros(&body).is_err());
        }
    }
}
