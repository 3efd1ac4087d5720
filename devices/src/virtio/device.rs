//! The contract between a virtio device and its transport.
//!
//! A device has two halves. The register half answers the transport: features, configuration
//! space. The data half runs on a worker that is *given* a [`Session`] (memory, rings, kicks,
//! interrupts) and gives it *back*:
//!
//! ```text
//!            start(session)             begin_stop(), poll_stop() -> Stopped(Some(session))
//!   idle ───────────────────────► serving ──────────────────────────────────────────────► idle
//!    ▲                             │  ▲ └── a broken ring: serving nothing, still stoppable
//!    └── Stopped(None)             └──┘ Refused: it did not drain in time, or its storage is lost
//! ```
//!
//! A stop is asked for and looked after, so that whoever wants it can do something else meanwhile. Who has nothing else
//! to do calls `stop()`.
//!
//! Reset is stop and drop. Pause is stop and keep. A snapshot is stop, save, start. A disk swap is
//! stop, replace the backend, start.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::ring::Virtqueue;
use super::state::{DeviceState, DeviceStateError};

/// The device's number in virtio 1.2, section 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// 5.1
    Network = 1,
    /// 5.2
    Block = 2,
    /// 5.4
    Entropy = 4,
    /// 5.5
    Balloon = 5,
    /// 5.10
    Socket = 19,
    /// 5.15
    Memory = 24,
    /// 5.19
    Pmem = 27,
}

/// Everything the data half needs to serve, lent to it by the transport between DRIVER_OK and stop.
#[derive(Debug)]
pub struct Session {
    /// The guest's memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// The features that the driver accepted, a subset of what was offered.
    pub features: u64,
    /// The queues that the driver made ready, by index; `None` for one that it left alone.
    pub queues: Vec<Option<ActiveQueue>>,
    /// How the guest hears of used buffers and of configuration changes.
    pub interrupt: Interrupt,
}

/// One ready queue, and the eventfd that the guest's notification writes.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The rings in guest memory.
    pub ring: Virtqueue,
    /// Written (by KVM, as an ioeventfd, or by the transport) when the driver notifies this queue.
    pub kick: Arc<EventFd>,
}

/// The interrupt line of one device: sets the reason in InterruptStatus (4.2.2), then raises the line.
#[derive(Clone, Debug)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    line: Arc<EventFd>,
}

/// InterruptStatus bit 0: a buffer was used.
pub const INTERRUPT_USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: the configuration changed.
pub const INTERRUPT_CONFIGURATION: u32 = 2;
/// Not a bit that the driver sees in InterruptStatus: the device gave up, and the transport shows
/// DEVICE_NEEDS_RESET (2.1.2) until the next reset.
pub(super) const INTERRUPT_NEEDS_RESET: u32 = 1 << 31;

impl Interrupt {
    /// An interrupt that sets bits in `status` and writes `line`, which KVM turns into an interrupt (irqfd).
    pub fn new(status: Arc<AtomicU32>, line: Arc<EventFd>) -> Self {
        Self { status, line }
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffer(&self) {
        self.raise(INTERRUPT_USED_BUFFER);
    }

    /// Tells the driver to read the configuration space again.
    pub fn configuration_changed(&self) {
        self.raise(INTERRUPT_CONFIGURATION);
    }

    /// Tells the driver that the device serves nothing any more until it is reset: a ring is broken.
    pub fn device_needs_reset(&self) {
        self.raise(INTERRUPT_NEEDS_RESET | INTERRUPT_CONFIGURATION);
    }

    /// Raises the line for the reasons that are set already.
    pub(super) fn again(&self) {
        self.raise(0);
    }

    fn raise(&self, reason: u32) {
        // The reason must be visible before the line rises: the driver reads it in its handler.
        self.status.fetch_or(reason, Ordering::SeqCst);
        if let Err(error) = self.line.write(1) {
            // Only a counter at its maximum refuses a write, and then the line is already up.
            log::warn!("interrupt eventfd refused a write: {error}");
        }
    }
}

/// Reads from the configuration space `space` of a device; beyond its end there are zeros.
pub(super) fn read_space(space: &[u8], offset_bytes: u64, data: &mut [u8]) {
    let offset = usize::try_from(offset_bytes).unwrap_or(usize::MAX);
    let there = space.get(offset..).unwrap_or_default();
    let bytes = there.iter().copied().chain(std::iter::repeat(0));
    for (to, byte) in data.iter_mut().zip(bytes) {
        *to = byte;
    }
}

/// A virtio device as its transport sees it.
pub trait VirtioDevice: Send {
    /// Which device this is.
    fn kind(&self) -> DeviceKind;

    /// The features offered, VIRTIO_F_VERSION_1 included.
    fn features(&self) -> u64;

    /// Those of [`Self::features`] without which a driver cannot use the device: it is told so by FEATURES_OK (3.1.1).
    fn features_needed(&self) -> u64 {
        0
    }

    /// The largest size of each queue; its length is the number of queues.
    fn queue_sizes_max(&self) -> &[u16];

    /// Fills `data` from the configuration space at `offset_bytes`; what lies beyond it reads as zero.
    fn read_config(&self, offset_bytes: u64, data: &mut [u8]);

    /// Takes a write to the configuration space; what the device does not let be written is ignored.
    fn write_config(&mut self, offset_bytes: u64, data: &[u8]);

    /// The driver has reset the device: what it wrote to the configuration space is forgotten. The device is stopped.
    fn reset_config(&mut self) {}

    /// What the driver has changed in the device and a fresh one does not know. Asked while it is stopped.
    fn save(&self) -> DeviceState;

    /// Takes up what [`Self::save`] gave elsewhere. The device has not been started; the state may be anybody's.
    ///
    /// # Errors
    ///
    /// When it is the state of another kind of device, or cannot be; the device is then as it was.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError>;

    /// Serves the rings until it is stopped; looks at each once before it waits for a kick,
    /// because a restored ring may hold requests whose kick is long past.
    ///
    /// # Errors
    ///
    /// When the device cannot serve; the transport then sets DEVICE_NEEDS_RESET.
    fn start(&mut self, session: Session) -> Result<(), StartError>;

    /// Asks the data half to quiesce, and to ring `notice` when it has. Without effect while an earlier wish is not
    /// answered: then it is that one's notice that rings.
    fn begin_stop(&mut self, notice: &Notice);

    /// What has become of [`Self::begin_stop`]; asks by itself, without a notice, where nobody has. Answers within the
    /// device's own limit, and at once without `patience`.
    fn poll_stop(&mut self, patience: Patience) -> Stop;

    /// Quiesces and gives the session back, or says why not: both of the above, for whoever waits.
    ///
    /// # Errors
    ///
    /// When the worker did not drain within the limit, has died, or has lost its storage; the device goes on serving
    /// if it can.
    fn stop(&mut self) -> Result<Option<Session>, StopError> {
        self.begin_stop(&Notice::default());
        match self.poll_stop(Patience::WithinLimit) {
            Stop::Stopped(session) => Ok(session),
            Stop::Refused(error) => Err(error),
            Stop::Pending { .. } => unreachable!("who is patient gets an answer"),
        }
    }
}

/// Whether somebody waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Look, and return.
    None,
    /// Wait for the answer, as long as its limit allows.
    WithinLimit,
}

/// What has become of the wish to stop a device.
#[derive(Debug)]
pub enum Stop {
    /// It is not answered yet: look again when the notice rings, or then.
    Pending {
        /// Then at the latest there is an answer.
        until: Instant,
    },
    /// Nothing is in flight, the used rings are complete, and no thread of this device touches guest memory or a disk.
    /// `None` if it was not started.
    Stopped(Option<Session>),
    /// It did not stop, and goes on serving if it can.
    Refused(StopError),
}

/// Rings where somebody is told that it is worth looking again; by default, nowhere.
#[derive(Clone, Debug, Default)]
pub struct Notice(Option<Arc<EventFd>>);

impl Notice {
    /// Rings by a write to `bell`.
    pub fn new(bell: Arc<EventFd>) -> Self {
        Self(Some(bell))
    }

    /// Tells whoever waits.
    pub fn ring(&self) {
        if let Some(bell) = &self.0 {
            // Refused only by a full counter, which rings as well.
            let _ = bell.write(1);
        }
    }
}

/// Why a device could not start serving.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It is serving already.
    #[error("the device is serving already")]
    Started,
    /// A queue that this device cannot do without was not made ready.
    #[error("queue {0} was not made ready")]
    QueueMissing(usize),
    /// The worker thread is gone.
    #[error("the device's worker thread has ended")]
    WorkerGone,
}

/// Why a device could not stop.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// Requests were still in flight when the limit ran out; the device goes on serving.
    #[error("{in_flight} requests did not complete within {limit_ms} ms")]
    Drain {
        /// Requests still in flight.
        in_flight: usize,
        /// The limit.
        limit_ms: u64,
    },
    /// The storage serves nobody here any more; what is in flight stays so for good.
    #[error("its storage is lost: {reason}")]
    Lost {
        /// Whose it is now, in words for the user.
        reason: String,
    },
    /// The worker thread is gone.
    #[error("the device's worker thread has ended")]
    WorkerGone,
}
