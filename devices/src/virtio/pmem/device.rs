//! The register half of persistent memory, and what controls it beside its driver.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use coracle_storage::limit::{RateLimiterConfig, SharedLimiter};
use coracle_storage::threads;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::PmemRange;
use super::config::PmemConfig;
use super::medium::{FlushError, Medium};
use super::worker::{PmemCounts, Worker};
use crate::virtio::device::{
    DeviceKind, Notice, Patience, Session, StartError, Stop, VirtioDevice, read_space,
};
use crate::virtio::ring::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use crate::virtio::service::{Nudge, Service};
use crate::virtio::single;
use crate::virtio::state::{DeviceState, DeviceStateError};

/// One request queue (5.19.2).
const QUEUE_SIZES_MAX: [u16; 1] = [256];
/// How long a stop waits for a flush, as long as for a disk.
const DRAIN_MS_MAX: u64 = 10_000;

/// Persistent memory. Its worker looks after the file once a second while nobody flushes, and ends with the device.
#[derive(Debug)]
pub struct Pmem {
    service: Service,
    range: PmemRange,
}

/// What may be asked of persistent memory while its guest runs.
#[derive(Clone, Debug)]
pub struct PmemControl {
    limiter: Arc<SharedLimiter>,
    counts: Arc<PmemCounts>,
    nudge: Nudge,
}

impl PmemControl {
    /// Gives it new limits; buckets that are left out stay as they are.
    pub fn limit(&self, limits: RateLimiterConfig) {
        self.limiter.update(&limits, Instant::now());
        self.nudge.nudge();
    }

    /// What the device has done so far.
    pub fn counts(&self) -> &Arc<PmemCounts> {
        &self.counts
    }
}

impl Pmem {
    /// An idle device with its thread, whose guest sees the file of `medium` at `range`; `on_cut` hears of it when somebody has
    /// made that shorter.
    ///
    /// # Errors
    ///
    /// When the thread or the eventfd that wakes it cannot be made.
    pub fn new(
        config: &PmemConfig,
        medium: Arc<Medium>,
        range: PmemRange,
        on_cut: impl FnMut(&FlushError) + Send + 'static,
    ) -> io::Result<(Self, PmemControl)> {
        let counts = Arc::<PmemCounts>::default();
        let limits = config.rate_limiter.unwrap_or_default();
        let limiter = Arc::new(SharedLimiter::new(&limits, Instant::now()));
        let mut worker = Worker::new(
            (medium, Box::new(on_cut)),
            Arc::clone(&limiter),
            Arc::clone(&counts),
        );
        let name = format!("pmem {}", config.id);
        let service = Service::new(threads::Kind::Pmem, &name, move |mailbox| {
            mailbox.serve(|session| single::serve(&mut worker, mailbox, session));
        })?;
        let service = service.with_drain_limit(DRAIN_MS_MAX);
        let control = PmemControl {
            limiter,
            counts,
            nudge: service.nudge(),
        };
        Ok((Self { service, range }, control))
    }
}

impl VirtioDevice for Pmem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Pmem
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC
    }

    fn queue_sizes_max(&self) -> &[u16] {
        &QUEUE_SIZES_MAX
    }

    /// `start` and `size` (5.19.4).
    fn read_config(&self, offset_bytes: u64, data: &mut [u8]) {
        let fields = [self.range.start, self.range.size_bytes];
        read_space(&fields.map(u64::to_le_bytes).concat(), offset_bytes, data);
    }

    fn write_config(&mut self, _offset_bytes: u64, _data: &[u8]) {}

    fn save(&self) -> DeviceState {
        DeviceState::Pmem(self.range)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        match state {
            DeviceState::Pmem(range) if *range == self.range => Ok(()),
            DeviceState::Pmem(range) => Err(DeviceStateError::Range {
                saved: *range,
                here: self.range,
            }),
            other => Err(other.is_not_for(self.kind())),
        }
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
