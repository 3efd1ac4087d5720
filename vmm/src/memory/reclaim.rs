//! Guest memory on its way back to the host, whatever it is made of.
#![expect(
    unsafe_code,
    reason = "advice about a mapping can have effects, so it has no safe wrapper"
)]

use std::io;

use coracle_devices::virtio::balloon::Reclaim;
use coracle_storage::request::Segment;
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::snapshot::memory::PAGE_BYTES;

/// Bytes of a page of hugetlbfs, of which no part is given back.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// How memory of one kind is given back.
///
/// | memory | how | who touches it again finds |
/// |---|---|---|
/// | anonymous | MADV_DONTNEED | zeros |
/// | a memfd | MADV_REMOVE, so that the file has a hole | zeros |
/// | a mapped memory file | MADV_DONTNEED | what was saved there |
/// | guarded, while it is brought in | MADV_DONTNEED | zeros (`pager`), or what was saved there if that has not come yet |
/// | filled by another process | MADV_DONTNEED, of which that process is told | what that process fills in |
///
/// All of that is the guest's own, and it has said that it needs none of it.
#[derive(Clone, Copy, Debug)]
pub struct Reclaimer {
    advice: Advice,
    page_bytes: usize,
}

impl Reclaimer {
    /// For `memory`.
    pub fn of(memory: &GuestMemoryMmap) -> Self {
        let flags = memory.iter().fold(0, |all, region| all | region.flags());
        let is_shared = flags & libc::MAP_SHARED != 0;
        let is_huge = memory.iter().any(|region| region.is_hugetlbfs() == Some(true));
        Self {
            advice: if is_shared {
                Advice::LinuxRemove
            } else {
                Advice::LinuxDontNeed
            },
            page_bytes: if is_huge { HUGE_PAGE_BYTES } else { PAGE_BYTES },
        }
    }
}

impl Reclaimer {
    /// Gives back those pages that lie wholly within `len_bytes` of `memory` at `start`; returns how many bytes they have.
    ///
    /// # Errors
    ///
    /// What the host answers, or that this is not memory of one region.
    pub fn give_back(
        &self,
        memory: &GuestMemoryMmap,
        start: GuestAddress,
        len_bytes: usize,
    ) -> io::Result<u64> {
        let slice = memory.get_slice(start, len_bytes).map_err(io::Error::other)?;
        self.advise(slice.ptr_guard_mut().as_ptr(), len_bytes)
    }

    /// Does that with mapped guest memory.
    fn advise(&self, start: *mut u8, len_bytes: usize) -> io::Result<u64> {
        let lead = start.addr().next_multiple_of(self.page_bytes) - start.addr();
        let len_bytes = len_bytes.saturating_sub(lead) / self.page_bytes * self.page_bytes;
        if len_bytes == 0 {
            return Ok(0);
        }
        // SAFETY: both callers name a range of guest memory that stays mapped, of which nobody holds references: guest memory is
        // reached by volatile accesses and by the kernel only. Who reaches it afterwards finds bytes that the guest may have.
        unsafe { madvise(start.wrapping_add(lead).cast(), len_bytes, self.advice) }?;
        Ok(len_bytes as u64)
    }
}

impl Reclaim for Reclaimer {
    fn reclaim(&mut self, segment: Segment) -> io::Result<u64> {
        self.advise(segment.address(), segment.len_bytes())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;
    use std::ptr::NonNull;
    use std::sync::Arc;

    use vm_memory::Bytes;

    use super::*;
    use crate::memory::{Backing, PageSize, allocate, map_copy_on_write};

    const PAGE: u64 = PAGE_BYTES as u64;

    /// A range of guest memory, as a device has it.
    fn segment(memory: &GuestMemoryMmap, start: u64, len_bytes: usize) -> Segment {
        let slice = memory.get_slice(GuestAddress(start), len_bytes).unwrap();
        let address = NonNull::new(slice.ptr_guard_mut().as_ptr()).unwrap();
        // SAFETY: the memory outlives the segment in each test.
        unsafe { Segment::new(address, len_bytes) }
    }

    fn found(memory: &GuestMemoryMmap, page: u64) -> u8 {
        memory.read_obj(GuestAddress(page * PAGE)).unwrap()
    }

    /// Fills the first pages, gives back the second and the third one, and says what is found then.
    fn given_back(memory: &GuestMemoryMmap) -> [u8; 5] {
        memory.write_slice(&[7; 5 * PAGE_BYTES], GuestAddress(0)).unwrap();
        let mut reclaimer = Reclaimer::of(memory);
        // A part of the first page and of the fourth one stay.
        let range = segment(memory, 9, 3 * PAGE_BYTES + 100);
        assert_eq!(reclaimer.reclaim(range).unwrap(), 2 * PAGE);
        assert_eq!(reclaimer.reclaim(segment(memory, 1, PAGE_BYTES)).unwrap(), 0);
        assert_eq!(reclaimer.reclaim(segment(memory, 9, 2)).unwrap(), 0);
        [0, 1, 2, 3, 4].map(|page| found(memory, page))
    }

    #[test]
    fn whole_pages_of_memory_go_back_and_are_zeros_afterwards() {
        let anonymous = allocate(1, Backing::Anonymous, PageSize::Base).unwrap();
        assert_eq!(given_back(&anonymous), [7, 0, 0, 7, 7]);
        let shared = allocate(1, Backing::Shared, PageSize::Base).unwrap();
        let region = shared.iter().next().unwrap();
        let file: Arc<File> = Arc::clone(region.file_offset().unwrap().arc());
        assert_eq!(given_back(&shared), [7, 0, 0, 7, 7]);
        // Reading makes the pages anew; before that they are gone from the file.
        shared
            .write_slice(&[7; 64 * PAGE_BYTES], GuestAddress(0))
            .unwrap();
        let before = file.metadata().unwrap().blocks();
        let mut reclaimer = Reclaimer::of(&shared);
        reclaimer.reclaim(segment(&shared, 0, 64 * PAGE_BYTES)).unwrap();
        assert_eq!(before - file.metadata().unwrap().blocks(), 64 * PAGE / 512);
    }

    #[test]
    fn what_is_written_over_a_mapped_file_goes_back_and_the_file_stays() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let memory = map_copy_on_write(file, 1.into(), PageSize::Base).unwrap();
        assert_eq!(given_back(&memory), [7, 0, 0, 7, 7]);
    }

    #[test]
    fn of_huge_pages_whole_ones_go_back() {
        let Ok(memory) = allocate(8, Backing::Anonymous, PageSize::Huge2Mib) else {
            // Where the host has set none aside, what is to be decided is decided without.
            let mut reclaimer = Reclaimer {
                advice: Advice::LinuxDontNeed,
                page_bytes: HUGE_PAGE_BYTES,
            };
            let memory = allocate(8, Backing::Anonymous, PageSize::Base).unwrap();
            memory.write_obj(7_u8, GuestAddress(0)).unwrap();
            let base = memory.iter().next().unwrap().as_ptr().addr();
            let lead = (base.next_multiple_of(HUGE_PAGE_BYTES) - base) as u64;
            let given = |reclaimer: &mut Reclaimer, start, len| {
                reclaimer.reclaim(segment(&memory, start, len)).unwrap()
            };
            assert_eq!(given(&mut reclaimer, lead, HUGE_PAGE_BYTES - 1), 0);
            assert_eq!(given(&mut reclaimer, lead, HUGE_PAGE_BYTES + 1), 2 << 20);
            return;
        };
        memory.write_obj(7_u8, GuestAddress(2 << 20)).unwrap();
        let mut reclaimer = Reclaimer::of(&memory);
        assert_eq!(
            reclaimer.reclaim(segment(&memory, 1 << 20, 3 << 20)).unwrap(),
            2 << 20
        );
        assert_eq!(memory.read_obj::<u8>(GuestAddress(2 << 20)).unwrap(), 0);
    }
}
