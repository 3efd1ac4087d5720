//! The machine and its phases. A call that is wrong in a phase cannot be written.
//!
//! ```text
//!            build                resume
//!   Plan ────────────► Paused ──────────────► Running
//!                        ▲                       │
//!                        └───────── pause ───────┘
//! ```
//!
//! A transition that fails hands the machine back in the phase that it is really in.

mod assemble;
pub mod cpu_template;
pub mod plan;
mod platform;
mod report;

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use coracle_devices::i8042::{I8042, KeyboardError};
use coracle_devices::serial::SerialPort;
use coracle_devices::virtio::blk::{BlkControl, ControlError};
use coracle_devices::virtio::mmio::{MmioTransport, TransportError};
use coracle_devices::virtio::rng::EntropyCounts;
use coracle_storage::limit::{RateLimiterConfig, SharedLimiter};
use coracle_storage::open::{Hold, Image};

use crate::kvm::vcpu::{Vcpu, VcpuCounters, VcpuError};
use crate::kvm::vm::Vm;

pub use assemble::{BuildError, build};

/// The phase in which the guest runs.
#[derive(Debug)]
pub struct Running;

/// The phase in which no guest code runs and no device touches guest memory or a disk.
#[derive(Debug)]
pub struct Paused;

/// A built machine in phase `P`.
pub struct Machine<P> {
    /// Boxed: a transition moves the machine, and hands it back when it fails.
    parts: Box<Parts>,
    phase: PhantomData<P>,
}

/// What a machine consists of, in the order in which it is taken apart.
struct Parts {
    vcpus: Vec<Vcpu>,
    devices: Vec<VirtioSlot>,
    /// After the devices: a lease ends when nobody uses the image any more.
    drives: Vec<DriveSlot>,
    groups: Vec<LimitGroup>,
    entropy_counts: Option<Arc<EntropyCounts>>,
    serial: Arc<Mutex<SerialPort>>,
    keyboard: Arc<Mutex<I8042>>,
    counters: Arc<VcpuCounters>,
    _vm: Vm,
}

/// The control end of one drive.
struct DriveSlot {
    id: String,
    /// The group whose limits it shares.
    group: Option<String>,
    control: BlkControl,
    /// Its place among the devices.
    at: usize,
    hold: Hold,
}

/// Limits that the drives of one group share.
struct LimitGroup {
    id: String,
    limiter: Arc<SharedLimiter>,
}

/// One virtio device in its place on the bus.
struct VirtioSlot {
    /// The device's id in the configuration.
    id: String,
    transport: Arc<Mutex<MmioTransport>>,
}

/// A transition that did not happen: the machine, in the phase that it is in, and why.
pub struct Refused<P> {
    /// The machine, as it was.
    pub machine: Machine<P>,
    /// What stood in the way.
    pub error: TransitionError,
}

/// Why a machine could not change its phase.
#[derive(Debug, thiserror::Error)]
pub enum TransitionError {
    /// A vCPU does not follow.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device could not be stopped or started.
    #[error("device `{id}` does not follow; the machine stays in the phase that it was in")]
    Device {
        /// The device's id.
        id: String,
        /// Why.
        #[source]
        source: TransportError,
    },
}

/// Why a drive could not be changed; it goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum DriveChangeError {
    /// There is no such drive.
    #[error("there is no drive `{0}`; GET /vm/config lists them")]
    Unknown(String),
    /// Its queue could not be drained, or not be started again.
    #[error(transparent)]
    Device(#[from] TransitionError),
    /// The image or the limits are not taken.
    #[error("drive `{id}` is as it was")]
    Control {
        /// The drive's id.
        id: String,
        /// Why.
        #[source]
        source: ControlError,
    },
}

impl<P> Machine<P> {
    fn in_phase<Q>(self) -> Machine<Q> {
        Machine {
            parts: self.parts,
            phase: PhantomData,
        }
    }

    /// The guest's serial port.
    pub fn serial(&self) -> &Arc<Mutex<SerialPort>> {
        &self.parts.serial
    }

    /// Presses Ctrl+Alt+Del on the guest's keyboard.
    ///
    /// # Errors
    ///
    /// When the guest does not read its keyboard.
    pub fn press_ctrl_alt_del(&self) -> Result<(), KeyboardError> {
        let mut keyboard = self
            .parts
            .keyboard
            .lock()
            .expect("no holder of the keyboard panics");
        keyboard.press_ctrl_alt_del()
    }

    /// Whether `path` names the image that drive `id` has, by whatever name.
    pub fn has_image(&self, id: &str, path: &str) -> bool {
        let drive = self.parts.drives.iter().find(|drive| drive.id == id);
        drive.is_some_and(|drive| drive.hold.is_of(path))
    }

    /// Changes the limits of drive `id`.
    ///
    /// # Errors
    ///
    /// When there is no such drive, or its worker is gone.
    pub fn limit_drive(&self, id: &str, limits: RateLimiterConfig) -> Result<(), DriveChangeError> {
        let drive = self.parts.drive(id)?;
        drive
            .control
            .set_limiter(&limits)
            .map_err(|source| drive.refused(source))
    }

    /// Changes the limits that the drives of group `id` share.
    ///
    /// # Errors
    ///
    /// When the worker of a drive is gone. No drive is in a group that is not there: then nothing happens.
    pub fn limit_group(&self, id: &str, limits: RateLimiterConfig) -> Result<(), DriveChangeError> {
        let Some(group) = self.parts.groups.iter().find(|group| group.id == id) else {
            return Ok(());
        };
        group.limiter.update(&limits, Instant::now());
        let members = self.parts.drives.iter();
        for drive in members.filter(|drive| drive.group.as_deref() == Some(id)) {
            drive
                .control
                .reconsider()
                .map_err(|source| drive.refused(source))?;
        }
        Ok(())
    }

    /// Makes the image of drive `id` `size_bytes` long, and tells the guest if it was shorter.
    ///
    /// # Errors
    ///
    /// When there is no such drive, or its image does not become that long: it would have to shrink, or the
    /// storage refuses. It is then as long as it was.
    pub fn grow_drive(&mut self, id: &str, size_bytes: u64) -> Result<(), DriveChangeError> {
        let (drive, slot) = self.parts.drive_in_slot(id)?;
        let has_grown = drive
            .control
            .grow(size_bytes)
            .map_err(|source| drive.refused(source))?;
        if has_grown {
            slot.lock().announce_configuration();
        }
        Ok(())
    }
}

impl Machine<Paused> {
    fn new(parts: Parts) -> Self {
        Self {
            parts: Box::new(parts),
            phase: PhantomData,
        }
    }

    /// Lets the devices serve and the guest run.
    ///
    /// # Errors
    ///
    /// [`Refused`] with the machine still paused.
    pub fn resume(self) -> Result<Machine<Running>, Refused<Paused>> {
        if let Err(error) = self.parts.start() {
            // Back to where it was: what did start stands still again.
            if let Err(also) = self.parts.stop() {
                log::error!("a machine that could not be resumed does not stand still: {also}");
            }
            return Err(Refused { machine: self, error });
        }
        Ok(self.in_phase())
    }

    /// Gives drive `id` another image; the guest hears of its size when it runs again.
    ///
    /// # Errors
    ///
    /// The drive then still has its old image.
    pub fn replace_image(&mut self, id: &str, image: Image) -> Result<(), DriveChangeError> {
        let (drive, slot) = self.parts.drive_in_slot(id)?;
        drive.replace(image)?;
        slot.lock().announce_configuration();
        Ok(())
    }

    /// Takes the machine apart: threads have ended and disks are closed when it returns.
    pub fn retire(self) {
        drop(self.parts);
    }
}

impl Machine<Running> {
    /// Stops the guest and drains its devices; when it returns nothing is in flight.
    ///
    /// The order matters: no vCPU runs when the first device stops, so no device gets new work, and
    /// what is in flight may still raise its interrupts.
    ///
    /// # Errors
    ///
    /// [`Refused`] with the machine still running.
    pub fn pause(self) -> Result<Machine<Paused>, Refused<Running>> {
        if let Err(error) = self.parts.stop() {
            // Back to where it was: devices that did stop serve again, then the guest runs on.
            if let Err(also) = self.parts.start() {
                log::error!("a machine that could not be paused does not go on: {also}");
            }
            return Err(Refused { machine: self, error });
        }
        Ok(self.in_phase())
    }

    /// Gives drive `id` another image while the guest runs: its queue is drained and waits meanwhile,
    /// the other devices serve on.
    ///
    /// # Errors
    ///
    /// The drive then still has its old image and serves.
    pub fn replace_image(&mut self, id: &str, image: Image) -> Result<(), DriveChangeError> {
        let (drive, slot) = self.parts.drive_in_slot(id)?;
        // One lock for the whole change: a driver that resets the device meanwhile waits for its end.
        let mut transport = slot.lock();
        transport.pause().map_err(|source| slot.failed(source))?;
        let replaced = drive.replace(image);
        transport.resume().map_err(|source| slot.failed(source))?;
        // Its lease ends with this function: the guest need not wait for that.
        let _old = replaced?;
        transport.announce_configuration();
        Ok(())
    }
}

impl Parts {
    fn start(&self) -> Result<(), TransitionError> {
        self.devices.iter().try_for_each(VirtioSlot::start)?;
        Ok(self.vcpus.iter().try_for_each(Vcpu::run)?)
    }

    fn stop(&self) -> Result<(), TransitionError> {
        self.vcpus.iter().try_for_each(Vcpu::kick)?;
        self.vcpus.iter().try_for_each(Vcpu::wait_parked)?;
        self.devices.iter().try_for_each(VirtioSlot::stop)
    }

    fn drive(&self, id: &str) -> Result<&DriveSlot, DriveChangeError> {
        let drive = self.drives.iter().find(|drive| drive.id == id);
        drive.ok_or_else(|| DriveChangeError::Unknown(id.to_owned()))
    }

    /// A drive, and its device.
    fn drive_in_slot(&mut self, id: &str) -> Result<(&mut DriveSlot, &VirtioSlot), DriveChangeError> {
        let drive = self.drives.iter_mut().find(|drive| drive.id == id);
        let drive = drive.ok_or_else(|| DriveChangeError::Unknown(id.to_owned()))?;
        let slot = self.devices.get(drive.at);
        Ok((drive, slot.expect("a drive keeps the place that it was put in")))
    }
}

impl DriveSlot {
    /// Uses another image from the next start on, and returns what made the old one ours.
    fn replace(&mut self, image: Image) -> Result<Hold, DriveChangeError> {
        let Image { backend, hold } = image;
        match self.control.replace(backend) {
            Ok(()) => Ok(std::mem::replace(&mut self.hold, hold)),
            Err(source) => {
                // The new image is still open.
                if let ControlError::Late = source {
                    self.hold.keep(hold);
                }
                Err(self.refused(source))
            }
        }
    }

    fn refused(&self, source: ControlError) -> DriveChangeError {
        DriveChangeError::Control {
            id: self.id.clone(),
            source,
        }
    }
}

impl VirtioSlot {
    fn start(&self) -> Result<(), TransitionError> {
        self.lock().resume().map_err(|source| self.failed(source))
    }

    fn stop(&self) -> Result<(), TransitionError> {
        self.lock().pause().map_err(|source| self.failed(source))
    }

    fn failed(&self, source: TransportError) -> TransitionError {
        TransitionError::Device {
            id: self.id.clone(),
            source,
        }
    }

    fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        self.transport
            .lock()
            .expect("no holder of a transport panics: the process aborts if one does")
    }
}
