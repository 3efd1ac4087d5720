//! What the memory of a machine goes on from, and what was written since: the ground of diff snapshots.

use std::sync::Arc;

use coracle_devices::virtio::dirty::DirtyPages;
use coracle_devices::virtio::mem::Blocks;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::platform::GENERATION_MEMORY;
use super::{Machine, Paused};
use crate::kvm::KvmError;
use crate::kvm::vm::{DirtyLog, Vm};
use crate::snapshot::create::Pages;
use crate::snapshot::memory::{MemoryId, PAGE_BYTES, PageSet, Untouched, touched};

/// The last snapshot of a machine, and its pages since.
pub(super) struct Lineage {
    /// The memory of that snapshot.
    parent: Option<MemoryId>,
    /// What a page is that this process has not touched.
    untouched: Untouched,
    /// Where devices mark what they write. Those of vCPUs KVM has, if it is told to.
    devices: Arc<DirtyPages>,
    /// Those that were asked for already, and are in no snapshot yet: for `track_dirty_pages`.
    since_snapshot: Option<PageSet>,
    /// Those that were asked for already, and not sent yet: during a migration.
    since_round: Option<PageSet>,
}

impl Lineage {
    /// That of a machine whose memory is as in the snapshot `parent`, or empty.
    pub(super) fn new(parent: Option<MemoryId>, dirty_log: DirtyLog, memory: &GuestMemoryMmap) -> Self {
        let lineage = Self {
            untouched: match parent {
                Some(_) => Untouched::Anything,
                None => Untouched::Zeros,
            },
            parent,
            devices: Arc::new(DirtyPages::new(memory)),
            since_snapshot: (dirty_log == DirtyLog::On).then(|| PageSet::empty(size_bytes(memory))),
            since_round: None,
        };
        if parent.is_some() {
            // They are others than in the snapshot.
            for (address, bytes) in GENERATION_MEMORY {
                lineage.devices.mark(address, bytes);
            }
        }
        lineage
    }

    /// What a page is that this process has not touched.
    pub(super) fn untouched(&self) -> Untouched {
        self.untouched
    }

    /// Where devices mark what they write.
    pub(super) fn devices(&self) -> Arc<DirtyPages> {
        Arc::clone(&self.devices)
    }

    /// Takes in what was written by now.
    fn gather(&mut self, vm: Option<&Vm>, memory: &GuestMemoryMmap) -> Result<(), KvmError> {
        if self.since_snapshot.is_none() && self.since_round.is_none() {
            return Ok(());
        }
        let vm = vm.expect("a machine is there until it is dropped");
        let by_vcpus = vm.dirty_pages()?;
        let by_devices = self.devices.take();
        let mut first_page = 0;
        for ((region, vcpus), devices) in memory.iter().zip(&by_vcpus).zip(&by_devices) {
            let pages = region.len() / PAGE_BYTES as u64;
            for bitmap in [vcpus, devices] {
                for set in [&mut self.since_snapshot, &mut self.since_round]
                    .into_iter()
                    .flatten()
                {
                    let inserted = set.insert_bitmap(first_page, pages, bitmap);
                    inserted.expect("a bitmap of a region has a bit for each of its pages");
                }
            }
            first_page += pages;
        }
        Ok(())
    }
}

/// The pages of `memory` that the guest has, if not all: of a region of which memory comes and goes, those of `blocks` that are
/// plugged. Nobody looks at the others: that takes time for what is very large, and memory for what is none.
fn there(memory: &GuestMemoryMmap, blocks: Option<&Blocks>) -> Option<PageSet> {
    let blocks = blocks?;
    let page = |bytes: u64| bytes / PAGE_BYTES as u64;
    let size_bytes = size_bytes(memory);
    // It is the last region of the memory.
    let start_bytes = size_bytes - blocks.size_bytes();
    let mut pages = PageSet::empty(size_bytes);
    pages.insert(0, page(start_bytes));
    for range in blocks.plugged() {
        pages.insert(page(start_bytes + range.start), page(start_bytes + range.end));
    }
    Some(pages)
}

fn size_bytes(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

impl<P> Machine<P> {
    /// Begins to send the memory elsewhere: from now on the pages that are written are told by [`Self::take_round`]. To be sent
    /// first are those that are returned; all others are zeros.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn begin_rounds(&mut self) -> Result<PageSet, KvmError> {
        let parts = &mut *self.parts;
        if parts.lineage.since_snapshot.is_none() {
            parts.vm().log_dirty_pages(DirtyLog::On)?;
        }
        let size_bytes = size_bytes(&parts.memory);
        parts.lineage.since_round = Some(PageSet::empty(size_bytes));
        // What was written before is among all pages.
        self.take_round()?;
        let parts = &*self.parts;
        // After the log was begun: what is plugged and touched later is in that, or is marked when it comes.
        let there = there(&parts.memory, parts.blocks.as_deref());
        Ok(match parts.lineage.untouched {
            Untouched::Zeros => touched(&parts.memory, there.as_ref()),
            Untouched::Anything => there.unwrap_or_else(|| PageSet::full(size_bytes)),
        })
    }

    /// The pages that were written since the last round; from now on they count as not written.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn take_round(&mut self) -> Result<PageSet, KvmError> {
        let parts = &mut *self.parts;
        parts.lineage.gather(parts.vm.as_deref(), &parts.memory)?;
        let none = PageSet::empty(size_bytes(&parts.memory));
        Ok(parts
            .lineage
            .since_round
            .replace(none)
            .unwrap_or_else(|| PageSet::full(size_bytes(&parts.memory))))
    }

    /// The memory is not sent any more: what is written costs nothing again, unless a snapshot needs to know.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn end_rounds(&mut self) -> Result<(), KvmError> {
        let lineage = &mut self.parts.lineage;
        let was_on = lineage.since_round.take().is_some();
        if was_on && lineage.since_snapshot.is_none() {
            self.parts.vm().log_dirty_pages(DirtyLog::Off)?;
        }
        Ok(())
    }
}

impl Machine<Paused> {
    /// The pages for a full snapshot.
    pub fn all_pages(&self) -> Pages {
        let parts = &self.parts;
        match (
            there(&parts.memory, parts.blocks.as_deref()),
            parts.lineage.untouched,
        ) {
            (Some(there), Untouched::Anything) => Pages::Among(there),
            (Some(there), Untouched::Zeros) => Pages::Touched(there),
            (None, untouched) => Pages::All(untouched),
        }
    }

    /// The pages for a diff snapshot: those that were written since the last one, or, where those are not known, all of them.
    /// They count as not written yet until [`Self::is_saved_as`].
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn written_pages(&mut self) -> Result<Pages, KvmError> {
        let parts = &mut *self.parts;
        parts.lineage.gather(parts.vm.as_deref(), &parts.memory)?;
        let written = parts.lineage.since_snapshot.clone();
        Ok(match (parts.lineage.parent, written) {
            (Some(parent), Some(written)) => Pages::Written {
                parent,
                written,
                there: there(&parts.memory, parts.blocks.as_deref()),
            },
            _ => self.all_pages(),
        })
    }

    /// The machine, which has stood still all the while, is saved with its memory as `id`: the next diff goes on from that.
    ///
    /// # Errors
    ///
    /// When KVM refuses; then the next diff has more pages than it needs.
    pub fn is_saved_as(&mut self, id: MemoryId) -> Result<(), KvmError> {
        let parts = &mut *self.parts;
        parts.lineage.parent = Some(id);
        parts.lineage.gather(parts.vm.as_deref(), &parts.memory)?;
        if let Some(written) = &mut parts.lineage.since_snapshot {
            *written = PageSet::empty(written.size_bytes());
        }
        Ok(())
    }
}
