//! Everything of a machine but its memory, as plain data, and its sections.

use coracle_devices::i8042::I8042State;
use coracle_devices::serial::SerialPortState;
use coracle_devices::virtio::mmio::TransportState;
use coracle_storage::backend::Access;
use coracle_storage::overlay::copy::View;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::places::PlacesState;
use super::pmem::{PmemSlot, PmemStates};
use super::{Machine, NO_PANIC, Paused};
use crate::kvm;
use crate::kvm::state::{VcpuState, VmState};
use crate::kvm::vcpu::VcpuError;
use crate::state::{Body, Sections, State, StateError};

/// A machine that stands still, as plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineState {
    pub(super) vm: VmState,
    /// The virtual processors.
    pub vcpus: Vec<VcpuState>,
    pub(super) virtio: Vec<VirtioState>,
    pub(super) serial: SerialPortState,
    pub(super) keyboard: I8042State,
    pub(super) drives: DriveStates,
    /// Where the devices were. One that an older version has saved says nothing of it.
    pub(super) places: Option<PlacesState>,
    /// Where its files were. One without says nothing of them.
    pub(super) pmem: PmemStates,
}

/// One virtio device in its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// The device's id in the configuration.
    pub id: String,
    /// What its driver knows of it.
    pub transport: TransportState,
}

/// What the images of all drives were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveStates(pub Vec<DriveState>);

/// What the image of one drive was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveState {
    /// The drive.
    pub id: String,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// Its generation, if there is a record of it: an image of another has been written since.
    pub generation: Option<u64>,
}

/// How many of each there are, by the configuration that the state comes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Virtual processors.
    pub vcpus: u8,
    /// Virtio devices.
    pub virtio: usize,
}

/// Why a machine could not be saved; it is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// What the vCPUs share.
    #[error(transparent)]
    Vm(#[from] kvm::state::StateError),
    /// What was written to the disks is not all on the medium, or the machine cannot tell.
    #[error("device `{0}` does not stand still")]
    Device(String),
}

impl Machine<Paused> {
    /// Everything but the memory; from now on a snapshot may remember the generations of the disks. Devices first: what they
    /// still owe their guest is in their registers; then the processors, and last what those share.
    ///
    /// # Errors
    ///
    /// What cannot be saved.
    pub fn save(&mut self) -> Result<MachineState, SaveError> {
        self.parts.is_remembered = true;
        self.state()
    }

    /// The same for somebody who takes the disks over with it, so that nothing else remembers them.
    ///
    /// # Errors
    ///
    /// What cannot be saved.
    pub fn state(&self) -> Result<MachineState, SaveError> {
        let parts = &self.parts;
        let mut virtio = Vec::new();
        for slot in &parts.devices {
            let saved = slot.lock().save();
            virtio.push(VirtioState {
                id: slot.id.clone(),
                transport: saved.map_err(|_not_paused| SaveError::Device(slot.id.clone()))?,
            });
        }
        let serial = parts.serial.lock().expect(NO_PANIC).save();
        let keyboard = parts.keyboard.lock().expect(NO_PANIC).save();
        let shape = parts.vm().state_shape();
        let vcpus = parts.vcpus.iter().map(|vcpu| vcpu.save(shape));
        Ok(MachineState {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: parts.vm().save()?,
            virtio,
            serial,
            keyboard,
            drives: DriveStates(parts.drives.iter().map(super::DriveSlot::state).collect()),
            places: Some(parts.places.save(&parts.devices)),
            pmem: PmemStates(parts.pmem.iter().map(PmemSlot::state).collect()),
        })
    }
}

/// What a snapshot cannot include.
#[derive(Debug, thiserror::Error)]
pub enum WrittenInPlace {
    /// The disk of a drive.
    #[error(
        "drive `{0}` is written in place, and a snapshot includes overlays only: give the drive an `overlay` before the machine \
         is started, load a snapshot of it with `disks` `Clone` and save that machine, or leave `include_disks` out"
    )]
    Drive(String),
    /// The file of a pmem device.
    #[error(
        "pmem device `{0}` is written in place, and a snapshot includes overlays of drives only: leave `include_disks` out, and \
         keep its file beside the snapshot"
    )]
    Pmem(String),
}

impl Machine<Paused> {
    /// The overlays of all drives that write, by their ids.
    ///
    /// # Errors
    ///
    /// A drive that writes and has none, or a pmem device that writes.
    pub fn overlays(&self) -> Result<Vec<(String, View)>, WrittenInPlace> {
        let mut pmem = self.parts.pmem.iter();
        if let Some(written) = pmem.find(|slot| slot.medium.access() == Access::ReadWrite) {
            return Err(WrittenInPlace::Pmem(written.id.clone()));
        }
        let drives = self.parts.drives.iter();
        let writable = drives.filter(|drive| drive.control.access() == Access::ReadWrite);
        let overlays = writable.map(|drive| match drive.hold.overlay() {
            Some(overlay) => Ok((drive.id.clone(), overlay.clone())),
            None => Err(WrittenInPlace::Drive(drive.id.clone())),
        });
        overlays.collect()
    }
}

impl super::DriveSlot {
    fn state(&self) -> DriveState {
        DriveState {
            id: self.id.clone(),
            size_bytes: self.control.geometry().size_bytes,
            generation: self.generation(),
        }
    }

    /// The generation of the image, if there is a record of it: here, or with the server that has it.
    pub(super) fn generation(&self) -> Option<u64> {
        let of_session = || {
            let generation = self.control.session()?.lease_epoch.value();
            (generation > 0).then_some(generation)
        };
        self.hold.generation().or_else(of_session)
    }
}

impl MachineState {
    /// Adds its sections.
    pub fn write(&self, sections: &mut Sections) {
        sections.add(VM, &self.vm);
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            sections.add(&vcpu_name(index), vcpu);
        }
        for (index, device) in self.virtio.iter().enumerate() {
            sections.add(&virtio_name(index), device);
        }
        sections.add(SERIAL, &self.serial);
        sections.add(KEYBOARD, &self.keyboard);
        sections.add(DRIVES, &self.drives);
        if let Some(places) = &self.places {
            sections.add(PLACES, places);
        }
        if !self.pmem.0.is_empty() {
            sections.add(PMEM, &self.pmem);
        }
    }

    /// Takes its sections out of `state`.
    ///
    /// # Errors
    ///
    /// One that is missing, or does not hold what it should.
    pub fn read(state: &mut State<'_>, counts: Counts) -> Result<Self, StateError> {
        let vcpus = (0..usize::from(counts.vcpus)).map(|index| state.take(&vcpu_name(index)));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        let virtio = (0..counts.virtio).map(|index| state.take(&virtio_name(index)));
        let virtio = virtio.collect::<Result<_, _>>()?;
        Ok(Self {
            vm: state.take(VM)?,
            vcpus,
            virtio,
            serial: state.take(SERIAL)?,
            keyboard: state.take(KEYBOARD)?,
            drives: state.take(DRIVES)?,
            places: state.take_if_there(PLACES)?,
            pmem: state.take_if_there(PMEM)?.unwrap_or_default(),
        })
    }

    /// The memory that KVM itself touches when it takes the state up: where, and how many bytes. The guest, or whoever wrote the
    /// state, has chosen it: it may be no memory.
    pub fn memory_of_kvm(&self) -> Vec<(GuestAddress, u64)> {
        self.vcpus.iter().flat_map(VcpuState::memory_of_kvm).collect()
    }

    /// What the image of drive `id` was.
    pub fn drive(&self, id: &str) -> Option<&DriveState> {
        self.drives.0.iter().find(|drive| drive.id == id)
    }
}

const VM: &str = "vm";
const SERIAL: &str = "serial";
const KEYBOARD: &str = "keyboard";
const DRIVES: &str = "drives";
const PLACES: &str = "places";
const PMEM: &str = "pmem";

fn vcpu_name(index: usize) -> String {
    format!("vcpu.{index}")
}

fn virtio_name(index: usize) -> String {
    format!("virtio.{index}")
}

impl Body for VmState {
    const VERSION: u32 = 1;
}

impl Body for VcpuState {
    const VERSION: u32 = 1;
}

impl Body for VirtioState {
    const VERSION: u32 = 1;
}

impl Body for SerialPortState {
    const VERSION: u32 = 1;
}

impl Body for I8042State {
    const VERSION: u32 = 1;
}

impl Body for DriveStates {
    const VERSION: u32 = 1;
}
