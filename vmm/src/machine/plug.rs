//! Devices that come to a guest that runs, and go again.
//!
//! ```text
//!   opened, leased, made, connected (a thread of its own) ──► plug: put in its place, the guest told ──► its driver takes it up
//!   its driver lets go of it (a reset) ──► unplug: taken out ──► disconnected, closed (a thread of its own)
//! ```

use std::sync::Arc;

use coracle_devices::virtio::blk::{DriveConfig, LossSignal};
use coracle_devices::virtio::device::VirtioDevice;
use coracle_devices::virtio::net::NetworkInterfaceConfig;
use coracle_storage::lease::{Owner, Succession};

use super::assemble::{drive_of, network_of};
use super::disks::Course;
use super::places::{Reach, Wired};
use super::plan::{DiskPlan, NetworkPlan, PlanError};
use super::{BuildError, DriveSlot, LimitGroup, Machine, NetworkSlot, Parts, Running};
use crate::kvm::vm::Vm;

/// What can come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// A disk.
    Drive,
    /// A network interface.
    Network,
}

impl Plugged {
    /// Its section among the metrics.
    pub fn section(self) -> &'static str {
        match self {
            Self::Drive => "block",
            Self::Network => "net",
        }
    }
}

/// A device that is open and made, and that no guest has seen.
pub struct Newcomer {
    // The device first: a lease ends when nobody uses the image any more.
    wired: Wired,
    what: What,
}

/// A place for a device, and what it will be connected to.
pub struct Socket {
    vm: Arc<Vm>,
    reach: Reach,
    place: u32,
}

enum What {
    Drive(DriveSlot),
    Network(NetworkSlot),
}

/// A device that its guest has let go of. What is behind it is closed when this is dropped.
pub struct Departed {
    // The device first: a lease ends when nobody uses the image any more.
    _wired: Wired,
    _drive: Option<DriveSlot>,
}

/// Why a device cannot come.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// Something that it needs cannot be opened.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// It cannot be made.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Every place is taken.
    #[error("every place for a device is taken: take one out first (DELETE /drives or /network-interfaces)")]
    NoVacancy,
    /// The guest knows of no place.
    #[error(
        "this guest was booted by a version of the monitor whose devices do not come and go, and goes on with its tables: \
         boot it anew"
    )]
    OldTables,
}

/// A device cannot go, as its guest's driver has it.
#[derive(Debug, thiserror::Error)]
#[error(
    "the guest's driver has `{id}`: have it let go first, and ask again. In Linux: unmount what is on it, \
     then `echo LNRO0005:{place:02x} > /sys/bus/platform/drivers/virtio-mmio/unbind`"
)]
pub struct StillUsed {
    id: String,
    place: u32,
}

impl Newcomer {
    /// Opens the image of `drive`, leases it to `owner`, and makes a device for it that is connected to `socket`; one of a group
    /// shares the limits of that among `groups`. What is with a server may take as long as that does.
    ///
    /// # Errors
    ///
    /// What cannot be had.
    pub fn drive(
        drive: &DriveConfig,
        owner: &Owner,
        groups: &[LimitGroup],
        socket: Socket,
    ) -> Result<Self, PlugError> {
        let plan = DiskPlan::new(drive, owner, &Course::Own(Succession::Raises), groups)?;
        let (mut slot, device) = drive_of(plan)?;
        slot.settle()?;
        let wired = socket.wire(&slot.id, Box::new(device))?;
        Ok(Self {
            wired,
            what: What::Drive(slot),
        })
    }

    /// Opens the tap of `network`, and makes a device for it that is connected to `socket`.
    ///
    /// # Errors
    ///
    /// What cannot be had.
    pub fn network(network: &NetworkInterfaceConfig, socket: Socket) -> Result<Self, PlugError> {
        let (slot, device) = network_of(NetworkPlan::new(network)?)?;
        let wired = socket.wire(&slot.id, Box::new(device))?;
        Ok(Self {
            wired,
            what: What::Network(slot),
        })
    }

    /// What it is.
    pub fn kind(&self) -> Plugged {
        match self.what {
            What::Drive(_) => Plugged::Drive,
            What::Network(_) => Plugged::Network,
        }
    }

    /// What tells of the loss of its disk, if it has one.
    pub fn loss_signal(&self) -> Option<Arc<LossSignal>> {
        match &self.what {
            What::Drive(slot) => Some(Arc::clone(slot.control.loss())),
            What::Network(_) => None,
        }
    }
}

impl Machine<Running> {
    /// The groups whose limits a drive that comes may share.
    pub fn limit_groups(&self) -> Vec<LimitGroup> {
        self.parts.groups.clone()
    }

    /// A place for a device that is to come.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn socket(&self) -> Result<Socket, PlugError> {
        let parts = &self.parts;
        if parts.places.are_without_vacancies() {
            return Err(PlugError::OldTables);
        }
        let place = parts.places.vacancy(&parts.devices).ok_or(PlugError::NoVacancy)?;
        Ok(Socket {
            vm: Arc::clone(parts.vm()),
            reach: Reach::new(&parts.memory, parts.lineage.devices(), parts.blocks.clone()),
            place,
        })
    }

    /// Puts `newcomer` in its place, and has the guest look at it.
    pub fn plug(&mut self, newcomer: Newcomer) {
        let Newcomer { wired, what } = newcomer;
        let Parts {
            places,
            devices,
            drives,
            networks,
            ..
        } = &mut *self.parts;
        let (at, slot) = match what {
            What::Drive(drive) => {
                let slot = places.put(&drive.id, wired);
                drives.push(drive);
                (drives.len() - 1, slot)
            }
            What::Network(network) => {
                let slot = places.put(&network.id, wired);
                networks.push(network);
                (drives.len() + networks.len() - 1, slot)
            }
        };
        places.hotplug.came(slot.place());
        devices.insert(at, slot);
    }

    /// Tells the guest again of devices of which it has not heard, and says whether there are any.
    pub fn tell_again(&self) -> bool {
        self.parts.places.hotplug.again()
    }

    /// Takes the device `id` of that `kind` out.
    ///
    /// # Errors
    ///
    /// When the guest's driver has it.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn unplug(&mut self, kind: Plugged, id: &str) -> Result<Departed, StillUsed> {
        let parts = &mut self.parts;
        let drives = parts.drives.len();
        let at = match kind {
            Plugged::Drive => parts.drives.iter().position(|drive| drive.id == id),
            Plugged::Network => parts.networks.iter().position(|network| network.id == id),
        };
        let at = at.expect("the machine has what its configuration has");
        Ok(match kind {
            Plugged::Drive => Departed {
                _wired: parts.take_out(at)?,
                _drive: Some(parts.drives.remove(at)),
            },
            Plugged::Network => {
                let wired = parts.take_out(drives + at)?;
                parts.networks.remove(at);
                Departed {
                    _wired: wired,
                    _drive: None,
                }
            }
        })
    }
}

impl Socket {
    fn wire(self, id: &str, device: Box<dyn VirtioDevice>) -> Result<Wired, BuildError> {
        let wired = Wired::new(&self.vm, self.place, device, &self.reach);
        wired.map_err(|error| error.of(id))
    }
}

impl Parts {
    /// Takes the device number `at` out of its place.
    fn take_out(&mut self, at: usize) -> Result<Wired, StillUsed> {
        let slot = self.devices.get(at).expect("every device has a slot");
        let device = self.places.take(self.vm(), slot);
        let device = device.ok_or_else(|| StillUsed {
            id: slot.id.clone(),
            place: slot.place(),
        })?;
        self.devices.remove(at);
        Ok(device)
    }
}
