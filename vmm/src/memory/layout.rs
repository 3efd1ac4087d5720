//! Where a guest has its memory, and may have more.

use std::sync::Arc;

use coracle_devices::virtio::mem::{Blocks, Geometry, MemoryHotplugConfig};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{MIB, ranges};
use crate::arch::x86_64::layout::HIGH_MEMORY_START;

/// The memory that a guest boots with, and that which may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(super) boot_mib: u64,
    pub(super) hotplug: Option<HotplugRegion>,
}

/// The region for memory that comes while the guest runs. It is mapped from the beginning, as any memory is, and the guest's
/// processors reach only those slots of it that are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotplugRegion {
    /// Where the guest has it.
    pub start: u64,
    /// Its length, whole slots.
    pub size_bytes: u64,
    /// A block, of which whole ones come and go; a power of two.
    pub block_bytes: u64,
    /// A slot of KVM; whole blocks.
    pub slot_bytes: u64,
}

/// Where the region begins at the earliest multiple of: a memory block of Linux on a large machine, so that none of it is wasted.
const ALIGNMENT: u64 = 2 << 30;

impl Layout {
    /// That of a machine with `boot_mib` MiB, to which `hotplug` may come.
    pub fn new(boot_mib: u64, hotplug: Option<&MemoryHotplugConfig>) -> Self {
        let boot_bytes = boot_mib.saturating_mul(MIB);
        let boot_end = ranges(boot_bytes).last();
        let boot_end = boot_end.map_or(0, |(start, bytes)| start.0.saturating_add(bytes));
        let hotplug = hotplug.map(|config| {
            let bytes = |mib: u32| u64::from(mib) * MIB;
            let block_bytes = bytes(config.block_size_mib);
            let start = boot_end.max(HIGH_MEMORY_START.0);
            HotplugRegion {
                start: start.next_multiple_of(ALIGNMENT.max(block_bytes)),
                size_bytes: bytes(config.total_size_mib),
                block_bytes,
                slot_bytes: bytes(config.slot_size_mib),
            }
        });
        Self { boot_mib, hotplug }
    }

    /// The region for memory that comes.
    pub fn hotplug(&self) -> Option<HotplugRegion> {
        self.hotplug
    }

    /// All of the memory, whether the guest has it or not.
    pub fn size_bytes(&self) -> u64 {
        let hotplug = self.hotplug.map_or(0, |hotplug| hotplug.size_bytes);
        self.boot_mib.saturating_mul(MIB).saturating_add(hotplug)
    }

    /// The guest-physical ranges of it, from the lowest up.
    pub fn ranges(&self) -> impl Iterator<Item = (GuestAddress, u64)> {
        let hotplug = self.hotplug.iter();
        let hotplug = hotplug.map(|hotplug| (GuestAddress(hotplug.start), hotplug.size_bytes));
        ranges(self.boot_mib.saturating_mul(MIB)).chain(hotplug.collect::<Vec<_>>())
    }
}

/// Memory to which nothing comes, in MiB.
impl From<u64> for Layout {
    fn from(boot_mib: u64) -> Self {
        Self::new(boot_mib, None)
    }
}

impl HotplugRegion {
    /// How the device divides it; nothing is plugged.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            blocks: Arc::new(Blocks::new(self.start, self.size_bytes, self.block_bytes)),
            slot_bytes: self.slot_bytes,
        }
    }
}

/// What a guest boots with of `memory`: all but the region of `hotplug`.
pub fn at_boot(memory: &GuestMemoryMmap, hotplug: Option<HotplugRegion>) -> GuestMemoryMmap {
    let Some(hotplug) = hotplug else {
        return memory.clone();
    };
    let (rest, _region) = memory
        .remove_region(GuestAddress(hotplug.start), hotplug.size_bytes)
        .expect("the memory was laid out with that region");
    rest
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use vm_memory::GuestMemoryBackend;

    use super::super::{Backing, PageSize, allocate};
    use super::*;

    fn config(text: &str) -> MemoryHotplugConfig {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_may_come_lies_above_all_other_memory() {
        let hotplug = config(r#"{"total_size_mib": 256}"#);
        let starts = [1, 3 << 10, (3 << 10) + 1, 5 << 10, 9 << 10, 1 << 20]
            .map(|mib| Layout::new(mib, Some(&hotplug)).hotplug().unwrap().start >> 30);
        assert_eq!(starts, [4, 4, 6, 6, 10, 1026]);
        let large = config(r#"{"total_size_mib": 8192, "block_size_mib": 8192, "slot_size_mib": 8192}"#);
        let start = Layout::new(5 << 10, Some(&large)).hotplug().unwrap().start;
        assert_eq!(start, 8 << 30);
    }

    #[test]
    fn the_region_is_mapped_and_is_not_what_a_guest_boots_with() {
        let hotplug = config(r#"{"total_size_mib": 256}"#);
        let layout = Layout::new(8, Some(&hotplug));
        assert_eq!(layout.size_bytes(), 264 << 20);
        let expected = [(GuestAddress(0), 8 << 20), (GuestAddress(4 << 30), 256 << 20)];
        assert_eq!(layout.ranges().collect::<Vec<_>>(), expected);
        for backing in [Backing::Anonymous, Backing::Shared] {
            let memory = allocate(layout, backing, PageSize::Base).unwrap();
            assert_eq!(memory.num_regions(), 2);
            let boot = at_boot(&memory, layout.hotplug());
            assert_eq!(boot.num_regions(), 1);
            assert!(boot.find_region(GuestAddress(4 << 30)).is_none());
        }
        let plain = Layout::from(8);
        let memory = allocate(plain, Backing::Anonymous, PageSize::Base).unwrap();
        assert_eq!(at_boot(&memory, plain.hotplug()).num_regions(), 1);
    }
}
