//! A fresh machine, made to go on where another has stopped.

use coracle_devices::i8042::I8042StateError;
use coracle_devices::serial::SerialPortStateError;
use coracle_devices::virtio::device::DeviceKind;
use coracle_devices::virtio::mmio;
use coracle_devices::vmgenid::GenerationError;
use kvm_ioctls::VcpuFd;

use super::places::PlacesError;
use super::state::{MachineState, VirtioState};
use super::{NO_PANIC, Parts};
use crate::arch::x86_64::cpuid::Cpuid;
use crate::arch::x86_64::cpuid::compatibility::{self, CompatibilityError};
use crate::kvm::state::CpuidEntryState;
use crate::kvm::vm;
use crate::kvm::{self, KvmError};

/// Why a machine does not take up what was saved.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A virtio device.
    #[error("device `{id}` does not go on as it was saved")]
    Device {
        /// Which.
        id: String,
        /// Why.
        #[source]
        source: mmio::RestoreError,
    },
    /// The devices are others.
    #[error(
        "the snapshot has the state of device `{saved}` in the place of `{here}`: it was not saved by this program"
    )]
    OtherDevice {
        /// The device that was saved.
        saved: String,
        /// The device that is there.
        here: String,
    },
    /// The places of the devices.
    #[error(transparent)]
    Places(#[from] PlacesError),
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialPortStateError),
    /// The keyboard controller.
    #[error(transparent)]
    Keyboard(#[from] I8042StateError),
    /// A vCPU.
    #[error("vCPU {index} does not go on as it was saved")]
    Vcpu {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: kvm::state::StateError,
    },
    /// What the vCPUs share.
    #[error("the interrupt controllers and the timer do not go on as they were saved")]
    Vm(#[source] kvm::state::StateError),
    /// The guest cannot be told that it was restored.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// KVM refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Checks that the processors that a machine was given can be had here, before anything of it is loaded.
///
/// # Errors
///
/// What is missing, by name.
pub fn check_compatible(state: &MachineState) -> Result<(), CompatibilityError> {
    check_processors(state.vcpus.iter().map(|vcpu| vcpu.cpuid.as_slice()))
}

/// The same for what is all that it is about: what processors answer to CPUID.
///
/// # Errors
///
/// As [`check_compatible`].
pub fn check_processors<'a>(
    answers: impl IntoIterator<Item = &'a [CpuidEntryState]>,
) -> Result<(), CompatibilityError> {
    let kvm = vm::open()?;
    let supported = Cpuid::supported(&kvm)?;
    let given = || compatibility::given_to_blank(&kvm, &supported);
    compatibility::check_answers(&supported, given, answers)
}

impl Parts {
    /// Gives the fresh parts `state`, and the vCPUs, which have no threads yet. Devices stay paused. Processors first,
    /// then the controllers between them and the devices, and last those devices that may raise their lines at once.
    pub(super) fn restore(&self, vcpus: &[VcpuFd], state: &MachineState) -> Result<(), RestoreError> {
        // Memory that has come is there before anything is looked for in it: rings of other devices, or a page of a processor.
        let is_memory = |saved: &VirtioState| saved.transport.device.kind() == DeviceKind::Memory;
        let all = || self.devices.iter().zip(&state.virtio);
        let memory_first = all()
            .filter(|(_, saved)| is_memory(saved))
            .chain(all().filter(|(_, saved)| !is_memory(saved)));
        for (slot, saved) in memory_first {
            if slot.id != saved.id {
                return Err(RestoreError::OtherDevice {
                    saved: saved.id.clone(),
                    here: slot.id.clone(),
                });
            }
            let restored = slot.lock().restore(&saved.transport);
            restored.map_err(|source| RestoreError::Device {
                id: slot.id.clone(),
                source,
            })?;
        }
        for (index, (fd, saved)) in vcpus.iter().zip(&state.vcpus).enumerate() {
            let restored = saved.restore(fd, self.vm().state_shape());
            restored.map_err(|source| RestoreError::Vcpu { index, source })?;
        }
        self.vm().restore(&state.vm).map_err(RestoreError::Vm)?;
        self.places.hotplug.again();
        self.serial.lock().expect(NO_PANIC).restore(&state.serial)?;
        self.keyboard.lock().expect(NO_PANIC).restore(&state.keyboard)?;
        Ok(())
    }
}
