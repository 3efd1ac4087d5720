//! Files that a guest has in its address space, beside its memory: they are no part of that, and of no snapshot of it.
#![expect(unsafe_code, reason = "maps a file where nothing else is, and unmaps it")]

use std::io;
use std::os::fd::AsFd as _;
use std::ptr;
use std::sync::Arc;

use coracle_devices::virtio::pmem::{Medium, PmemRange, REGION_ALIGNMENT_BYTES};
use coracle_storage::backend::Access;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::Slot;

/// The first of KVM's slots for files; those before are of memory that the guest boots with, and those for memory that comes
/// begin behind all files that a machine has room for.
const SLOT_FIRST: u32 = 16;

/// A file in the address space of this process, where nobody here touches it: a page that the host cannot bring would be a
/// SIGBUS. Behind the end of one that is only read there are zeros.
#[derive(Debug)]
pub struct Mapping {
    /// All that was reserved.
    reserved_address: usize,
    reserved_bytes: usize,
    /// Where the file begins, aligned as the guest sees it: large pages need that.
    host_address: usize,
    range: PmemRange,
    /// Whose lease lasts as long as somebody maps it.
    medium: Arc<Medium>,
}

impl Mapping {
    /// Maps the file of `medium`, of which the guest is shown as much as `range` has.
    ///
    /// # Errors
    ///
    /// What the host answers; it has no address space for it, for instance.
    pub fn new(medium: &Arc<Medium>, range: PmemRange) -> io::Result<Self> {
        let alignment = usize_of(REGION_ALIGNMENT_BYTES)?;
        let size_bytes = usize_of(range.size_bytes)?;
        let reserved_bytes = size_bytes
            .checked_add(alignment)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses where, and nothing is there.
        let reserved = unsafe { mmap_anonymous(ptr::null_mut(), reserved_bytes, ProtFlags::READ, flags) }?;
        let reserved_address = reserved.expose_provenance();
        let mapping = Self {
            reserved_address,
            reserved_bytes,
            host_address: reserved_address.next_multiple_of(alignment),
            range,
            medium: Arc::clone(medium),
        };
        let (protection, file_bytes) = match medium.access() {
            Access::ReadOnly => (ProtFlags::READ, usize_of(medium.size_bytes())?),
            Access::ReadWrite => (ProtFlags::READ | ProtFlags::WRITE, size_bytes),
        };
        let at = ptr::with_exposed_provenance_mut(mapping.host_address);
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: what is replaced is a part of what was reserved just now, which nobody has a reference to.
        unsafe {
            mmap(
                at,
                file_bytes.min(size_bytes),
                protection,
                flags,
                medium.as_fd(),
                0,
            )
        }?;
        Ok(mapping)
    }

    /// What KVM is told of it, as the file number `number`.
    pub fn slot(&self, number: u32) -> Slot {
        Slot {
            index: SLOT_FIRST + number,
            guest_address: vm_memory::GuestAddress(self.range.start),
            size_bytes: self.range.size_bytes,
            host_address: self.host_address as u64,
        }
    }

    /// What the guest may do with it.
    pub fn access(&self) -> Access {
        self.medium.access()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let at = ptr::with_exposed_provenance_mut(self.reserved_address);
        // SAFETY: the range was reserved for this mapping alone, and whoever may look at it keeps that.
        if let Err(error) = unsafe { munmap(at, self.reserved_bytes) } {
            log::error!("a file of the guest stays mapped: {error}");
        }
    }
}

fn usize_of(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn medium(content: &[u8], access: Access) -> (tempfile::NamedTempFile, Arc<Medium>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(content, 0).unwrap();
        let mut options = File::options();
        let opened = options
            .read(true)
            .write(access == Access::ReadWrite)
            .open(file.path());
        let medium = Medium::new(Arc::new(opened.unwrap()), content.len() as u64, access);
        (file, Arc::new(medium))
    }

    fn mapped(medium: &Arc<Medium>) -> Mapping {
        let range = PmemRange {
            start: 1 << 38,
            size_bytes: medium.region_bytes().unwrap(),
        };
        Mapping::new(medium, range).unwrap()
    }

    fn byte(mapping: &Mapping, offset: usize) -> *mut u8 {
        ptr::with_exposed_provenance_mut(mapping.host_address + offset)
    }

    #[test]
    fn what_is_stored_is_in_the_file_to_its_last_byte() {
        let (file, medium) = medium(b"abc", Access::ReadWrite);
        medium.complete().unwrap();
        let mapping = mapped(&medium);
        let slot = mapping.slot(3);
        assert_eq!((slot.index, slot.guest_address.0), (SLOT_FIRST + 3, 1 << 38));
        assert_eq!((slot.size_bytes, slot.host_address % (2 * MIB)), (2 * MIB, 0));
        let last = usize::try_from(2 * MIB - 1).unwrap();
        // SAFETY: the mapping lives, and is as long as that.
        unsafe { byte(&mapping, last).write_volatile(7) };
        medium.flush().unwrap();
        drop(mapping);
        let mut end = [0];
        file.as_file().read_exact_at(&mut end, 2 * MIB - 1).unwrap();
        assert_eq!(end, [7]);
        assert_eq!(Arc::strong_count(&medium), 1);
    }

    #[test]
    fn behind_the_end_of_what_is_only_read_there_are_zeros() {
        let content = vec![9; 5000];
        let (file, medium) = medium(&content, Access::ReadOnly);
        let mapping = mapped(&medium);
        assert_eq!(mapping.access(), Access::ReadOnly);
        for (offset, expected) in [(0, 9), (4999, 9), (5000, 0), (8192, 0), ((2 << 20) - 1, 0)] {
            // SAFETY: the mapping lives, and is as long as that.
            let found = unsafe { byte(&mapping, offset).read_volatile() };
            assert_eq!(found, expected, "{offset}");
        }
        assert_eq!(file.as_file().metadata().unwrap().len(), 5000);
    }

    #[test]
    fn what_no_address_space_has_room_for_is_an_error() {
        let (_file, medium) = medium(b"abc", Access::ReadOnly);
        for size_bytes in [1 << 48, u64::MAX - 2 * MIB + 1] {
            let range = PmemRange {
                start: 1 << 38,
                size_bytes,
            };
            assert!(Mapping::new(&medium, range).is_err(), "{size_bytes:#x}");
        }
    }
}
