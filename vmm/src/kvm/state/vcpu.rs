//! A vCPU's state out of KVM and into it, in the orders that KVM needs.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_mp_state, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

use super::super::failed;
use super::{CpuidEntryState, StateError, StateShape, Support, VcpuState};
use super::{bytes, msrs, sregs, xsave};
use crate::arch::x86_64::cpuid::Cpuid;

/// What a host may differ by from the frequency that is asked for: KVM's own tolerance, and what NTP corrects anyway.
const TSC_TOLERANCE_PPM: u64 = 250;
/// Virtualization is on, by Intel's and by AMD's processors.
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

impl VcpuState {
    /// Reads everything of a vCPU that is not in KVM_RUN.
    ///
    /// # Errors
    ///
    /// The ioctl that failed, or a guest in the middle of what cannot be saved.
    pub fn save(vcpu: &VcpuFd, shape: &StateShape) -> Result<Self, StateError> {
        // First: KVM carries out an INIT or SIPI that has come for the vCPU now, which changes all the rest.
        let mp_state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?.mp_state;
        let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        check_not_nested(&sregs)?;
        let cpuid = Cpuid::of_vcpu(vcpu)?;
        let tsc_khz = match shape.tsc_khz {
            Support::Present => Some(vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?),
            Support::Missing => None,
        };
        Ok(Self {
            tsc_khz,
            cpuid: cpuid.entries().iter().map(CpuidEntryState::from).collect(),
            sregs: bytes::of(&sregs),
            pdptrs: sregs::page_directory_pointers(vcpu, shape.sregs2)?,
            regs: bytes::of(&vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?),
            xsave: xsave::save(vcpu, shape.xsave_bytes)?,
            xcrs: bytes::of(&vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?),
            debug_regs: bytes::of(&vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?),
            msrs: msrs::save(vcpu, &shape.msr_indices)?,
            // KVM moves interrupts that were posted to the vCPU into the page now.
            lapic: bytes::of(&vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?),
            // Last: what comes before may still raise or take back an event.
            events: bytes::of(&vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?),
            mp_state,
        })
    }

    /// Gives a fresh vCPU this state. Its memory must be in its place: KVM reads page tables from it, and writes what
    /// MSRs of paravirtual clocks point to.
    ///
    /// # Errors
    ///
    /// What is damaged in the state, or what this host's KVM does not take of it.
    pub fn restore(&self, vcpu: &VcpuFd, shape: &StateShape) -> Result<(), StateError> {
        // First: by CPUID KVM decides which registers, bits and features there are.
        self.processor()?.set(vcpu)?;
        self.restore_tsc_frequency(vcpu, shape)?;
        // It has the base of the local interrupt controller, which decides how the latter's page is understood; and
        // EFER.LME, without which paging as the guest has it is not allowed.
        let special: kvm_sregs = bytes::to(&self.sregs, "segment and control registers")?;
        sregs::restore(vcpu, &special, self.pdptrs, shape.sregs2)?;
        let general = bytes::to(&self.regs, "general registers")?;
        vcpu.set_regs(&general).map_err(failed("KVM_SET_REGS"))?;
        // Before the MSRs: IA32_XFD can forbid what is in the area.
        xsave::restore(vcpu, &self.xsave, shape.xsave_bytes)?;
        let xcrs = bytes::to(&self.xcrs, "extended control registers")?;
        vcpu.set_xcrs(&xcrs).map_err(failed("KVM_SET_XCRS"))?;
        let debug = bytes::to(&self.debug_regs, "debug registers")?;
        vcpu.set_debug_regs(&debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
        let lapic = bytes::to(&self.lapic, "local interrupt controller's registers")?;
        vcpu.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))?;
        // After the local interrupt controller, whose timer one of them sets.
        msrs::restore(vcpu, &self.msrs)?;
        // After the general registers, with which KVM forgets a pending exception, and after the local interrupt controller.
        let events: kvm_vcpu_events = bytes::to(&self.events, "pending events")?;
        vcpu.set_vcpu_events(&events)
            .map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        // Last: KVM takes segments as after a reset for an order to run.
        let mp_state = kvm_mp_state {
            mp_state: self.mp_state,
        };
        Ok(vcpu.set_mp_state(mp_state).map_err(failed("KVM_SET_MP_STATE"))?)
    }

    /// The memory that [`Self::restore`] makes KVM touch, as far as the state says: where, and how many bytes.
    pub fn memory_of_kvm(&self) -> Vec<(GuestAddress, u64)> {
        let mut ranges: Vec<_> = self.msrs.iter().filter_map(msrs::memory_behind).collect();
        ranges.extend(
            bytes::to(&self.sregs, "registers")
                .ok()
                .and_then(sregs::page_directory),
        );
        ranges
    }

    fn processor(&self) -> Result<Cpuid, StateError> {
        let count = self.cpuid.len();
        if count > KVM_MAX_CPUID_ENTRIES {
            return Err(StateError::TooManyCpuidEntries { count });
        }
        let entries: Vec<_> = self.cpuid.iter().map(kvm_cpuid_entry2::from).collect();
        Ok(Cpuid::from_entries(&entries))
    }

    fn restore_tsc_frequency(&self, vcpu: &VcpuFd, shape: &StateShape) -> Result<(), StateError> {
        let (Some(saved_khz), Support::Present) = (self.tsc_khz, shape.tsc_khz) else {
            return Ok(());
        };
        let host_khz = vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        let Err(error) = vcpu.set_tsc_khz(saved_khz) else {
            return Ok(());
        };
        let difference = u64::from(saved_khz.abs_diff(host_khz));
        if difference * 1_000_000 > u64::from(host_khz) * TSC_TOLERANCE_PPM {
            return Err(StateError::TscFrequency { saved_khz, host_khz });
        }
        log::debug!("KVM_SET_TSC_KHZ: {error}; the host has the guest's frequency of {saved_khz} kHz anyway");
        Ok(())
    }
}

/// Refuses a guest that has guests of its own, or may have: their state is in a structure of its own.
fn check_not_nested(sregs: &kvm_sregs) -> Result<(), StateError> {
    if sregs.cr4 & CR4_VMXE != 0 || sregs.efer & EFER_SVME != 0 {
        return Err(StateError::Nested);
    }
    Ok(())
}
