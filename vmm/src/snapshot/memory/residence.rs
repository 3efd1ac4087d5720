//! Which pages of a memory may hold something: the others were never touched. No page is touched to find out.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::{PAGE_BYTES, PageSet};

/// The pages of `memory`, all of which were zeros at first and are there or on swap, that may hold something else now; nobody
/// asks for others than those `among` which they are, where these are not all.
pub fn touched(memory: &GuestMemoryMmap, among: Option<&PageSet>) -> PageSet {
    let size_bytes = memory.iter().map(GuestMemoryRegion::len).sum();
    let mut pages = PageSet::empty(size_bytes);
    let mut first = 0;
    for region in memory.iter() {
        let end = first + region.len() / PAGE_BYTES as u64;
        let mut looked = Looked {
            region,
            first,
            map: None,
        };
        match among {
            None => looked.insert_touched(&mut pages, first..end),
            Some(among) => {
                let runs = among.runs().map(|run| run.start.max(first)..run.end.min(end));
                for run in runs.filter(|run| !run.is_empty()) {
                    looked.insert_touched(&mut pages, run);
                }
            }
        }
        first = end;
    }
    pages
}

/// Entries of the page map that are read at a time, and the bits of one (Documentation/admin-guide/mm/pagemap.rst).
const ENTRIES_AT_A_TIME: usize = 64 << 10;
const ENTRY_BYTES: usize = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// A region that is looked at, run by run, of which there may be many.
struct Looked<'a> {
    region: &'a GuestRegionMmap,
    /// The number of its first page.
    first: u64,
    /// The page map, once it was needed, and room for entries of it.
    map: Option<(File, Vec<u8>)>,
}

impl Looked<'_> {
    /// Inserts those pages of `run`, which lies in the region, that may hold something.
    fn insert_touched(&mut self, pages: &mut PageSet, run: Range<u64>) {
        let told = match self.region.file_offset() {
            // Another process may have written it, and what this one has in its page tables says little.
            Some(file) => insert_data(pages, self.first, run.clone(), file),
            None => self.insert_resident(pages, run.clone()),
        };
        if let Err(error) = told {
            log::debug!(
                "all of {} pages of guest memory are looked at: the host does not say which were touched: {error}",
                run.end - run.start
            );
            pages.insert(run.start, run.end);
        }
    }

    fn insert_resident(&mut self, pages: &mut PageSet, run: Range<u64>) -> io::Result<()> {
        let (map, buffer) = match &mut self.map {
            Some(map) => map,
            none => none.insert((
                File::open("/proc/self/pagemap")?,
                vec![0; ENTRIES_AT_A_TIME * ENTRY_BYTES],
            )),
        };
        let host_page = self.region.as_ptr() as u64 / PAGE_BYTES as u64;
        let mut page = run.start;
        while page < run.end {
            let left = usize::try_from(run.end - page).unwrap_or(usize::MAX);
            let entries = left.min(ENTRIES_AT_A_TIME);
            let part = buffer
                .get_mut(..entries * ENTRY_BYTES)
                .expect("the buffer is for as many");
            map.read_exact_at(part, (host_page + page - self.first) * ENTRY_BYTES as u64)?;
            for (number, entry) in (page..).zip(part.as_chunks().0) {
                if u64::from_ne_bytes(*entry) & (PRESENT | SWAPPED) != 0 {
                    pages.insert(number, number + 1);
                }
            }
            page += entries as u64;
        }
        Ok(())
    }
}

fn insert_data(pages: &mut PageSet, first: u64, run: Range<u64>, file: &FileOffset) -> io::Result<()> {
    let page_bytes = PAGE_BYTES as u64;
    let end = file.start() + (run.end - first) * page_bytes;
    let mut at = file.start() + (run.start - first) * page_bytes;
    while at < end {
        let data = match seek(file.file(), SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        if data >= end {
            break;
        }
        let hole = seek(file.file(), SeekFrom::Hole(data))?.min(end);
        let page_of = |offset: u64| first + (offset - file.start()) / page_bytes;
        pages.insert(page_of(data), page_of(hole.next_multiple_of(page_bytes)));
        at = hole;
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{Backing, PageSize, allocate};

    #[test]
    fn only_what_was_touched_may_hold_something() {
        for backing in [Backing::Anonymous, Backing::Shared] {
            let memory = allocate(5 << 10, backing, PageSize::Base).unwrap();
            assert_eq!(touched(&memory, None).count(), 0, "{backing:?}");
            // The last has its place in the file right behind 3 GiB.
            for address in [0, 0x7000, (3 << 30) - 4096, 4 << 30, (6 << 30) - 1] {
                memory.write_obj(1_u8, GuestAddress(address)).unwrap();
            }
            let pages = touched(&memory, None);
            for page in [0, 7, (3 << 18) - 1, 3 << 18, (5 << 18) - 1] {
                assert!(pages.contains(page), "{backing:?} {page}");
            }
            // Where the host gives huge pages, there are more.
            assert!(pages.count() <= 5 * 512, "{backing:?} {pages:?}");
            // Parts of both regions.
            let mut among = PageSet::empty(pages.size_bytes());
            among.insert(5, 8);
            among.insert((3 << 18) - 1, (3 << 18) + 1);
            among.insert((3 << 18) + 512, (5 << 18) - 1);
            let some = touched(&memory, Some(&among));
            let found: Vec<u64> = [0, 7, (3 << 18) - 1, 3 << 18, (5 << 18) - 1]
                .into_iter()
                .filter(|page| some.contains(*page))
                .collect();
            assert_eq!(found, [7, (3 << 18) - 1, 3 << 18], "{backing:?}");
        }
    }
}
