//! What KVM has of a machine: it can be made before anybody knows how the guest goes on.

use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::GuestMemoryMmap;

use super::state::MachineState;
use crate::arch::x86_64::cpuid::compatibility::{self, CompatibilityError};
use crate::arch::x86_64::cpuid::{Cpuid, CpuidError};
use crate::kvm::KvmError;
use crate::kvm::vm::{self, DirtyLog, Vm};
use crate::memory::HotplugRegion;
use crate::memory::mapped::Mapping;

/// A virtual machine with its memory and its vCPUs, which nobody has given any state. A guest that stands still does not have to
/// wait for KVM to make it: that takes milliseconds.
pub struct Shell {
    pub(super) kvm: Kvm,
    pub(super) vm: Vm,
    pub(super) vcpus: Vec<VcpuFd>,
}

impl Shell {
    /// One with `memory`, `files` beside it and so many vCPUs. The guest reaches nothing yet of the region `hotplug`.
    ///
    /// # Errors
    ///
    /// When KVM is not there, or refuses.
    pub fn new(
        memory: &Arc<GuestMemoryMmap>,
        hotplug: Option<HotplugRegion>,
        files: Vec<Arc<Mapping>>,
        vcpus: u8,
        dirty_log: DirtyLog,
    ) -> Result<Self, KvmError> {
        let kvm = vm::open()?;
        vm::check_vcpu_count(&kvm, vcpus)?;
        let vm = Vm::with_files(&kvm, Arc::clone(memory), hotplug, files, dirty_log)?;
        let made: Result<_, _> = (0..vcpus).map(|index| vm.create_vcpu(index)).collect();
        Ok(Self {
            vcpus: made?,
            kvm,
            vm,
        })
    }

    /// What KVM says that it can give a guest here.
    ///
    /// # Errors
    ///
    /// When it does not say.
    pub fn supported(&self) -> Result<Cpuid, CpuidError> {
        Cpuid::supported(&self.kvm)
    }

    /// Checks that processors to which KVM can give `supported` can be those of `state`.
    ///
    /// # Errors
    ///
    /// What is missing, by name.
    pub fn check_compatible(
        &self,
        supported: &Cpuid,
        state: &MachineState,
    ) -> Result<(), CompatibilityError> {
        let given = || {
            let vcpu = self.vcpus.first().expect("a machine has a processor");
            supported.set(vcpu)?;
            Ok(Cpuid::of_vcpu(vcpu)?)
        };
        compatibility::check(supported, given, &state.vcpus)
    }
}
