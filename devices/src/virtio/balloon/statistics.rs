//! What a guest says of its memory (virtio 1.2, 5.5.6.3).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `struct virtio_balloon_stat`: a tag and a value.
pub(super) const ENTRY_BYTES: usize = 10;
/// How many entries are looked at in one buffer: more than there are tags.
pub(super) const ENTRIES_MAX: usize = 64;

/// How large the balloon is, and what the guest said last of its memory. All but the targets is what the guest says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BalloonStatistics {
    /// How large the balloon is to be, in pages of 4 KiB.
    pub target_pages: u32,
    /// How large it is.
    pub actual_pages: u32,
    /// The same in MiB.
    pub target_mib: u32,
    /// The same in MiB.
    pub actual_mib: u32,
    /// Bytes that were swapped in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Bytes that were swapped out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Page faults that needed a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Bytes that nobody uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// All bytes that there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Bytes that programs can have without swapping, by an estimate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Bytes of files that can be dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Huge pages that were given out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that were not to be had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    /// Times that a program was ended for want of memory. (Linux 6.12, like what follows.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    /// Times that somebody had to wait for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    /// Pages that were looked at in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    /// Pages that were looked at by who needed memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    /// Pages that were reclaimed in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    /// Pages that were reclaimed by who needed memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

impl BalloonStatistics {
    /// Takes what the guest has put into a buffer; what it leaves out stays. Returns how many entries mean nothing here.
    pub(super) fn take(&mut self, buffer: &[u8]) -> usize {
        let (entries, rest) = buffer.as_chunks::<ENTRY_BYTES>();
        let mut unknown = usize::from(!rest.is_empty());
        for [tag @ .., a, b, c, d, e, f, g, h] in entries.iter().take(ENTRIES_MAX) {
            let value = u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
            match self.place(u16::from_le_bytes(*tag)) {
                Some(place) => *place = Some(value),
                None => unknown += 1,
            }
        }
        unknown
    }

    /// Where the value of a tag belongs.
    fn place(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_memory,
            5 => &mut self.total_memory,
            6 => &mut self.available_memory,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            10 => &mut self.oom_kill,
            11 => &mut self.alloc_stall,
            12 => &mut self.async_scan,
            13 => &mut self.direct_scan,
            14 => &mut self.async_reclaim,
            15 => &mut self.direct_reclaim,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_leaves_out_stays_and_what_means_nothing_is_counted() {
        let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let mut statistics = BalloonStatistics::default();
        let unknown = statistics.take(&[entry(4, 700), entry(15, u64::MAX), entry(16, 1)].concat());
        assert_eq!(unknown, 1);
        assert_eq!(statistics.free_memory, Some(700));
        assert_eq!(statistics.direct_reclaim, Some(u64::MAX));
        assert_eq!(statistics.take(&[&entry(4, 800)[..], &[0; 9]].concat()), 1);
        assert_eq!(statistics.free_memory, Some(800));
        assert_eq!(statistics.direct_reclaim, Some(u64::MAX));
        assert_eq!(statistics.swap_in, None);
    }
}
