//! What the memory of a machine goes on from, and what was written since: the ground of diff snapshots.

use std::sync::Arc;

use coracle_devices::virtio::dirty::DirtyPages;
use coracle_devices::vmgenid::GENERATION_ID_BYTES;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{Machine, Paused};
use crate::arch::x86_64::layout;
use crate::kvm::KvmError;
use crate::kvm::vm::{DirtyLog, Vm};
use crate::snapshot::create::Pages;
use crate::snapshot::memory::{MemoryId, PAGE_BYTES, PageSet, Untouched};

/// The last snapshot of a machine, and its pages since.
pub(super) struct Lineage {
    /// The memory of that snapshot.
    parent: Option<MemoryId>,
    /// What a page is that this process has not touched.
    untouched: Untouched,
    tracking: Option<Tracking>,
}

/// Where the pages are tracked that are written.
struct Tracking {
    /// Those of the devices; KVM has those of the vCPUs.
    devices: Arc<DirtyPages>,
    /// Those that were asked for already, and are in no snapshot yet.
    written: PageSet,
}

impl Lineage {
    /// That of a machine whose memory is as in the snapshot `parent`, or empty.
    pub(super) fn new(parent: Option<MemoryId>, dirty_log: DirtyLog, memory: &GuestMemoryMmap) -> Self {
        let size_bytes = memory.iter().map(GuestMemoryRegion::len).sum();
        let tracking = (dirty_log == DirtyLog::On).then(|| Tracking {
            devices: Arc::new(DirtyPages::new(memory)),
            written: PageSet::empty(size_bytes),
        });
        if let (Some(tracking), Some(_)) = (&tracking, parent) {
            // It is another one than in the snapshot.
            tracking.devices.mark(layout::VMGENID, GENERATION_ID_BYTES as u64);
        }
        Self {
            untouched: match parent {
                Some(_) => Untouched::Anything,
                None => Untouched::Zeros,
            },
            parent,
            tracking,
        }
    }

    /// Where devices mark what they write, if that is tracked.
    pub(super) fn devices(&self) -> Option<Arc<DirtyPages>> {
        Some(Arc::clone(&self.tracking.as_ref()?.devices))
    }
}

impl Tracking {
    /// Takes in what was written by now.
    fn gather(&mut self, vm: Option<&Vm>, memory: &GuestMemoryMmap) -> Result<(), KvmError> {
        let vm = vm.expect("a machine is there until it is dropped");
        let by_vcpus = vm.dirty_pages()?;
        let by_devices = self.devices.take();
        let mut first_page = 0;
        for ((region, vcpus), devices) in memory.iter().zip(&by_vcpus).zip(&by_devices) {
            let pages = region.len() / PAGE_BYTES as u64;
            for bitmap in [vcpus, devices] {
                let inserted = self.written.insert_bitmap(first_page, pages, bitmap);
                inserted.expect("a bitmap of a region has a bit for each of its pages");
            }
            first_page += pages;
        }
        Ok(())
    }
}

impl Machine<Paused> {
    /// The pages for a full snapshot.
    pub fn all_pages(&self) -> Pages {
        Pages::All(self.parts.lineage.untouched)
    }

    /// The pages for a diff snapshot: those that were written since the last one, or, where those are not known, all of them.
    /// They count as not written yet until [`Self::is_saved_as`].
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn written_pages(&mut self) -> Result<Pages, KvmError> {
        let parts = &mut *self.parts;
        let Some(tracking) = &mut parts.lineage.tracking else {
            return Ok(self.all_pages());
        };
        tracking.gather(parts.vm.as_ref(), &parts.memory)?;
        Ok(match parts.lineage.parent {
            Some(parent) => Pages::Written {
                parent,
                written: tracking.written.clone(),
            },
            None => self.all_pages(),
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
        if let Some(tracking) = &mut parts.lineage.tracking {
            tracking.gather(parts.vm.as_ref(), &parts.memory)?;
            tracking.written = PageSet::empty(tracking.written.size_bytes());
        }
        Ok(())
    }
}
