//! Devices that come to a guest that runs, and go again.
//!
//! ```text
//!   opened, leased, made (a thread of its own) ──► plug: put in a place, connected, the guest told ──► its driver takes it up
//!   its driver lets go of it (a reset) ──► unplug: disconnected, taken out ──► closed (a thread of its own)
//! ```

use std::fmt;
use std::sync::Arc;

use coracle_devices::virtio::blk::{DriveConfig, LossSignal};
use coracle_devices::virtio::device::VirtioDevice;
use coracle_devices::virtio::mmio::MmioTransport;
use coracle_devices::virtio::net::NetworkInterfaceConfig;
use coracle_storage::lease::{Owner, Succession};

use super::assemble::{drive_of, network_of};
use super::disks::Course;
use super::plan::{DiskPlan, NetworkPlan, PlanError};
use super::{BuildError, DriveSlot, LimitGroup, Machine, NetworkSlot, Parts, Running};

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

impl fmt::Display for Plugged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Drive => "drive",
            Self::Network => "network interface",
        })
    }
}

/// A device that is open and made, and that no guest has seen.
pub struct Newcomer {
    device: Box<dyn VirtioDevice>,
    what: What,
}

enum What {
    Drive(DriveSlot),
    Network(NetworkSlot),
}

/// A device that its guest has let go of. What is behind it is closed when this is dropped.
pub struct Departed {
    // The device first: a lease ends when nobody uses the image any more.
    _device: MmioTransport,
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

/// Why a device cannot go.
#[derive(Debug, thiserror::Error)]
pub enum UnplugError {
    /// There is none of that name.
    #[error("there is no {kind} `{id}`; GET /vm/config lists them")]
    Unknown {
        /// What is looked for.
        kind: Plugged,
        /// Its name.
        id: String,
    },
    /// The guest has it.
    #[error(
        "the guest's driver has `{id}`: have it let go first, and ask again. In Linux: unmount what is on it, \
         then `echo LNRO0005:{place:02x} > /sys/bus/platform/drivers/virtio-mmio/unbind`"
    )]
    Used {
        /// The device.
        id: String,
        /// The number of its place.
        place: u32,
    },
}

impl Newcomer {
    /// Opens the image of `drive`, leases it to `owner`, and makes a device for it; one of a group shares the limits of that
    /// among `groups`. What is with a server may take as long as that does.
    ///
    /// # Errors
    ///
    /// What cannot be had.
    pub fn drive(drive: &DriveConfig, owner: &Owner, groups: &[LimitGroup]) -> Result<Self, PlugError> {
        let plan = DiskPlan::new(drive, owner, &Course::Own(Succession::Raises), groups)?;
        let (mut slot, device) = drive_of(plan)?;
        slot.settle()?;
        Ok(Self {
            device: Box::new(device),
            what: What::Drive(slot),
        })
    }

    /// Opens the tap of `network`, and makes a device for it.
    ///
    /// # Errors
    ///
    /// What cannot be had.
    pub fn network(network: &NetworkInterfaceConfig) -> Result<Self, PlugError> {
        let (slot, device) = network_of(NetworkPlan::new(network)?)?;
        Ok(Self {
            device: Box::new(device),
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

    /// Says whether a device can come at all.
    ///
    /// # Errors
    ///
    /// When there is no place for it.
    pub fn check_vacancy(&self) -> Result<(), PlugError> {
        self.parts.vacancy().map(drop)
    }

    /// Gives `newcomer` a place, and has the guest look at it.
    ///
    /// # Errors
    ///
    /// When there is no place, or the host refuses: then the guest has seen nothing, and what was opened is closed.
    pub fn plug(&mut self, newcomer: Newcomer) -> Result<(), PlugError> {
        let place = self.parts.vacancy()?;
        let Newcomer { device, what } = newcomer;
        let Parts {
            vm,
            memory,
            lineage,
            places,
            ..
        } = &mut *self.parts;
        let vm = vm.as_ref().expect("a machine is there until it is dropped");
        let id = match &what {
            What::Drive(slot) => &slot.id,
            What::Network(slot) => &slot.id,
        };
        let slot = places.insert(vm, memory, lineage.devices(), (id, place, device))?;
        if let Err(source) = places.hotplug.came(place) {
            let id = id.clone();
            places.remove(vm, &slot);
            return Err(BuildError::Device { id, source }.into());
        }
        let drives = self.parts.drives.len();
        match what {
            What::Drive(drive) => {
                self.parts.devices.insert(drives, slot);
                self.parts.drives.push(drive);
            }
            What::Network(network) => {
                let networks = self.parts.networks.len();
                self.parts.devices.insert(drives + networks, slot);
                self.parts.networks.push(network);
            }
        }
        Ok(())
    }

    /// Takes the device `id` of that `kind` out.
    ///
    /// # Errors
    ///
    /// When there is none, or the guest's driver has it.
    pub fn unplug(&mut self, kind: Plugged, id: &str) -> Result<Departed, UnplugError> {
        let parts = &mut self.parts;
        let drives = parts.drives.len();
        let at = match kind {
            Plugged::Drive => parts.drives.iter().position(|drive| drive.id == id),
            Plugged::Network => parts.networks.iter().position(|network| network.id == id),
        };
        let at = at.ok_or_else(|| UnplugError::Unknown {
            kind,
            id: id.to_owned(),
        })?;
        Ok(match kind {
            Plugged::Drive => Departed {
                _device: parts.take_out(at)?,
                _drive: Some(parts.drives.remove(at)),
            },
            Plugged::Network => {
                let device = parts.take_out(drives + at)?;
                parts.networks.remove(at);
                Departed {
                    _device: device,
                    _drive: None,
                }
            }
        })
    }
}

impl Parts {
    fn vacancy(&self) -> Result<u32, PlugError> {
        if self.places.are_without_vacancies() {
            return Err(PlugError::OldTables);
        }
        self.places.vacancy().ok_or(PlugError::NoVacancy)
    }

    /// Takes the device number `at` out of its place.
    fn take_out(&mut self, at: usize) -> Result<MmioTransport, UnplugError> {
        let slot = self.devices.get(at).expect("every device has a slot");
        let device = self.places.remove(self.vm(), slot);
        let device = device.ok_or_else(|| UnplugError::Used {
            id: slot.id.clone(),
            place: slot.place(),
        })?;
        self.devices.remove(at);
        Ok(device)
    }
}
