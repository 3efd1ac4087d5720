//! The machine and its phases. A call that is wrong in a phase cannot be written.
//!
//! ```text
//!            build                resume            begin_pause
//!   Plan ────────────► Paused ──────────► Running ─────────────► Pausing ──► Running: it did not drain
//!                       ▲  │                                      │  │
//!                       └──┼──────────────────────────────────────┘  │ a disk is lost
//!                          └── a disk is lost ──► Stranded ◄─────────┘
//! ```
//!
//! A transition that fails hands the machine back in the phase that it is really in. From Stranded there is no way back:
//! the guest's disk is another's now.

mod assemble;
mod change;
pub mod cpu_template;
pub mod disks;
mod flush;
pub mod handover;
mod lineage;
mod memory_slots;
mod pace;
mod pausing;
mod places;
pub mod plan;
mod platform;
mod plug;
mod pmem;
pub mod report;
mod restore;
mod round;
pub mod shell;
pub mod state;
#[cfg(test)]
pub(crate) mod testing;

use std::sync::{Arc, Mutex};

use coracle_devices::i8042::{I8042, KeyboardError};
use coracle_devices::serial::SerialPort;
use coracle_devices::virtio::balloon::BalloonControl;
use coracle_devices::virtio::blk::{BlkControl, LossSignal};
use coracle_devices::virtio::mem::{Blocks, MemControl};
use coracle_devices::virtio::mmio::TransportError;
use coracle_devices::virtio::net::NetControl;
use coracle_devices::virtio::rng::EntropyCounts;
use coracle_devices::virtio::vsock::VsockCounts;
use coracle_devices::vmgenid::GenerationId;
use coracle_storage::limit::SharedLimiter;
use coracle_storage::open::Hold;
use vm_memory::GuestMemoryMmap;

use crate::kvm::share::Share;
use crate::kvm::vcpu::{Vcpu, VcpuCounters, VcpuError};
use crate::kvm::vm::Vm;
use crate::memory::pager::{self, Pager, Remains};
use crate::migration::postcopy::target::Fetcher;

use self::lineage::Lineage;
use self::places::{Places, VirtioSlot};
use self::pmem::PmemSlot;

pub use assemble::{BuildError, build};
pub use change::{DriveChange, DriveChangeError, Drives, Progress};
pub use flush::PmemFlushError;
pub use pausing::{Pause, Pausing};
pub use platform::{GENERATION_MEMORY, PlatformError, tell_restored};
pub use plug::{Departed, Newcomer, PlugError, Plugged, Socket, StillUsed};
pub use pmem::PmemPlaceError;
pub use restore::{check_compatible, check_processors};
pub use round::{Round, RoundError};

/// The phase in which the guest runs.
#[derive(Debug)]
pub struct Running;

/// The phase in which no guest code runs and no device touches guest memory or a disk.
#[derive(Debug)]
pub struct Paused;

/// The phase in which no guest code runs, and never will again: a disk is lost. That one is left as it is; of the others
/// nothing is in flight.
#[derive(Debug)]
pub struct Stranded;

/// A built machine in phase `P`.
pub struct Machine<P> {
    /// Boxed: a transition moves the machine, and hands it back when it fails.
    parts: Box<Parts>,
    phase: P,
}

/// What a machine consists of, in the order in which it is taken apart.
struct Parts {
    vcpus: Vec<Vcpu>,
    /// Those of the drives, in their order, then those of the networks, in theirs, then the others.
    devices: Vec<VirtioSlot>,
    places: Places,
    /// After the devices: a lease ends when nobody uses the image any more.
    drives: Vec<DriveSlot>,
    groups: Vec<LimitGroup>,
    networks: Vec<NetworkSlot>,
    vsock_counts: Option<Arc<VsockCounts>>,
    balloon: Option<BalloonControl>,
    memory_hotplug: Option<MemControl>,
    /// Of memory that comes and goes, what there is.
    blocks: Option<Arc<Blocks>>,
    entropy_counts: Option<Arc<EntropyCounts>>,
    serial: Arc<Mutex<SerialPort>>,
    keyboard: Arc<Mutex<I8042>>,
    /// Its line is connected as long as it lives.
    generation: GenerationId,
    counters: Arc<VcpuCounters>,
    /// How much of the time the vCPUs may run.
    share: Arc<Share>,
    /// There until the end.
    vm: Option<Arc<Vm>>,
    /// Brings memory in; ended after whoever may wait for some.
    pager: Option<Pager>,
    /// The same, from the source of a migration.
    fetcher: Option<Fetcher>,
    memory: Arc<GuestMemoryMmap>,
    /// After KVM's part of the machine, which may write their files as long as it is there.
    pmem: Vec<PmemSlot>,
    lineage: Lineage,
    /// A snapshot remembers the generations of the disks.
    is_remembered: bool,
}

/// The control end of one drive.
struct DriveSlot {
    id: String,
    /// The group whose limits it shares.
    group: Option<String>,
    control: BlkControl,
    hold: Hold,
    /// It was taken over from a source that may have it back until the first of those is started.
    is_taken_over: bool,
}

/// The control end of one network interface.
struct NetworkSlot {
    id: String,
    control: NetControl,
}

/// Limits that the drives of one group share.
#[derive(Clone)]
pub struct LimitGroup {
    id: String,
    limiter: Arc<SharedLimiter>,
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
    /// A snapshot remembers the machine, and its disks have not been told.
    #[error(
        "a snapshot remembers the generations of the disks: they have to be raised before the guest runs on"
    )]
    Remembered,
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

impl<P> Machine<P> {
    fn in_phase<Q>(self, phase: Q) -> Machine<Q> {
        Machine {
            parts: self.parts,
            phase,
        }
    }

    /// What tells of the loss of each drive.
    pub fn loss_signals(&self) -> impl Iterator<Item = &Arc<LossSignal>> {
        self.parts.drives.iter().map(|drive| drive.control.loss())
    }

    /// The drives that are lost, and why.
    pub fn losses(&self) -> impl Iterator<Item = (&str, &str)> {
        self.loss_signals()
            .filter_map(|loss| Some((loss.drive_id(), loss.reason()?)))
    }

    /// How much of the guest's memory has been loaded, where that goes on.
    pub fn loading(&self) -> Option<&Arc<pager::Progress>> {
        self.parts.pager.as_ref().map(Pager::progress)
    }

    /// What fetches the guest's memory from the source of a migration, where that goes on.
    pub fn fetcher(&self) -> Option<&Fetcher> {
        let fetcher = self.parts.fetcher.as_ref();
        fetcher.filter(|fetcher| fetcher.status().left_bytes() > 0)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.parts.memory
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
}

impl Machine<Paused> {
    fn new(parts: Parts) -> Self {
        Self {
            parts: Box::new(parts),
            phase: Paused,
        }
    }

    /// Whether a snapshot remembers the generations of the disks: [`Self::begin_raise`] comes before [`Self::resume`] then.
    pub fn is_remembered(&self) -> bool {
        self.parts.is_remembered
    }

    /// Lets the devices serve and the guest run.
    ///
    /// # Errors
    ///
    /// [`Refused`] with the machine still paused.
    pub fn resume(self) -> Result<Machine<Running>, Refused<Paused>> {
        if self.parts.is_remembered {
            let error = TransitionError::Remembered;
            return Err(Refused { machine: self, error });
        }
        if let Err(error) = self.parts.start() {
            // Back to where it was: what did start stands still again.
            if let Err(also) = self.parts.stop() {
                log::error!("a machine that could not be resumed does not stand still: {also}");
            }
            return Err(Refused { machine: self, error });
        }
        Ok(self.in_phase(Running))
    }

    /// Gives the guest up: a disk of it was lost while it stood still.
    pub fn strand(self) -> Machine<Stranded> {
        self.in_phase(Stranded)
    }

    /// Takes the machine apart: threads have ended and disks are closed when it returns.
    pub fn retire(self) {
        drop(self.parts);
    }
}

impl Machine<Stranded> {
    /// Takes the machine apart, and waits for nothing of the lost disk.
    pub fn retire(self) {
        drop(self.parts);
    }
}

/// Takes a machine apart, in the order that matters.
impl Drop for Parts {
    fn drop(&mut self) {
        self.vcpus.clear();
        self.devices.drain(..).for_each(|slot| slot.clear());
        let of_pager = self.pager.take().map(Pager::end);
        let of_fetcher = self.fetcher.take().map(Fetcher::end);
        if [of_pager, of_fetcher].contains(&Some(Remains::Waiters)) {
            // KVM would wait here, for ever, for its workers that wait for memory; with the process they end.
            std::mem::forget(self.vm.take());
        }
    }
}

impl Parts {
    fn vm(&self) -> &Arc<Vm> {
        self.vm.as_ref().expect("a machine is there until it is dropped")
    }

    fn start(&self) -> Result<(), TransitionError> {
        self.devices.iter().try_for_each(VirtioSlot::start)?;
        Ok(self.vcpus.iter().try_for_each(Vcpu::run)?)
    }

    fn stop(&self) -> Result<(), TransitionError> {
        self.vcpus.iter().try_for_each(Vcpu::kick)?;
        self.vcpus.iter().try_for_each(Vcpu::wait_parked)?;
        self.devices.iter().try_for_each(VirtioSlot::stop)
    }
}

const NO_PANIC: &str = "no holder of a transport panics: the process aborts if one does";
