//! The register half of the balloon, and what controls it beside its driver.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use coracle_storage::threads;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::config::BalloonConfig;
use super::hinting::HintingStatus;
use super::statistics::BalloonStatistics;
use super::worker::{BalloonCounts, Shared, Worker, roles};
use super::{BalloonState, PAGE_BYTES, Reclaim};
use crate::virtio::device::{
    DeviceKind, Notice, Patience, Session, StartError, Stop, VirtioDevice, read_space,
};
use crate::virtio::ring::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use crate::virtio::service::{Nudge, Service};
use crate::virtio::state::{DeviceState, DeviceStateError};

/// VIRTIO_BALLOON_F_STATS_VQ (5.5.3).
pub(super) const STATS_VQ: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_FREE_PAGE_HINT.
pub(super) const FREE_PAGE_HINT: u64 = 1 << 3;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
pub(super) const PAGE_REPORTING: u64 = 1 << 5;

/// Each queue has the same size.
const QUEUE_SIZES_MAX: [u16; 5] = [256; 5];
/// Without the others the guest only gives back less.
const QUEUES_NEEDED: usize = 1;

/// `actual` in the configuration space (5.5.4), the only field that the driver writes.
const ACTUAL_AT: u64 = 4;

/// The balloon. Its worker waits without cost while the guest has nothing to say, and ends with the device.
#[derive(Debug)]
pub struct Balloon {
    service: Service,
    shared: Arc<Shared>,
    features: u64,
}

/// What may be asked of a balloon while its guest runs.
#[derive(Clone, Debug)]
pub struct BalloonControl {
    shared: Arc<Shared>,
    nudge: Nudge,
}

impl BalloonControl {
    /// Has the guest make the balloon so large.
    pub fn set_amount(&self, mib: u32) {
        self.shared.target_pages.store(pages(mib), SeqCst);
        self.tell_driver();
    }

    /// Has the guest tell its statistics at once, and then every so many seconds.
    pub fn set_interval(&self, seconds: u16) {
        self.shared.interval_s.store(seconds, SeqCst);
        self.shared.asks_now.store(true, SeqCst);
        self.nudge.nudge();
    }

    /// How large the balloon is, and what the guest has told last.
    pub fn statistics(&self) -> BalloonStatistics {
        let target_pages = self.shared.target_pages.load(SeqCst);
        let actual_pages = self.shared.actual_pages.load(SeqCst);
        BalloonStatistics {
            target_pages,
            actual_pages,
            target_mib: mib(target_pages),
            actual_mib: mib(actual_pages),
            ..self.shared.statistics().clone()
        }
    }

    /// Has the guest tell all memory that is free.
    pub fn start_hinting(&self, acknowledges: bool) {
        self.shared.hinting().start(acknowledges);
        self.tell_driver();
    }

    /// Lets the guest use again what it has told.
    pub fn stop_hinting(&self) {
        self.shared.hinting().stop();
        self.tell_driver();
    }

    /// How far that is.
    pub fn hinting_status(&self) -> HintingStatus {
        self.shared.hinting().status()
    }

    /// What the device has done so far.
    pub fn counts(&self) -> &Arc<BalloonCounts> {
        &self.shared.counts
    }

    /// Has the driver read the configuration space again, now or when there is one.
    fn tell_driver(&self) {
        self.shared.is_news.store(true, SeqCst);
        self.nudge.nudge();
    }
}

impl Balloon {
    /// An idle device with its thread, which gives memory back by `reclaim`.
    ///
    /// # Errors
    ///
    /// When the thread or the eventfd that wakes it cannot be made.
    pub fn new(config: &BalloonConfig, reclaim: Box<dyn Reclaim>) -> io::Result<(Self, BalloonControl)> {
        let shared = Arc::<Shared>::default();
        shared.target_pages.store(pages(config.amount_mib), SeqCst);
        shared.interval_s.store(config.stats_polling_interval_s, SeqCst);
        let optional = [
            (config.deflate_on_oom, DEFLATE_ON_OOM),
            (config.stats_polling_interval_s > 0, STATS_VQ),
            (config.free_page_hinting, FREE_PAGE_HINT),
            (config.free_page_reporting, PAGE_REPORTING),
        ];
        let optional = optional.into_iter().filter(|(wanted, _)| *wanted);
        let features = optional.fold(0, |all, (_, feature)| all | feature);
        let mut worker = Worker::new(reclaim, Arc::clone(&shared));
        let service = Service::new(threads::Kind::Balloon, "balloon", move |mailbox| {
            mailbox.serve(|session| worker.serve(mailbox, session));
        })?;
        let control = BalloonControl {
            shared: Arc::clone(&shared),
            nudge: service.nudge(),
        };
        let balloon = Self {
            service,
            shared,
            features: features | 1 << VIRTIO_F_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC,
        };
        Ok((balloon, control))
    }

    /// The configuration space (5.5.4). The value of poisoned pages is of a feature that is not offered.
    fn config(&self) -> [[u8; 4]; 4] {
        let hinting = self.shared.hinting().status();
        let fields = [
            self.shared.target_pages.load(SeqCst),
            self.shared.actual_pages.load(SeqCst),
            hinting.host_cmd,
            0,
        ];
        fields.map(u32::to_le_bytes)
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes_max(&self) -> &[u16] {
        let queues = roles(self.features).count();
        QUEUE_SIZES_MAX.get(..queues).unwrap_or(&QUEUE_SIZES_MAX)
    }

    fn read_config(&self, offset_bytes: u64, data: &mut [u8]) {
        read_space(self.config().as_flattened(), offset_bytes, data);
    }

    fn write_config(&mut self, offset_bytes: u64, data: &[u8]) {
        let mut actual = self.shared.actual_pages.load(SeqCst).to_le_bytes();
        for (byte, place) in actual.iter_mut().zip(ACTUAL_AT..) {
            let written = place
                .checked_sub(offset_bytes)
                .and_then(|at| usize::try_from(at).ok());
            if let Some(written) = written.and_then(|at| data.get(at)) {
                *byte = *written;
            }
        }
        self.shared.actual_pages.store(u32::from_le_bytes(actual), SeqCst);
    }

    fn reset_config(&mut self) {
        self.shared.actual_pages.store(0, SeqCst);
        self.shared.hinting().forget();
    }

    fn save(&self) -> DeviceState {
        let hinting = self.shared.hinting();
        DeviceState::Balloon(BalloonState {
            actual_pages: self.shared.actual_pages.load(SeqCst),
            last_run: hinting.last_run(),
            holds_hints: hinting.is_open(),
        })
    }

    /// A run of hints does not go on: the driver has its pages back.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let DeviceState::Balloon(state) = state else {
            return Err(state.is_not_for(self.kind()));
        };
        self.shared.actual_pages.store(state.actual_pages, SeqCst);
        self.shared.hinting().go_on(state.last_run, state.holds_hints);
        self.shared.is_news.store(state.holds_hints, SeqCst);
        Ok(())
    }

    fn start(&mut self, session: Session) -> Result<(), StartError> {
        self.service.start(session, QUEUES_NEEDED)
    }

    fn begin_stop(&mut self, notice: &Notice) {
        self.service.begin_stop(notice);
    }

    fn poll_stop(&mut self, patience: Patience) -> Stop {
        self.service.poll_stop(patience)
    }
}

fn pages(mib: u32) -> u32 {
    mib.saturating_mul(PAGES_PER_MIB)
}

fn mib(pages: u32) -> u32 {
    pages / PAGES_PER_MIB
}

#[expect(clippy::cast_possible_truncation, reason = "256")]
const PAGES_PER_MIB: u32 = ((1 << 20) / PAGE_BYTES) as u32;
