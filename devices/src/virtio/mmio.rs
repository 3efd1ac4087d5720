//! The register file of one virtio-mmio device, version 2 (virtio 1.2, 4.2.2).
//!
//! ```text
//!            ACKNOWLEDGE, DRIVER      FEATURES_OK          DRIVER_OK: start(session)
//!   Idle ──────────────────────► … ───────────────► … ────────────────────────────► Serving
//!    ▲                                                                               │  ▲
//!    ├──────── write 0: stop() gives the session, which is dropped ──────────────────┤  │ resume()
//!    │                                                                               ▼  │
//!    │                                                                       pause(): Paused
//!    └── stop() at last ── Resetting ◄── write 0: stop() ran out of time ────────────┘
//!
//!   as after power-on ── restore(state) ──► Idle or Paused, until resume()
//! ```
//!
//! A reset whose drain runs out of time must neither keep the vCPU for ever nor let go of memory that
//! requests still use. So the write returns after the device's own limit, the status goes on
//! reading as not zero (the driver must wait for zero, 2.4.2), and each further look at the status
//! tries again. Until it succeeds every other write is ignored.

mod pause;
mod registers;
mod state;
#[cfg(test)]
mod tests;
mod window;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{
    ActiveQueue, INTERRUPT_CONFIGURATION, INTERRUPT_NEEDS_RESET, INTERRUPT_USED_BUFFER, Interrupt, Session,
    StartError, StopError, VirtioDevice,
};
use super::dirty::DirtyPages;
use super::mem::Blocks;
use super::ring::{QueueState, RingError, Virtqueue};
use crate::bus::BusDevice;
use crate::complaints::Complaints;
use registers::{Registers, register, status};

pub use pause::{Pause, TransportError};
pub use state::{NotPaused, RestoreError, TransportQueueState, TransportState};
pub use window::Window;

/// How many addresses one device takes: the registers, and as much configuration space again and more.
pub const MMIO_LEN: u64 = 0x1000;
/// The register that the driver writes a queue's index to: where the vmm puts the ioeventfds.
pub const QUEUE_NOTIFY: u64 = 0x050;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Where the configuration space begins.
const CONFIG: u64 = 0x100;
/// As much of the configuration space as is compared to notice a change; no device has more.
const CONFIG_BYTES_MAX: usize = 256;

/// A queue that the driver made ready and that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("queue {index}: {error}")]
pub struct QueueError {
    /// Which one.
    pub index: usize,
    /// What is wrong with it.
    pub error: RingError,
}

/// What a driver's DRIVER_OK can fail by; the guest hears DEVICE_NEEDS_RESET, the log hears this.
#[derive(Debug, thiserror::Error)]
enum ActivateError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Where the device's session is.
enum Life {
    /// There is none.
    Idle,
    /// The device has it.
    Serving,
    /// It waits here for [`MmioTransport::resume`].
    Paused(Session),
    /// The driver asked for a reset, and the device has not given it back yet.
    Resetting,
}

/// One virtio device on the MMIO bus.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemoryMmap>,
    /// Where pages are tracked.
    dirty: Option<Arc<DirtyPages>>,
    /// Of memory that comes and goes, what there is.
    blocks: Option<Arc<Blocks>>,
    registers: Registers,
    life: Life,
    /// Whoever paused the device has not resumed it: a session that the driver makes meanwhile waits.
    is_paused: bool,
    interrupt_status: Arc<AtomicU32>,
    line: Arc<EventFd>,
    /// Restored with a reason that the driver has not acknowledged: its interrupt may not have got through.
    owes_interrupt: bool,
    kicks: Vec<Arc<EventFd>>,
    generation: u32,
    config_seen: [u8; CONFIG_BYTES_MAX],
    /// Each of them is the driver's doing, or can be had again by a reset.
    complaints: Complaints,
}

impl MmioTransport {
    /// A transport around an idle device, as after power-on.
    ///
    /// # Errors
    ///
    /// When the eventfds for kicks and interrupts cannot be made.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Arc<GuestMemoryMmap>) -> io::Result<Self> {
        // Non-blocking: a counter that nobody reads must not stop the thread that writes it.
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        let kicks = device
            .queue_sizes_max()
            .iter()
            .map(|_| eventfd())
            .collect::<io::Result<Vec<_>>>()?;
        let mut transport = Self {
            memory,
            dirty: None,
            blocks: None,
            registers: Registers::new(device.queue_sizes_max()),
            device,
            life: Life::Idle,
            is_paused: false,
            interrupt_status: Arc::default(),
            line: eventfd()?,
            owes_interrupt: false,
            kicks,
            generation: 0,
            config_seen: [0; CONFIG_BYTES_MAX],
            complaints: Complaints::default(),
        };
        transport.device.read_config(0, &mut transport.config_seen);
        Ok(transport)
    }

    /// The eventfds that notifications write, by queue index: what the driver writes to [`QUEUE_NOTIFY`].
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// The eventfd that raises the device's interrupt.
    pub fn line(&self) -> &Arc<EventFd> {
        &self.line
    }

    /// Marks in `dirty`, or nowhere any more, which pages the device writes. What belongs to its rings is marked by
    /// [`Self::save`] at last.
    ///
    /// # Errors
    ///
    /// When the device is being served, or not yet reset.
    pub fn track(&mut self, dirty: Option<Arc<DirtyPages>>) -> Result<(), NotPaused> {
        match &mut self.life {
            Life::Idle => {}
            Life::Paused(session) => {
                for queue in session.queues.iter_mut().flatten() {
                    queue.ring.track(dirty.clone());
                }
            }
            Life::Serving | Life::Resetting => return Err(NotPaused),
        }
        self.dirty = dirty;
        Ok(())
    }

    /// Has what is not plugged of `blocks` be no memory for the device. Its rings are looked at when they are made ready.
    ///
    /// # Errors
    ///
    /// When a driver has the device.
    pub fn restrict(&mut self, blocks: Option<Arc<Blocks>>) -> Result<(), NotPaused> {
        match self.life {
            Life::Idle => self.blocks = blocks,
            Life::Paused(_) | Life::Serving | Life::Resetting => return Err(NotPaused),
        }
        Ok(())
    }

    /// Tells the driver, if there is one, to read the configuration space again.
    pub fn announce_configuration(&self) {
        if !matches!(self.life, Life::Idle | Life::Resetting) {
            self.interrupt().configuration_changed();
        }
    }

    /// Whether no driver has the device: none has come yet, or it has let go of it by a reset.
    pub fn is_released(&self) -> bool {
        matches!(self.life, Life::Idle) && self.registers.status & status::DRIVER == 0
    }

    fn interrupt(&self) -> Interrupt {
        Interrupt::new(Arc::clone(&self.interrupt_status), Arc::clone(&self.line))
    }

    /// Sets DEVICE_NEEDS_RESET and tells the driver.
    fn give_up(&mut self, why: &str) {
        self.complaints.complain(format_args!(
            "virtio {:?} needs a reset: {why}",
            self.device.kind()
        ));
        self.life = Life::Idle;
        self.interrupt().device_needs_reset();
    }

    /// Everything as new.
    fn clear(&mut self) {
        self.device.reset_config();
        self.registers = Registers::new(self.device.queue_sizes_max());
        self.life = Life::Idle;
        self.owes_interrupt = false;
        self.interrupt_status.store(0, Ordering::SeqCst);
        for kick in &self.kicks {
            // Empties the counter; fails only when it is empty.
            let _ = kick.read();
        }
    }

    fn reset(&mut self) {
        if matches!(self.life, Life::Serving | Life::Resetting) {
            match self.device.stop() {
                Ok(_session_dropped) => {}
                // There is nothing left that could be waited for; the device will refuse to start.
                Err(StopError::WorkerGone) => {
                    self.complaints.complain(format_args!(
                        "the worker of virtio {:?} has ended",
                        self.device.kind()
                    ));
                }
                Err(error @ (StopError::Drain { .. } | StopError::Lost { .. })) => {
                    self.complaints.complain(format_args!(
                        "the reset of virtio {:?} goes on: {error}",
                        self.device.kind()
                    ));
                    self.life = Life::Resetting;
                    return;
                }
            }
        }
        self.clear();
    }

    fn status(&mut self) -> u32 {
        if matches!(self.life, Life::Resetting) {
            self.reset();
        }
        match self.interrupt_status.load(Ordering::SeqCst) & INTERRUPT_NEEDS_RESET {
            0 => self.registers.status,
            _ => self.registers.status | status::DEVICE_NEEDS_RESET,
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        if matches!(self.life, Life::Resetting) {
            return;
        }
        // Bits are only ever added, each when the one before it is there (3.1.1).
        let added = value & !self.registers.status;
        for (bit, needs) in status::ORDER {
            let ready = self.registers.status & needs == needs;
            let (offered, needed) = (self.device.features(), self.device.features_needed());
            let accepted = bit != status::FEATURES_OK || self.registers.features_are_within(offered, needed);
            if added & bit != 0 && ready && accepted {
                self.registers.status |= bit;
                if bit == status::DRIVER_OK
                    && let Err(error) = self.activate()
                {
                    self.give_up(&error.to_string());
                }
            }
        }
    }

    /// Builds the queues that are ready and gives them to the device.
    fn activate(&mut self) -> Result<(), ActivateError> {
        let session = self.session(&self.registers, std::iter::repeat(0))?;
        if self.is_paused {
            self.life = Life::Paused(session);
            return Ok(());
        }
        self.device.start(session)?;
        self.life = Life::Serving;
        Ok(())
    }

    /// A session with the queues of `registers` that are ready, each at its position: so many chains, modulo 2^16, were
    /// taken and given back. Does not look into the guest's memory.
    fn session(
        &self,
        registers: &Registers,
        positions: impl Iterator<Item = u16>,
    ) -> Result<Session, QueueError> {
        let features = registers.driver_features;
        let mut queues = Vec::with_capacity(self.kicks.len());
        let setups = registers.queues.iter().zip(&self.kicks).zip(positions);
        for (index, ((setup, kick), position)) in setups.enumerate() {
            if !setup.ready {
                queues.push(None);
                continue;
            }
            let state = QueueState {
                layout: setup.layout,
                next_avail: position,
                next_used: position,
            };
            let mut ring = Virtqueue::restore(Arc::clone(&self.memory), state, features)
                .map_err(|error| QueueError { index, error })?;
            if let Some(blocks) = &self.blocks {
                ring.restrict(Arc::clone(blocks))
                    .map_err(|error| QueueError { index, error })?;
            }
            ring.track(self.dirty.clone());
            queues.push(Some(ActiveQueue {
                ring,
                kick: Arc::clone(kick),
            }));
        }
        Ok(Session {
            memory: Arc::clone(&self.memory),
            features,
            queues,
            interrupt: self.interrupt(),
        })
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.kind() as u32,
            register::VENDOR_ID => 0,
            register::DEVICE_FEATURES => self.registers.window(self.device.features()),
            register::QUEUE_SIZE_MAX => self
                .registers
                .selected()
                .map_or(0, |queue| u32::from(queue.size_max)),
            register::QUEUE_READY => self.registers.selected().is_some_and(|queue| queue.ready).into(),
            register::INTERRUPT_STATUS => {
                self.interrupt_status.load(Ordering::SeqCst)
                    & (INTERRUPT_USED_BUFFER | INTERRUPT_CONFIGURATION)
            }
            register::STATUS => self.status(),
            // No shared memory: length and base of every region read as all ones (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.config_generation(),
            // Write-only and reserved registers.
            _ => 0,
        }
    }

    /// A number that differs whenever the configuration space does: compared here, so that no device
    /// has to remember to count.
    fn config_generation(&mut self) -> u32 {
        let mut config = [0; CONFIG_BYTES_MAX];
        self.device.read_config(0, &mut config);
        if config != self.config_seen {
            self.config_seen = config;
            self.generation = self.generation.wrapping_add(1);
        }
        self.generation
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            register::DRIVER_FEATURES => self.registers.write_driver_features(value),
            register::QUEUE_SEL => self.registers.queue_sel = value,
            register::QUEUE_SIZE..=register::QUEUE_READY
            | register::QUEUE_DESC_LOW..=register::QUEUE_DEVICE_HIGH => {
                self.registers.write_queue(offset, value)
            }
            QUEUE_NOTIFY => self.notify(value),
            register::INTERRUPT_ACK => {
                let bits = value & (INTERRUPT_USED_BUFFER | INTERRUPT_CONFIGURATION);
                self.interrupt_status.fetch_and(!bits, Ordering::SeqCst);
            }
            register::STATUS => self.write_status(value),
            // Read-only and reserved registers.
            _ => {}
        }
    }

    /// A notification that KVM did not take by its ioeventfd.
    fn notify(&self, queue: u32) {
        let kick = usize::try_from(queue)
            .ok()
            .and_then(|queue| self.kicks.get(queue));
        if let (Some(kick), Life::Serving) = (kick, &self.life) {
            // Refused only when the counter is full, and then the device has been told.
            let _ = kick.write(1);
        }
    }
}

/// Control registers answer aligned accesses of 32 bits (4.2.2.2); others read as zero and change
/// nothing. The configuration space takes every width.
impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if matches!(self.life, Life::Resetting) && offset != register::STATUS {
            return;
        }
        if let Some(offset) = offset.checked_sub(CONFIG) {
            // The driver may touch the device once it has found itself to be its driver (3.1.1).
            if self.registers.status & status::DRIVER != 0 {
                self.device.write_config(offset, data);
            }
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}
