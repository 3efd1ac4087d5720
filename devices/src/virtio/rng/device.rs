//! The register half of the entropy device.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use coracle_storage::limit::RateLimiter;
use coracle_storage::threads;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::config::EntropyConfig;
use super::worker::{EntropyCounts, Worker};
use crate::virtio::device::{DeviceKind, Notice, Patience, Session, StartError, Stop, VirtioDevice};
use crate::virtio::ring::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use crate::virtio::service::Service;
use crate::virtio::single;
use crate::virtio::state::{DeviceState, DeviceStateError};

/// One request queue.
const QUEUE_SIZES_MAX: [u16; 1] = [256];

/// The entropy device. Its worker thread waits without cost while there is nothing to do, and ends with the device.
#[derive(Debug)]
pub struct Entropy {
    service: Service,
    counts: Arc<EntropyCounts>,
}

impl Entropy {
    /// An idle device with its thread.
    ///
    /// # Errors
    ///
    /// When the thread or the eventfd that wakes it cannot be made.
    pub fn new(config: &EntropyConfig) -> io::Result<Self> {
        let counts = Arc::<EntropyCounts>::default();
        let limiter = RateLimiter::new(&config.rate_limiter.unwrap_or_default(), Instant::now());
        let mut worker = Worker::new(Arc::clone(&counts), limiter);
        let service = Service::new(threads::Kind::Entropy, "rng", move |mailbox| {
            mailbox.serve(|session| single::serve(&mut worker, mailbox, session));
        })?;
        Ok(Self { service, counts })
    }

    /// What the device has done so far.
    pub fn counts(&self) -> &Arc<EntropyCounts> {
        &self.counts
    }
}

impl VirtioDevice for Entropy {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC
    }

    fn queue_sizes_max(&self) -> &[u16] {
        &QUEUE_SIZES_MAX
    }

    /// There is no configuration space (5.4.4).
    fn read_config(&self, _offset_bytes: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset_bytes: u64, _data: &[u8]) {}

    fn save(&self) -> DeviceState {
        DeviceState::Entropy
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        match state {
            DeviceState::Entropy => Ok(()),
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
