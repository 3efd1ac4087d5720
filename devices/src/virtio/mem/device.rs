//! The register half of the device, and what controls it beside its driver.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_storage::threads;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::Slots;
use super::config::{MemoryHotplugConfig, MemoryHotplugStatus};
use super::region::{Geometry, MemCounts, Region, SharedSizes};
use super::worker::Worker;
use crate::virtio::device::{
    DeviceKind, Notice, Patience, Session, StartError, Stop, VirtioDevice, read_space,
};
use crate::virtio::ring::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use crate::virtio::service::{Nudge, Service};
use crate::virtio::single;
use crate::virtio::state::{DeviceState, DeviceStateError};

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (5.15.3): what is not plugged is not there.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// One queue of requests (5.15.2).
const QUEUE_SIZES_MAX: [u16; 1] = [256];

const MIB: u64 = 1 << 20;
/// How long a stop waits for a request, as long as for a disk: what goes back may be much.
const DRAIN_MS_MAX: u64 = 10_000;

/// What the register half and the control share with their worker.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) sizes: Arc<SharedSizes>,
    /// The driver is to read the configuration space.
    pub(super) is_news: AtomicBool,
    pub(super) counts: Arc<MemCounts>,
}

/// A region of which memory comes and goes. Its worker waits without cost while there is nothing to do, and ends with the device.
#[derive(Debug)]
pub struct Mem {
    service: Service,
    shared: Arc<Shared>,
    geometry: Geometry,
    /// The worker's, while it serves.
    region: Arc<Mutex<Region>>,
}

/// What may be asked of the device while its guest runs.
#[derive(Clone, Debug)]
pub struct MemControl {
    shared: Arc<Shared>,
    geometry: Geometry,
    nudge: Nudge,
}

impl MemControl {
    /// Has the guest plug or unplug until it has `mib` MiB, which is whole blocks of the region.
    pub fn request(&self, mib: u32) {
        let requested = u64::from(mib) * MIB;
        let mut sizes = self.shared.sizes.lock();
        sizes.requested = requested;
        let needed = requested.next_multiple_of(self.geometry.slot_bytes);
        sizes.usable = sizes.usable.max(needed);
        drop(sizes);
        self.shared.is_news.store(true, SeqCst);
        self.nudge.nudge();
    }

    /// How much the guest has, of the memory that `config` describes.
    pub fn status(&self, config: &MemoryHotplugConfig) -> MemoryHotplugStatus {
        let sizes = *self.shared.sizes.lock();
        MemoryHotplugStatus {
            total_size_mib: config.total_size_mib,
            block_size_mib: config.block_size_mib,
            slot_size_mib: config.slot_size_mib,
            plugged_size_mib: sizes.plugged / MIB,
            requested_size_mib: sizes.requested / MIB,
        }
    }

    /// What the device has done so far.
    pub fn counts(&self) -> &Arc<MemCounts> {
        &self.shared.counts
    }
}

impl Mem {
    /// An idle device with its thread, for a region of which nothing is plugged.
    ///
    /// # Errors
    ///
    /// When the thread or the eventfd that wakes it cannot be made.
    ///
    /// # Panics
    ///
    /// When slots are not whole blocks, or the region is not whole slots.
    pub fn new(geometry: Geometry, slots: Box<dyn Slots>) -> io::Result<(Self, MemControl)> {
        let shared = Arc::<Shared>::default();
        let region = Region::new(
            geometry.clone(),
            slots,
            Arc::clone(&shared.sizes),
            Arc::clone(&shared.counts),
        );
        let region = Arc::new(Mutex::new(region));
        let mut worker = Worker::new(Arc::clone(&shared), Arc::clone(&region));
        let service = Service::new(threads::Kind::Memory, "memory", move |mailbox| {
            mailbox.serve_and_forget(
                &mut worker,
                |worker, session| single::serve(worker, mailbox, session),
                |worker| worker.give_all_back(mailbox),
            );
        })?
        .with_drain_limit(DRAIN_MS_MAX);
        let control = MemControl {
            shared: Arc::clone(&shared),
            geometry: geometry.clone(),
            nudge: service.nudge(),
        };
        let mem = Self {
            service,
            shared,
            geometry,
            region,
        };
        Ok((mem, control))
    }

    /// The configuration space (5.15.4). There is one NUMA node, and the feature that would name it is not offered.
    fn config(&self) -> [[u8; 8]; 7] {
        let blocks = &self.geometry.blocks;
        let sizes = *self.shared.sizes.lock();
        let fields = [
            blocks.block_bytes(),
            0,
            blocks.start(),
            blocks.size_bytes(),
            sizes.usable,
            sizes.plugged,
            sizes.requested,
        ];
        fields.map(u64::to_le_bytes)
    }
}

/// The region of a device whose worker is stopped, or of that worker.
pub(super) fn locked(region: &Mutex<Region>) -> MutexGuard<'_, Region> {
    region.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioDevice for Mem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Memory
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC | UNPLUGGED_INACCESSIBLE
    }

    /// A driver that does not know it would read what is not plugged.
    fn features_needed(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes_max(&self) -> &[u16] {
        &QUEUE_SIZES_MAX
    }

    fn read_config(&self, offset_bytes: u64, data: &mut [u8]) {
        read_space(self.config().as_flattened(), offset_bytes, data);
    }

    /// The driver writes nothing there (5.15.4).
    fn write_config(&mut self, _offset_bytes: u64, _data: &[u8]) {}

    /// What is plugged stays so when the driver resets the device: the next driver finds `plugged_size`, and may unplug
    /// everything. What was unplugged goes back, also if there is no next driver.
    fn reset_config(&mut self) {
        self.service.forget();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Memory(locked(&self.region).save())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let DeviceState::Memory(state) = state else {
            return Err(state.is_not_for(self.kind()));
        };
        locked(&self.region).restore(state)
    }

    fn start(&mut self, session: Session) -> Result<(), StartError> {
        self.service.start(session, QUEUE_SIZES_MAX.len())
    }

    fn begin_stop(&mut self, notice: &Notice) {
        self.service.begin_stop(notice);
    }

    fn poll_stop(&mut self, patience: Patience) -> Stop {
        self.service.poll_stop(patience)
    }
}
