//! The way along one descriptor chain, direct and indirect (virtio 1.2, 2.7.5).

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::memory::Map;
use super::{CHAIN_SEGMENTS_MAX, Chain, ChainFault, FEATURE_INDIRECT_DESC, INDIRECT_DESCRIPTORS_MAX, flag};

pub(super) const DESCRIPTOR_BYTES: u32 = 16;

/// One walk along a chain.
pub(super) struct Walk<'a> {
    map: &'a Map,
    chain: &'a mut Chain,
    features: u64,
    bytes: u64,
}

impl<'a> Walk<'a> {
    /// A walk that appends to `chain`, which is empty and knows its head.
    #[inline]
    pub(super) fn new(map: &'a Map, chain: &'a mut Chain, features: u64) -> Self {
        Self {
            map,
            chain,
            features,
            bytes: 0,
        }
    }

    /// Appends the whole chain: direct descriptors, and at most one indirect table at their end (2.7.5.3.2).
    #[inline]
    pub(super) fn along(mut self, descriptors: &[AtomicU64], size: u16) -> Result<(), ChainFault> {
        let head = self.chain.head;
        // Pieces of no length make no segments, so the descriptors are counted as well.
        let count_max = usize::from(size).min(CHAIN_SEGMENTS_MAX);
        let Some(indirect) = self.table(&Table::Aligned(descriptors), head, count_max)? else {
            return Ok(());
        };
        if self.features & FEATURE_INDIRECT_DESC == 0 || indirect.flags & flag::NEXT != 0 {
            return Err(ChainFault::IndirectNotAllowed);
        }
        let (table, count) = indirect_table(self.map, &indirect)?;
        match self.table(&table, 0, count)? {
            None => Ok(()),
            Some(_) => Err(ChainFault::IndirectNotAllowed),
        }
    }

    /// Appends the chain that starts at `first` in `table`; stops at an indirect descriptor and returns it.
    #[inline]
    fn table(
        &mut self,
        table: &Table<'_>,
        first: u16,
        count_max: usize,
    ) -> Result<Option<Descriptor>, ChainFault> {
        let mut index = first;
        for _ in 0..count_max {
            let descriptor = table.read(index).ok_or(ChainFault::NextOutOfRange(index))?;
            if descriptor.flags & flag::INDIRECT != 0 {
                return Ok(Some(descriptor));
            }
            self.append(&descriptor)?;
            if descriptor.flags & flag::NEXT == 0 {
                return Ok(None);
            }
            index = descriptor.next;
        }
        Err(ChainFault::TooLong)
    }

    #[inline]
    fn append(&mut self, descriptor: &Descriptor) -> Result<(), ChainFault> {
        let Descriptor {
            address,
            len_bytes,
            flags,
            ..
        } = *descriptor;
        self.bytes += u64::from(len_bytes);
        if self.bytes > 1 << 32 {
            return Err(ChainFault::TooLarge);
        }
        let segments = if flags & flag::WRITE != 0 {
            &mut self.chain.writable
        } else if self.chain.writable.is_empty() {
            &mut self.chain.readable
        } else {
            return Err(ChainFault::ReadableAfterWritable);
        };
        self.map
            .append(address, len_bytes, segments)
            .map_err(ChainFault::NotMemory)?;
        if self.chain.readable.len() + self.chain.writable.len() > CHAIN_SEGMENTS_MAX {
            return Err(ChainFault::TooLong);
        }
        Ok(())
    }
}

fn indirect_table<'a>(map: &'a Map, at: &Descriptor) -> Result<(Table<'a>, usize), ChainFault> {
    let wrong = ChainFault::IndirectTable {
        address: at.address,
        len_bytes: at.len_bytes,
    };
    let count = usize::try_from(at.len_bytes / DESCRIPTOR_BYTES).map_err(|_| wrong)?;
    if count == 0 || count > INDIRECT_DESCRIPTORS_MAX || !at.len_bytes.is_multiple_of(DESCRIPTOR_BYTES) {
        return Err(wrong);
    }
    // The standard asks for no alignment of an indirect table.
    let table = map.cells(at.address, 2 * count).map(Table::Aligned);
    let table = table.or_else(|| map.cells(at.address, 16 * count).map(Table::Unaligned));
    Ok((table.ok_or(wrong)?, count))
}

/// A descriptor, read once (2.7.5).
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    address: u64,
    len_bytes: u32,
    flags: u16,
    next: u16,
}

/// A table of descriptors in guest memory.
enum Table<'a> {
    Aligned(&'a [AtomicU64]),
    Unaligned(&'a [AtomicU8]),
}

impl Table<'_> {
    #[inline]
    fn read(&self, index: u16) -> Option<Descriptor> {
        let index = usize::from(index);
        let (address, rest) = match self {
            Self::Aligned(words) => {
                let [address, rest] = words.get(2 * index..)?.first_chunk()?;
                (address.load(Ordering::Relaxed), rest.load(Ordering::Relaxed))
            }
            Self::Unaligned(bytes) => {
                let bytes: &[AtomicU8; 16] = bytes.get(16 * index..)?.first_chunk()?;
                let bytes = bytes.each_ref().map(|byte| byte.load(Ordering::Relaxed));
                let whole = u128::from_ne_bytes(bytes);
                #[expect(clippy::cast_possible_truncation, reason = "the two halves are wanted")]
                let halves = (whole as u64, (whole >> 64) as u64);
                halves
            }
        };
        let rest = u64::from_le(rest);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the fields of one little-endian word"
        )]
        Some(Descriptor {
            address: u64::from_le(address),
            len_bytes: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        })
    }
}
