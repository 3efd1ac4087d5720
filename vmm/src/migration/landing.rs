//! Guest memory that has come: pages into the memory of a guest that does not run yet.

use std::io::{BufRead, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Address, Bytes, GuestMemoryMmap};

use super::compress::unpack;
use super::pages::{NUMBER_BYTES, Ordered, PagesError, Part};
use super::wire::{PAGES_BYTES_MAX, Wire, WireError};
use crate::memory::make_resident;
use crate::snapshot::memory::PAGE_BYTES;

/// A memory into which pages come. It begins with zeros.
#[derive(Debug)]
pub struct Landing {
    ordered: Ordered,
    written: Written,
}

/// The pages that may be something else than zeros by now, as several streams see them. What one has written in a round another
/// may be told to wipe in a later one only: the source waits in between until it has heard that all is taken in, so no order
/// is needed here.
#[derive(Debug)]
struct Written(Vec<AtomicU64>);

impl Written {
    fn none(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).expect("this is a 64-bit monitor");
        Self(std::iter::repeat_with(AtomicU64::default).take(words).collect())
    }

    /// Where the bit of a page is.
    fn bit(&self, page: u64) -> Option<(&AtomicU64, u64)> {
        let word = usize::try_from(page / 64).ok()?;
        Some((self.0.get(word)?, 1 << (page % 64)))
    }

    fn contains(&self, page: u64) -> bool {
        self.bit(page)
            .is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    fn insert(&self, pages: Range<u64>) {
        for (word, bit) in pages.filter_map(|page| self.bit(page)) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }
}

impl Landing {
    /// That of `memory`, which nobody has touched.
    pub fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        let ordered = Ordered::new(memory);
        Self {
            written: Written::none(ordered.count()),
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
    pub fn take_pages<S, E>(&self, wire: &mut Wire<S>, body_bytes: usize) -> Result<u64, E>
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
        self.prepare(first, count, &parts);
        for part in parts {
            let (mut at, memory) = (part.start, self.ordered.memory());
            let len_bytes = len_bytes_of(part);
            wire.receive_pieces(len_bytes, |piece| {
                memory
                    .write_slice(piece, at)
                    .expect("a part lies within the memory");
                at = at.unchecked_add(piece.len() as u64);
            })?;
        }
        Ok(count)
    }

    /// These pages are about to be written.
    fn prepare(&self, first: u64, count: u64, parts: &[Part]) {
        let is_new = !self.written.contains(first);
        self.written.insert(first..first + count);
        for part in parts.iter().filter(|_| is_new) {
            make_resident(self.ordered.memory(), part.start, len_bytes_of(*part));
        }
    }

    /// Takes the body of a frame of packed pages by way of `unpacked`, which is as large as a message afterwards. Says how many
    /// they were.
    ///
    /// # Errors
    ///
    /// As [`Self::take_pages`], and when they are more or less than is said.
    pub fn take_packed<S, E>(
        &self,
        wire: &mut Wire<S>,
        body_bytes: usize,
        unpacked: &mut Vec<u8>,
    ) -> Result<u64, E>
    where
        S: BufRead + Write,
        E: From<WireError> + From<PagesError>,
    {
        let len_bytes = body_bytes
            .checked_sub(2 * NUMBER_BYTES)
            .ok_or(PagesError::Partial)?;
        let first = u64::from_le_bytes(wire.receive_array()?);
        let count = u64::from_le_bytes(wire.receive_array()?);
        // All of this before a byte is unpacked.
        let most = PAGES_BYTES_MAX / PAGE_BYTES;
        let pages = usize::try_from(count)
            .ok()
            .filter(|count| (1..=most).contains(count))
            .ok_or(PagesError::Count(count))?;
        let parts = self.ordered.parts(first, count)?;
        unpacked.resize(PAGES_BYTES_MAX, 0);
        let bytes = unpacked
            .get_mut(..pages * PAGE_BYTES)
            .expect("a message has no more");
        unpack(wire.receive_body(len_bytes)?, bytes).map_err(PagesError::from)?;
        self.prepare(first, count, &parts);
        let mut rest: &[u8] = bytes;
        for part in parts {
            let (piece, behind) = rest.split_at(len_bytes_of(part));
            let written = self.ordered.memory().write_slice(piece, part.start);
            written.expect("a part lies within the memory");
            rest = behind;
        }
        Ok(count)
    }

    /// Takes the body of a frame of zeros: pages that are zeros already stay untouched. Says how many they were.
    ///
    /// # Errors
    ///
    /// As [`Self::take_pages`].
    pub fn take_zeros<S, E>(&self, wire: &mut Wire<S>, body_bytes: usize) -> Result<u64, E>
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
                let wiped = self.ordered.memory().write_slice(&[0; PAGE_BYTES], address);
                wiped.expect("a part lies within the memory");
            }
        }
        Ok(count)
    }
}

fn len_bytes_of(part: Part) -> usize {
    usize::try_from(part.pages).expect("a message is short") * PAGE_BYTES
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::io::Cursor;

    use vm_memory::GuestAddress;

    use super::super::compress::Packer;
    use super::super::wire::Kind;
    use super::*;
    use crate::config::Compression;
    use crate::memory::{Backing, PageSize, allocate};
    use crate::migration::pages::{Pieces, Sender};
    use crate::migration::receive::ReceiveError;
    use crate::snapshot::memory::PageSet;

    fn moved(from: &Arc<GuestMemoryMmap>, landing: &Landing, set: &PageSet, compression: Compression) -> u64 {
        let mut wire = Wire::new(Cursor::new(Vec::new()));
        let sent = Sender::new(compression)
            .send(
                &mut wire,
                &Ordered::new(Arc::clone(from)),
                &Pieces::new(set),
                |_| Ok(()),
            )
            .unwrap();
        wire.stream().set_position(0);
        let mut taken = 0;
        while let Ok((kind, body_bytes)) = wire.receive_head() {
            taken += take(landing, &mut wire, kind, body_bytes).unwrap();
        }
        assert_eq!(sent, taken);
        sent
    }

    fn take(
        landing: &Landing,
        wire: &mut Wire<Cursor<Vec<u8>>>,
        kind: Kind,
        body_bytes: usize,
    ) -> Result<u64, ReceiveError> {
        match kind {
            Kind::Pages => landing.take_pages(wire, body_bytes),
            Kind::Packed => landing.take_packed(wire, body_bytes, &mut Vec::new()),
            Kind::Zeros => landing.take_zeros(wire, body_bytes),
            other => panic!("{other:?}"),
        }
    }

    fn taken(landing: &Landing, kind: Kind, body: &[u8]) -> Result<u64, ReceiveError> {
        take(
            landing,
            &mut Wire::new(Cursor::new(body.to_vec())),
            kind,
            body.len(),
        )
    }

    #[test]
    fn memory_arrives_as_it_is_and_zeros_wipe_out_what_was_there() {
        for compression in [Compression::None, Compression::Lz4, Compression::Auto] {
            arrives(compression);
        }
    }

    fn arrives(compression: Compression) {
        // More than fits below the gap.
        let mib = 3 << 10 | 2;
        let [from, to] = [0, 1].map(|_| allocate(mib, Backing::Anonymous, PageSize::Base).unwrap());
        let (low, high) = (GuestAddress((3 << 30) - 4096), GuestAddress(4 << 30));
        from.write_slice(&[1; 4096], low).unwrap();
        from.write_slice(&[2; 8192], high).unwrap();
        let size_bytes = mib << 20;
        let landing = Landing::new(Arc::clone(&to));
        let mut set = PageSet::empty(size_bytes);
        set.insert(0, 16);
        from.write_slice(&[9; 4096], GuestAddress(0x5000)).unwrap();
        assert_eq!(moved(&from, &landing, &set, compression), 16);
        from.write_slice(&[0; 4096], GuestAddress(0x5000)).unwrap();
        set.insert((3 << 18) - 8, (3 << 18) + 8);
        assert_eq!(moved(&from, &landing, &set, compression), 32);
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
        let landing = Landing::new(memory);
        let pages = |first: u64, len: usize| [&first.to_le_bytes()[..], &vec![1; len]].concat();
        let zeros = |first: u64, count: u64| [first.to_le_bytes(), count.to_le_bytes()].concat();
        assert!(taken(&landing, Kind::Pages, &pages(255, 4096)).is_ok());
        for body in [
            pages(256, 4096),
            pages(255, 8192),
            pages(u64::MAX, 4096),
            pages(0, 100),
            pages(0, 0),
        ] {
            assert!(matches!(
                taken(&landing, Kind::Pages, &body),
                Err(ReceiveError::Pages(_))
            ));
        }
        assert!(taken(&landing, Kind::Zeros, &zeros(0, 256)).is_ok());
        for body in [
            zeros(1, 256),
            zeros(u64::MAX, u64::MAX),
            zeros(0, u64::MAX),
            vec![0; 15],
        ] {
            assert!(matches!(
                taken(&landing, Kind::Zeros, &body),
                Err(ReceiveError::Pages(_))
            ));
        }
    }

    #[test]
    fn packed_pages_are_as_many_as_is_said_and_lie_within_the_memory() {
        let memory = allocate(1, Backing::Anonymous, PageSize::Base).unwrap();
        let landing = Landing::new(Arc::clone(&memory));
        let packed = |pages: usize| {
            let mut packer = Packer::new(Compression::Lz4);
            packer.pack(&vec![1; pages * PAGE_BYTES]).unwrap().to_vec()
        };
        let body = |first: u64, count: u64, packed: Vec<u8>| {
            [&first.to_le_bytes()[..], &count.to_le_bytes(), &packed].concat()
        };
        let most = PAGES_BYTES_MAX / PAGE_BYTES;
        assert_eq!(
            taken(&landing, Kind::Packed, &body(254, 2, packed(2))).unwrap(),
            2
        );
        assert_eq!(
            taken(&landing, Kind::Packed, &body(0, 64, packed(most))).unwrap(),
            64
        );
        let mut bytes = [0; PAGE_BYTES];
        memory.read_slice(&mut bytes, GuestAddress(255 << 12)).unwrap();
        assert_eq!(bytes, [1; PAGE_BYTES]);
        for body in [
            body(255, 2, packed(2)),
            body(u64::MAX, 1, packed(1)),
            body(0, 0, Vec::new()),
            body(0, 65, packed(65)),
            body(0, u64::MAX, packed(1)),
            // More than is said, and less.
            body(0, 1, packed(1000)),
            body(0, 2, packed(1)),
            body(0, 1, Vec::new()),
            vec![0; 15],
        ] {
            assert!(matches!(
                taken(&landing, Kind::Packed, &body),
                Err(ReceiveError::Pages(_))
            ));
        }
    }
}
