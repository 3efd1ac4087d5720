//! Guest memory: mapped at start, resident only where the guest has touched it.
//!
//! ```text
//!  0 ┌──────────────┐
//!    │ low memory   │ at most 3 GiB
//! 3G ├──────────────┤
//!    │ devices      │ no memory here: virtio-mmio, IOAPIC, LAPIC, TSS
//! 4G ├──────────────┤
//!    │ high memory  │ the rest
//!    ├──────────────┤
//!    │              │ up to the next multiple of 2 GiB
//!    ├──────────────┤
//!    │ region       │ for memory that comes while the guest runs, if any may (virtio-mem)
//!    └──────────────┘
//! ```
#![expect(
    unsafe_code,
    reason = "advice about a mapping can have effects, so it has no safe wrapper"
)]

mod chunk;
mod eager;
pub mod external;
pub mod layout;
pub mod mapped;
pub mod pager;
mod places;
mod reading;
pub mod reclaim;
pub mod restore;
#[cfg(test)]
pub(crate) mod testing;
pub mod userfault;
mod working_set;

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

use crate::arch::x86_64::layout::{HIGH_MEMORY_START, MMIO_GAP_START};

pub use eager::LoadError;
pub use layout::{HotplugRegion, Layout};
pub use pager::Pager;
pub use reading::ChunkError;
pub use restore::restore;

/// The most memory that a guest can be given, 1 TiB: what Firecracker gives, and far below the
/// end of a server processor's physical addresses.
pub const MEMORY_MIB_MAX: u64 = 1 << 20;

const MIB: u64 = 1 << 20;
const HUGE_PAGE_MIB: u64 = 2;

/// What the bytes of guest memory are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private to the process.
    Anonymous,
    /// A sealed memfd, which other processes can be given.
    Shared,
}

/// The page size of the host's mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// The host's base pages (transparent huge pages as the host is set).
    Base,
    /// Transparent huge pages, where the host has them at hand when a page is first touched.
    Transparent,
    /// hugetlbfs pages of 2 MiB, reserved when the memory is made.
    Huge2Mib,
}

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum MemoryError {
    #[error("a guest cannot have {mib} MiB of memory: give it 1 to {MEMORY_MIB_MAX}")]
    Size { mib: u64 },
    #[error("{mib} MiB of memory is not a whole number of 2 MiB huge pages")]
    HugeSize { mib: u64 },
    #[error(
        "the host has no {needed} free huge pages of 2 MiB for {mib} MiB of guest memory: \
         raise `vm.nr_hugepages` (free now: /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages) \
         or set `huge_pages` to `None`"
    )]
    HugePages {
        mib: u64,
        needed: u64,
        #[source]
        source: io::Error,
    },
    #[error(
        "the host's kernel has no transparent huge pages: set `huge_pages` to `None`, or boot the host \
         with a kernel that has CONFIG_TRANSPARENT_HUGEPAGE"
    )]
    TransparentHugePages(#[source] io::Error),
    #[error("cannot make a memfd of {mib} MiB for guest memory")]
    Memfd {
        mib: u64,
        #[source]
        source: io::Error,
    },
    #[error(
        "cannot map {mib} MiB of guest memory: look at the limit on address space (`ulimit -v`) \
         and at `vm.overcommit_memory`"
    )]
    Map {
        mib: u64,
        #[source]
        source: MmapRegionError,
    },
    #[error("cannot lay out {mib} MiB of guest memory")]
    Layout {
        mib: u64,
        #[source]
        source: GuestRegionCollectionError,
    },
}

/// Maps guest memory as `layout` has it, or so many MiB of it; no page of it is resident until somebody touches it.
pub fn allocate(
    layout: impl Into<Layout>,
    backing: Backing,
    pages: PageSize,
) -> Result<Arc<GuestMemoryMmap>, MemoryError> {
    let layout = layout.into();
    let mib = layout.boot_mib;
    if mib == 0 || mib > MEMORY_MIB_MAX {
        return Err(MemoryError::Size { mib });
    }
    let mib = layout.size_bytes() / MIB;
    if pages == PageSize::Huge2Mib && !mib.is_multiple_of(HUGE_PAGE_MIB) {
        return Err(MemoryError::HugeSize { mib });
    }
    let file = match backing {
        Backing::Anonymous => None,
        Backing::Shared => Some(Arc::new(memfd(mib, pages)?)),
    };
    let mut offset_bytes = 0;
    let mut regions = Vec::new();
    for (start, size_bytes) in layout.ranges() {
        let file_offset = file
            .as_ref()
            .map(|file| FileOffset::from_arc(Arc::clone(file), offset_bytes));
        let region = map(file_offset, size_bytes, pages).map_err(|source| map_error(mib, pages, source))?;
        if pages == PageSize::Transparent {
            advise_huge_pages(&region).map_err(MemoryError::TransparentHugePages)?;
        }
        let region = GuestRegionMmap::new(region, start).expect("ranges() end below 2^64");
        regions.push(region);
        offset_bytes += size_bytes;
    }
    let memory =
        GuestMemoryMmap::from_regions(regions).map_err(|source| MemoryError::Layout { mib, source })?;
    Ok(Arc::new(memory))
}

/// Maps `file` as memory of that `layout`, so that what is written stays in this process. The file must not get shorter while the
/// memory lives.
fn map_copy_on_write(
    file: File,
    layout: Layout,
    pages: PageSize,
) -> Result<Arc<GuestMemoryMmap>, MemoryError> {
    let mib = layout.size_bytes() / MIB;
    let file = Arc::new(file);
    let mut offset_bytes = 0;
    let mut regions = Vec::new();
    for (start, size_bytes) in layout.ranges() {
        let place = FileOffset::from_arc(Arc::clone(&file), offset_bytes);
        let size = usize::try_from(size_bytes).expect("a 64-bit host");
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let region = MmapRegion::build(Some(place), size, libc::PROT_READ | libc::PROT_WRITE, flags)
            .map_err(|source| MemoryError::Map { mib, source })?;
        if pages == PageSize::Transparent {
            advise_huge_pages(&region).map_err(MemoryError::TransparentHugePages)?;
        }
        regions.push(GuestRegionMmap::new(region, start).expect("ranges() end below 2^64"));
        offset_bytes += size_bytes;
    }
    let memory =
        GuestMemoryMmap::from_regions(regions).map_err(|source| MemoryError::Layout { mib, source })?;
    Ok(Arc::new(memory))
}

/// The guest-physical ranges of `size_bytes` of memory, below and above the gap for devices.
pub fn ranges(size_bytes: u64) -> impl Iterator<Item = (GuestAddress, u64)> {
    let low_bytes = size_bytes.min(MMIO_GAP_START.0);
    [
        (GuestAddress(0), low_bytes),
        (HIGH_MEMORY_START, size_bytes - low_bytes),
    ]
    .into_iter()
    .filter(|(_, bytes)| *bytes > 0)
}

/// The end of the memory below the device gap: kernel, initrd and boot tables must lie under it.
pub fn low_memory_end(memory: &GuestMemoryMmap) -> GuestAddress {
    let low = memory.find_region(GuestAddress(0));
    GuestAddress(low.map_or(0, GuestMemoryRegion::len))
}

/// One mapping of guest memory: which host bytes the guest sees where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its number, from 0: of memory that the guest boots with also that of KVM's slot.
    pub index: u32,
    /// Where the guest sees it.
    pub guest_address: GuestAddress,
    /// Its length.
    pub size_bytes: u64,
    /// Where this process sees it; valid as long as the memory it was taken from lives.
    pub host_address: u64,
}

/// The mappings of `memory`, in the order of their addresses.
pub fn slots(memory: &GuestMemoryMmap) -> impl Iterator<Item = Slot> {
    (0u32..).zip(memory.iter()).map(|(index, region)| Slot {
        index,
        guest_address: region.start_addr(),
        size_bytes: region.len(),
        host_address: region.as_ptr() as u64,
    })
}

fn memfd(mib: u64, pages: PageSize) -> Result<File, MemoryError> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if pages == PageSize::Huge2Mib {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let sealed = || -> rustix::io::Result<File> {
        let file = memfd_create("guest-memory", flags)?;
        ftruncate(&file, mib * MIB)?;
        // A holder of the descriptor who could shrink it would turn our accesses into SIGBUS.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(File::from(file))
    };
    sealed().map_err(|errno| MemoryError::Memfd {
        mib,
        source: errno.into(),
    })
}

fn map(file: Option<FileOffset>, size_bytes: u64, pages: PageSize) -> Result<MmapRegion, MmapRegionError> {
    let mut flags = if file.is_some() {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
    };
    flags |= match pages {
        // Overcommit is the host's policy: a guest's memory is charged as it is touched.
        PageSize::Base | PageSize::Transparent => libc::MAP_NORESERVE,
        // Huge pages are reserved at once, so that a lack of them is an error here and not a
        // SIGBUS under the running guest.
        PageSize::Huge2Mib if file.is_some() => 0,
        PageSize::Huge2Mib => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
    };
    let size = usize::try_from(size_bytes).expect("a 64-bit host");
    let mut region = MmapRegion::build(file, size, libc::PROT_READ | libc::PROT_WRITE, flags)?;
    region.set_hugetlbfs(pages == PageSize::Huge2Mib);
    Ok(region)
}

/// Has pages there at once that are about to be written, `len_bytes` from `start` on, instead of one by one when they are. Where
/// the host does not do that, nothing happens.
pub fn make_resident(memory: &GuestMemoryMmap, start: GuestAddress, len_bytes: usize) {
    let Ok(slice) = memory.get_slice(start, len_bytes) else {
        return;
    };
    // SAFETY: the range is one of a mapping of `memory`, and being there changes nothing of what is in it.
    let outcome = unsafe {
        madvise(
            slice.ptr_guard_mut().as_ptr().cast(),
            len_bytes,
            Advice::LinuxPopulateWrite,
        )
    };
    if let Err(error) = outcome {
        log::debug!("{len_bytes} bytes of guest memory are made resident one by one: {error}");
    }
}

/// Forgets what is in a range of anonymous memory, whole pages of one region: whoever touches it finds zeros, or waits where the
/// memory is guarded.
///
/// # Errors
///
/// What the host answers; then the bytes may be there as before.
pub fn discard(memory: &GuestMemoryMmap, start: GuestAddress, len_bytes: usize) -> io::Result<()> {
    let slice = memory.get_slice(start, len_bytes).map_err(io::Error::other)?;
    // SAFETY: the range is one of a mapping of `memory`, of which nobody holds references: guest memory is reached by volatile
    // accesses only, and whoever reaches it afterwards finds zeros.
    unsafe {
        madvise(
            slice.ptr_guard_mut().as_ptr().cast(),
            len_bytes,
            Advice::LinuxDontNeed,
        )
    }?;
    Ok(())
}

/// Whether the host follows is its own affair: see /sys/kernel/mm/transparent_hugepage.
fn advise_huge_pages(region: &MmapRegion) -> io::Result<()> {
    // SAFETY: the range is the whole mapping of `region`, which lives; the advice changes no byte of it.
    unsafe { madvise(region.as_ptr().cast(), region.size(), Advice::LinuxHugepage) }?;
    Ok(())
}

fn map_error(mib: u64, pages: PageSize, source: MmapRegionError) -> MemoryError {
    match source {
        MmapRegionError::Mmap(source)
            if pages == PageSize::Huge2Mib && source.raw_os_error() == Some(libc::ENOMEM) =>
        {
            MemoryError::HugePages {
                mib,
                needed: mib.div_ceil(HUGE_PAGE_MIB),
                source,
            }
        }
        source => MemoryError::Map { mib, source },
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;

    /// Counts the pages of `slot` that have a page frame, by the kernel's own page map.
    fn resident_pages(slot: &Slot) -> usize {
        const PRESENT: u64 = 1 << 63;
        let pages = usize::try_from(slot.size_bytes / 4096).unwrap();
        let mut entries = vec![0; pages * 8];
        let map = File::open("/proc/self/pagemap").unwrap();
        map.read_exact_at(&mut entries, slot.host_address / 4096 * 8)
            .unwrap();
        let entries = entries
            .as_chunks()
            .0
            .iter()
            .map(|entry| u64::from_le_bytes(*entry));
        entries.filter(|entry| entry & PRESENT != 0).count()
    }

    #[test]
    fn memory_below_three_gib_is_one_region() {
        let ranges: Vec<_> = ranges(128 * MIB).collect();
        assert_eq!(ranges, [(GuestAddress(0), 128 * MIB)]);
    }

    #[test]
    fn memory_skips_the_device_gap() {
        let exactly: Vec<_> = ranges(3 << 30).collect();
        assert_eq!(exactly, [(GuestAddress(0), 3 << 30)]);
        let above: Vec<_> = ranges((3 << 30) + MIB).collect();
        assert_eq!(above, [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), MIB)]);
    }

    #[test]
    fn memory_is_not_resident_before_it_is_touched() {
        for backing in [Backing::Anonymous, Backing::Shared] {
            let memory = allocate(64, backing, PageSize::Base).unwrap();
            let slot = slots(&memory).next().unwrap();
            assert_eq!(resident_pages(&slot), 0, "{backing:?}");
            memory.write_obj(1u8, GuestAddress(5 * MIB)).unwrap();
            // One base page, or one transparent huge page.
            let resident = resident_pages(&slot);
            assert!((1..=512).contains(&resident), "{backing:?}: {resident} pages");
        }
    }

    #[test]
    fn slots_cover_all_memory_in_order() {
        let memory = allocate(5 << 10, Backing::Shared, PageSize::Base).unwrap();
        let slots: Vec<_> = slots(&memory).collect();
        let guest: Vec<_> = slots
            .iter()
            .map(|slot| (slot.index, slot.guest_address.0, slot.size_bytes))
            .collect();
        assert_eq!(guest, [(0, 0, 3 << 30), (1, 4 << 30, 2 << 30)]);
        let second = memory.find_region(GuestAddress(4 << 30)).unwrap();
        assert_eq!(second.file_offset().unwrap().start(), 3 << 30);
    }

    #[test]
    fn shared_memory_cannot_be_shrunk_under_the_guest() {
        let memory = allocate(2, Backing::Shared, PageSize::Base).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(4096).is_err());
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for mib in [0, MEMORY_MIB_MAX + 1, u64::MAX] {
            let refused = allocate(mib, Backing::Anonymous, PageSize::Base);
            assert!(matches!(refused, Err(MemoryError::Size { .. })), "{mib}");
        }
        let odd = allocate(3, Backing::Anonymous, PageSize::Huge2Mib);
        assert!(matches!(odd, Err(MemoryError::HugeSize { mib: 3 })));
    }

    #[test]
    fn transparent_huge_pages_are_asked_for_by_the_whole_mapping() {
        // The kernel lists each mapping with its flags; `hg` is the advice. Neighbours may be one mapping.
        let is_advised = |slot: &Slot| {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let holds = |line: &str| {
                let (from, to) = line.split(' ').next()?.split_once('-')?;
                let number = |digits| u64::from_str_radix(digits, 16).ok();
                Some((number(from)?..number(to)?).contains(&slot.host_address))
            };
            let mut mapping = maps.lines().skip_while(|line| holds(line) != Some(true));
            let flags = mapping.find(|line| line.starts_with("VmFlags:")).unwrap();
            flags.split_whitespace().any(|flag| flag == "hg")
        };
        for backing in [Backing::Anonymous, Backing::Shared] {
            for (pages, expected) in [(PageSize::Transparent, true), (PageSize::Base, false)] {
                let memory = allocate(4 << 10, backing, pages).unwrap();
                for slot in slots(&memory) {
                    assert_eq!(is_advised(&slot), expected, "{backing:?} {pages:?} {slot:?}");
                    assert_eq!(resident_pages(&slot), 0, "{backing:?} {pages:?} {slot:?}");
                }
            }
        }
    }

    #[test]
    fn a_lack_of_huge_pages_says_what_to_raise() {
        // More than any test machine has set aside; reservation fails before a page is touched.
        for backing in [Backing::Anonymous, Backing::Shared] {
            let error = allocate(MEMORY_MIB_MAX, backing, PageSize::Huge2Mib).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains("nr_hugepages") && text.contains("524288"),
                "{backing:?}: {text}"
            );
        }
    }
}
