//! Where the chunks of guest memory lie in this process.

use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::slots;
use super::userfault::HostRange;
use crate::snapshot::memory::CHUNK_BYTES;

/// The mappings of a guest's memory, in the order of its addresses.
#[derive(Clone, Debug)]
pub(super) struct Places {
    mappings: Vec<Mapping>,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    range: HostRange,
    guest: GuestAddress,
    /// The number of its first chunk.
    first: usize,
}

impl Places {
    /// Of `memory`, each region of which is whole chunks long.
    pub(super) fn of(memory: &GuestMemoryMmap) -> Self {
        let mut first = 0;
        let mappings = slots(memory).map(|slot| {
            let range = HostRange {
                start: slot.host_address,
                len_bytes: slot.size_bytes,
            };
            let mapping = Mapping {
                range,
                guest: slot.guest_address,
                first,
            };
            first += chunks(slot.size_bytes);
            mapping
        });
        Self {
            mappings: mappings.collect(),
        }
    }

    /// Each mapping as a whole.
    pub(super) fn ranges(&self) -> impl Iterator<Item = HostRange> {
        self.mappings.iter().map(|mapping| mapping.range)
    }

    /// The chunk that has `address`.
    pub(super) fn chunk_at(&self, address: u64) -> Option<usize> {
        self.mappings.iter().find_map(|mapping| {
            let offset_bytes = address.checked_sub(mapping.range.start)?;
            (offset_bytes < mapping.range.len_bytes).then(|| mapping.first + chunks(offset_bytes))
        })
    }

    /// Where `chunk` begins.
    pub(super) fn address_of(&self, chunk: usize) -> u64 {
        let (mapping, offset_bytes) = self.mapping_of(chunk);
        mapping.range.start + offset_bytes
    }

    /// The chunks that `len_bytes` of guest memory at `start` lie in; empty if they are not all within one mapping.
    pub(super) fn chunks_of(&self, start: GuestAddress, len_bytes: u64) -> Range<usize> {
        let found = self.mappings.iter().find_map(|mapping| {
            let from = start.0.checked_sub(mapping.guest.0)?;
            let end = from.checked_add(len_bytes)?;
            let is_within = len_bytes > 0 && end <= mapping.range.len_bytes;
            is_within.then(|| mapping.first + chunks(from)..mapping.first + chunks(end - 1) + 1)
        });
        found.unwrap_or(0..0)
    }

    fn mapping_of(&self, chunk: usize) -> (&Mapping, u64) {
        let mapping = self.mappings.iter().rfind(|mapping| mapping.first <= chunk);
        let mapping = mapping.expect("a guest has memory, and its first chunk is number 0");
        (mapping, ((chunk - mapping.first) * CHUNK_BYTES) as u64)
    }
}

/// How many whole chunks `bytes` have.
fn chunks(bytes: u64) -> usize {
    usize::try_from(bytes / CHUNK_BYTES as u64).expect("this is a 64-bit monitor")
}
