//! What the guest reaches of memory that comes and goes, and where it goes.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};

use coracle_devices::virtio::dirty::DirtyPages;
use coracle_devices::virtio::mem::Slots;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::places::Reach;
use crate::kvm::KvmError;
use crate::kvm::vm::Vm;
use crate::memory::HotplugRegion;
use crate::memory::reclaim::Reclaimer;
use crate::snapshot::memory::Untouched;

/// The slots of one machine. Its device's thread asks, which may wait for KVM.
pub(super) struct MemorySlots {
    /// The machine is taken apart by whoever has it, and not by this thread.
    vm: Weak<Vm>,
    memory: Arc<GuestMemoryMmap>,
    hotplug: HotplugRegion,
    dirty: Arc<DirtyPages>,
    untouched: Untouched,
    reclaimer: Reclaimer,
}

impl MemorySlots {
    /// Those of `hotplug`, which is a region of what devices reach of the memory of `vm`; `untouched` is what a page of it is
    /// that this process has not touched.
    pub(super) fn new(vm: &Arc<Vm>, reach: &Reach, hotplug: HotplugRegion, untouched: Untouched) -> Self {
        Self {
            vm: Arc::downgrade(vm),
            memory: Arc::clone(&reach.memory),
            hotplug,
            dirty: Arc::clone(&reach.dirty),
            untouched,
            reclaimer: Reclaimer::of(&reach.memory),
        }
    }

    fn ask(&self, what: impl FnOnce(&Vm) -> Result<(), KvmError>) -> io::Result<()> {
        let vm = self.vm.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        what(&vm).map_err(|error| match error {
            KvmError::Ioctl { source, .. } => io::Error::from_raw_os_error(source.errno()),
            other => io::Error::other(other),
        })
    }
}

impl Slots for MemorySlots {
    fn show(&mut self, slot: u64) -> io::Result<()> {
        self.ask(|vm| vm.show(slot))
    }

    /// What is not plugged is zeros for a snapshot, and for the target of a migration. In fresh memory it is; in that of a
    /// snapshot there may be what was saved, also of what was discarded.
    fn came(&mut self, range: Range<u64>) {
        if self.untouched == Untouched::Anything {
            let start = GuestAddress(self.hotplug.start + range.start);
            self.dirty.mark(start, range.end - range.start);
        }
    }

    /// A snapshot that is taken before it is discarded has to know already.
    fn goes(&mut self, range: Range<u64>) {
        let start = GuestAddress(self.hotplug.start + range.start);
        self.dirty.mark(start, range.end - range.start);
    }

    fn hide(&mut self, slot: u64) -> io::Result<()> {
        self.ask(|vm| vm.hide(slot))
    }

    /// What is discarded has changed: a snapshot or a migration that had what was there before has to know.
    fn discard(&mut self, range: Range<u64>) -> io::Result<()> {
        let start = GuestAddress(self.hotplug.start + range.start);
        let len_bytes = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let discarded = self.reclaimer.give_back(&self.memory, start, len_bytes);
        self.dirty.mark(start, range.end - range.start);
        discarded.map(|_| ())
    }
}
