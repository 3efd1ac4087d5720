//! Post-copy: the guest runs at the target before all of its memory is there, and the rest is fetched.
//!
//! ```text
//!   source                                     target
//!   two more connections, by rejoin ─────────►
//!   the guest stands still
//!   absent: pages that are not there ────────► guards them (filling.rs)
//!   state ... go ────────────────────────────► ... running, as without it
//!   keeps the memory, nothing else (source.rs)   fetches it (target.rs)
//!        ◄──── absent: these ───────────────── the first connection
//!        ◄──── want: this one first ────────── somebody waits for it
//!   that page ───────────────────────────────►
//!   one page after the other ════════════════► the second connection
//!        ◄──── whole ───────────────────────── nothing is absent any more
//!   whole ───────────────────────────────────► both ends are done
//! ```
//!
//! A connection that breaks costs nothing but time: whoever needs an absent page waits, the source calls again, and begins with
//! what the target says is absent.

pub mod absent;
pub mod filling;
pub mod frames;
pub mod rejoin;
pub mod source;
pub mod target;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::memory::PageSize;
use crate::memory::userfault::Userfault;
use crate::snapshot::memory::{PAGE_BYTES, PageSet};

/// Whether a guest whose memory has such pages can run here before that is there.
pub fn is_possible(pages: PageSize) -> bool {
    if pages == PageSize::Huge2Mib {
        return false;
    }
    let probed = Userfault::new();
    if let Err(error) = &probed {
        log::info!(
            "migration: no guest runs here before its memory is here: {}",
            crate::api::chain(error)
        );
    }
    probed.is_ok()
}

/// The pages of `memory` that `ranges` of guest memory lie in; what is no memory is left out.
pub fn pages_of(memory: &GuestMemoryMmap, ranges: &[(GuestAddress, u64)]) -> PageSet {
    let size_bytes = memory.iter().map(GuestMemoryRegion::len).sum();
    let mut set = PageSet::empty(size_bytes);
    let page = PAGE_BYTES as u64;
    for (start, len_bytes) in ranges {
        let mut first = 0;
        for region in memory.iter() {
            let from = start.0.max(region.start_addr().0);
            let end = start
                .0
                .saturating_add(*len_bytes)
                .min(region.last_addr().0.saturating_add(1));
            if from < end {
                let base = region.start_addr().raw_value();
                set.insert(first + (from - base) / page, first + (end - base).div_ceil(page));
            }
            first += region.len() / page;
        }
    }
    set
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests;
