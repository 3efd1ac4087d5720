//! The memory map that a guest gets, in e820 terms: as few entries as tell the truth, for a
//! kernel's early boot walks them often.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch::x86_64::layout;

/// e820 and PVH types agree on these numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// One range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) size_bytes: u64,
    pub(super) kind: Kind,
}

/// Base memory, the tables up to 1 MiB, and the rest of each region, in order.
pub(super) fn ranges(memory: &GuestMemoryMmap) -> Vec<Range> {
    let (tables, high) = (layout::MP_TABLE.0, layout::HIGH_LOAD_START.0);
    let mut ranges = vec![
        Range {
            start: 0,
            size_bytes: tables,
            kind: Kind::Ram,
        },
        Range {
            start: tables,
            size_bytes: high - tables,
            kind: Kind::Reserved,
        },
    ];
    for region in memory.iter() {
        let GuestAddress(start) = region.start_addr().max(layout::HIGH_LOAD_START);
        let end = region.start_addr().0 + region.len();
        if end > start {
            ranges.push(Range {
                start,
                size_bytes: end - start,
                kind: Kind::Ram,
            });
        }
    }
    ranges
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;
    use crate::memory::{Backing, PageSize, allocate};

    #[test]
    fn the_map_leaves_out_the_tables_and_the_device_gap() {
        let memory = allocate(4096, Backing::Anonymous, PageSize::Base).unwrap();
        let map: Vec<_> = ranges(&memory)
            .iter()
            .map(|r| (r.start, r.size_bytes, r.kind))
            .collect();
        let expected = [
            (0, 0x9_fc00, Kind::Ram),
            (0x9_fc00, 0x6_0400, Kind::Reserved),
            (0x10_0000, 0xbff0_0000, Kind::Ram),
            (0x1_0000_0000, 0x4000_0000, Kind::Ram),
        ];
        assert_eq!(map, expected);
    }
}
