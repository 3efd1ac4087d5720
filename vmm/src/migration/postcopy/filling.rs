//! Memory of which pages are absent: who touches one waits until it is put there.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::memory::userfault::{HostRange, Userfault, UserfaultError};
use crate::memory::{discard, slots};
use crate::snapshot::memory::{PAGE_BYTES, PageSet};

/// Why memory cannot be filled while the guest runs.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum GuardError {
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    #[error("the host does not forget a page that the source has written since it was sent")]
    Discard(#[source] io::Error),
}

/// It. It begins with the pages that were received before, all others being zeros, and ends when none is absent.
#[derive(Debug)]
pub struct Filling {
    userfault: Userfault,
    places: Places,
    absent: PageSet,
    left: u64,
    /// Pages that somebody waits for.
    wanted: BTreeSet<u64>,
    /// For the addresses of faults.
    faults: Vec<u64>,
}

const PAGE: u64 = PAGE_BYTES as u64;

impl Filling {
    /// From now on whoever touches a page of `absent` waits, whatever was received of it before. Nobody may touch `memory`
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// When the host does not guard such memory.
    pub fn guard(memory: &GuestMemoryMmap, absent: PageSet) -> Result<Self, GuardError> {
        let userfault = Userfault::new()?;
        let places = Places::of(memory);
        // First: the host does not make huge pages of guarded memory, which would fill up what is discarded.
        places.ranges().try_for_each(|range| userfault.guard(range))?;
        for run in absent.runs() {
            for place in places.of_run(run) {
                discard(memory, place.guest, place.host_len()).map_err(GuardError::Discard)?;
            }
        }
        Ok(Self {
            userfault,
            places,
            left: absent.count(),
            absent,
            wanted: BTreeSet::new(),
            faults: Vec::new(),
        })
    }

    /// Readable when somebody waits.
    pub fn userfault(&self) -> &Userfault {
        &self.userfault
    }

    /// The pages that are absent.
    pub fn absent(&self) -> &PageSet {
        &self.absent
    }

    /// How many they are.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Those that somebody waits for.
    pub fn wanted(&self) -> &BTreeSet<u64> {
        &self.wanted
    }

    /// Learns who waits for what, and returns the pages that nobody has waited for before. Who waits for a page that is not
    /// absent goes on at once: it is zeros, or it came meanwhile.
    ///
    /// # Errors
    ///
    /// When the host does not do it.
    pub fn take_faults(&mut self) -> io::Result<Vec<u64>> {
        let mut faults = std::mem::take(&mut self.faults);
        self.userfault.faults(&mut faults)?;
        let mut new = Vec::new();
        for address in faults.drain(..) {
            // No other memory is guarded.
            let Some(page) = self.places.page_at(address) else {
                continue;
            };
            if self.absent.contains(page) {
                if self.wanted.insert(page) {
                    new.push(page);
                }
            } else {
                self.userfault.zero(HostRange::page_at(address))?;
            }
        }
        self.faults = faults;
        Ok(new)
    }

    /// Puts pages from `first` on into their places, as far as they are absent: what is there is never changed. Says how many
    /// those were.
    ///
    /// # Errors
    ///
    /// When the host does not do it.
    pub fn fill(&mut self, first: u64, bytes: &[u8]) -> io::Result<u64> {
        let count = (bytes.len() / PAGE_BYTES) as u64;
        self.put(first, count, |userfault, place| {
            let from = usize::try_from(place.first - first).unwrap_or(usize::MAX) * PAGE_BYTES;
            let bytes = bytes.get(from..).and_then(|rest| rest.get(..place.host_len()));
            userfault.fill(place.host, bytes.expect("a part of a message lies within it"))
        })
    }

    /// The same with `count` pages of zeros.
    ///
    /// # Errors
    ///
    /// As [`Self::fill`].
    pub fn zero(&mut self, first: u64, count: u64) -> io::Result<u64> {
        self.put(first, count, |userfault, place| {
            userfault.zero(HostRange {
                start: place.host,
                len_bytes: place.count * PAGE,
            })
        })
    }

    fn put(
        &mut self,
        first: u64,
        count: u64,
        put: impl Fn(&Userfault, Place) -> io::Result<()>,
    ) -> io::Result<u64> {
        let end = first.saturating_add(count);
        let before = self.left;
        let mut from = first;
        while let Some(run) = self.absent.next_run(from, end.saturating_sub(from)) {
            if run.start >= end {
                break;
            }
            let run = run.start..run.end.min(end);
            for place in self.places.of_run(run.clone()) {
                put(&self.userfault, place)?;
            }
            self.absent.remove(run.start, run.end);
            self.left -= run.end - run.start;
            while let Some(page) = self.wanted.range(run.clone()).next().copied() {
                self.wanted.remove(&page);
            }
            from = run.end;
        }
        Ok(before - self.left)
    }

    /// Guards the memory no more, of which no page is absent: what nobody has touched is zeros by itself.
    ///
    /// # Errors
    ///
    /// What the host answers.
    pub fn release(&self) -> io::Result<()> {
        assert!(self.left == 0, "what is absent is never taken for zeros");
        self.places
            .ranges()
            .try_for_each(|range| self.userfault.release(range))
    }
}

/// Where the pages of a memory lie in this process, in the order of its addresses.
#[derive(Debug)]
struct Places(Vec<Place>);

/// Pages that lie one behind the other.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The number of the first one.
    first: u64,
    count: u64,
    host: u64,
    guest: GuestAddress,
}

impl Place {
    fn host_len(&self) -> usize {
        usize::try_from(self.count * PAGE).expect("this is a 64-bit monitor")
    }
}

impl Places {
    fn of(memory: &GuestMemoryMmap) -> Self {
        let mut first = 0;
        let places = slots(memory).map(|slot| {
            let place = Place {
                first,
                count: slot.size_bytes / PAGE,
                host: slot.host_address,
                guest: slot.guest_address,
            };
            first += place.count;
            place
        });
        Self(places.collect())
    }

    fn ranges(&self) -> impl Iterator<Item = HostRange> {
        self.0.iter().map(|place| HostRange {
            start: place.host,
            len_bytes: place.count * PAGE,
        })
    }

    fn page_at(&self, address: u64) -> Option<u64> {
        self.0.iter().find_map(|place| {
            let page = address.checked_sub(place.host)? / PAGE;
            (page < place.count).then(|| place.first + page)
        })
    }

    /// The parts of a run of pages, one for each region.
    fn of_run(&self, run: Range<u64>) -> impl Iterator<Item = Place> {
        self.0.iter().filter_map(move |place| {
            let start = run.start.max(place.first);
            let end = run.end.min(place.first + place.count);
            let offset_bytes = start.saturating_sub(place.first) * PAGE;
            (start < end).then(|| Place {
                first: start,
                count: end - start,
                host: place.host + offset_bytes,
                guest: GuestAddress(place.guest.0 + offset_bytes),
            })
        })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use vm_memory::Bytes;

    use super::*;
    use crate::memory::testing::{touch, waits};
    use crate::memory::{Backing, PageSize, allocate};

    const LIMIT: Duration = Duration::from_secs(5);

    /// A MiB whose pages were all received once, but for the last, which are zeros; some have been written again.
    fn guarded(absent: &[Range<u64>]) -> (Filling, Arc<GuestMemoryMmap>) {
        let memory = allocate(1, Backing::Anonymous, PageSize::Base).unwrap();
        memory
            .write_slice(&vec![7; 200 * PAGE_BYTES], GuestAddress(0))
            .unwrap();
        let mut set = PageSet::empty(1 << 20);
        absent.iter().for_each(|run| set.insert(run.start, run.end));
        (Filling::guard(&memory, set).unwrap(), memory)
    }

    fn found(memory: &GuestMemoryMmap, page: u64) -> u8 {
        memory.read_obj(GuestAddress(page * PAGE)).unwrap()
    }

    fn page(number: usize) -> usize {
        number * PAGE_BYTES
    }

    #[test]
    fn who_touches_an_absent_page_waits_for_it_and_for_no_other() {
        let (mut filling, memory) = guarded(&[3..5, 100..120]);
        assert_eq!(found(&memory, 2), 7);
        let first = touch(&memory, page(4));
        assert!(waits(&first));
        assert_eq!(filling.take_faults().unwrap(), [4]);
        let second = touch(&memory, page(4) + 9);
        assert!(waits(&second));
        assert!(
            filling.take_faults().unwrap().is_empty(),
            "it is waited for already"
        );
        // A page beside it lets nobody go on.
        assert_eq!(filling.fill(3, &[1; PAGE_BYTES]).unwrap(), 1);
        assert!(waits(&first));
        assert_eq!(filling.fill(4, &[2; PAGE_BYTES]).unwrap(), 1);
        assert_eq!(first.recv_timeout(LIMIT), Ok(2));
        assert_eq!(second.recv_timeout(LIMIT), Ok(2));
        assert!(filling.wanted().is_empty());
        assert_eq!(filling.left(), 20);
    }

    #[test]
    fn a_page_that_was_never_sent_is_zeros() {
        let (mut filling, memory) = guarded(&[0..1, 5..6]);
        let touched = touch(&memory, page(210));
        assert!(waits(&touched));
        assert!(filling.take_faults().unwrap().is_empty());
        assert_eq!(touched.recv_timeout(LIMIT), Ok(0));
        assert_eq!(filling.left(), 2);
    }

    #[test]
    fn what_is_there_stays_and_what_comes_twice_changes_nothing() {
        let (mut filling, memory) = guarded(&[8..10, 12..14]);
        assert_eq!(filling.fill(6, &vec![3; page(7)]).unwrap(), 3);
        let pages = [6, 7, 8, 9, 10, 11, 12].map(|page| found(&memory, page));
        assert_eq!(pages, [7, 7, 3, 3, 7, 7, 3]);
        memory.write_obj(9_u8, GuestAddress(8 * PAGE)).unwrap();
        assert_eq!(filling.fill(8, &vec![4; page(2)]).unwrap(), 0);
        assert_eq!(found(&memory, 8), 9);
        assert_eq!(filling.zero(0, u64::MAX).unwrap(), 1);
        assert_eq!(found(&memory, 13), 0);
        assert_eq!(found(&memory, 12), 3);
        filling.release().unwrap();
        // No fault any more.
        assert_eq!(found(&memory, 255), 0);
    }

    #[test]
    fn pages_on_both_sides_of_the_gap_are_absent() {
        let mib = 3 << 10 | 2;
        let memory = allocate(mib, Backing::Anonymous, PageSize::Base).unwrap();
        let mut set = PageSet::empty(mib << 20);
        let gap = 3 << 18;
        set.insert(gap - 2, gap + 2);
        let mut filling = Filling::guard(&memory, set).unwrap();
        let high = touch(&memory, (4 << 30) + page(1));
        assert!(waits(&high));
        assert_eq!(filling.take_faults().unwrap(), [gap + 1]);
        let bytes: Vec<u8> = [1, 2, 3, 4]
            .into_iter()
            .flat_map(|byte| [byte; PAGE_BYTES])
            .collect();
        assert_eq!(filling.fill(gap - 2, &bytes).unwrap(), 4);
        assert_eq!(high.recv_timeout(LIMIT), Ok(4));
        assert_eq!(memory.read_obj::<u8>(GuestAddress((3 << 30) - PAGE)).unwrap(), 2);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(4 << 30)).unwrap(), 3);
    }
}
