//! What KVM knows of a virtual machine beside its memory, as plain data: a snapshot's sections are made of it.
//!
//! The kernel's structures are carried as the bytes of its ABI, which it never changes. What a file says is
//! believed by nobody: lengths and counts are checked here, and values by KVM, which takes them from any process.

mod bytes;
mod machine;
mod msrs;
mod sregs;
#[cfg(test)]
mod tests;
mod vcpu;
mod xsave;

use std::sync::Arc;

use kvm_bindings::{KVM_CAP_SREGS2, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VmFd};
use serde::{Deserialize, Serialize};

use super::{KvmError, failed};
use crate::arch::x86_64::cpuid::CpuidError;

/// One vCPU: everything that its guest can see of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// The rate of its time stamp counter, where the host's KVM says it.
    pub tsc_khz: Option<u32>,
    /// What its CPUID instruction answers.
    pub cpuid: Vec<CpuidEntryState>,
    /// `kvm_sregs`: segments, tables and control registers.
    #[serde(with = "serde_bytes")]
    pub sregs: Vec<u8>,
    /// The page directory pointers that a processor with PAE paging has loaded, if it is one and the host's KVM tells.
    pub pdptrs: Option<[u64; 4]>,
    /// `kvm_regs`: the general registers.
    #[serde(with = "serde_bytes")]
    pub regs: Vec<u8>,
    /// `kvm_xsave` and what follows it: the area of XSAVE's standard format, as long as the host's features need.
    #[serde(with = "serde_bytes")]
    pub xsave: Vec<u8>,
    /// `kvm_xcrs`: which features XSAVE saves.
    #[serde(with = "serde_bytes")]
    pub xcrs: Vec<u8>,
    /// `kvm_debugregs`.
    #[serde(with = "serde_bytes")]
    pub debug_regs: Vec<u8>,
    /// `kvm_lapic_state`: the local interrupt controller's page.
    #[serde(with = "serde_bytes")]
    pub lapic: Vec<u8>,
    /// Model-specific registers, in the order of the host's list.
    pub msrs: Vec<MsrState>,
    /// `kvm_vcpu_events`: exceptions, interrupts and NMIs that are on their way.
    #[serde(with = "serde_bytes")]
    pub events: Vec<u8>,
    /// `KVM_MP_STATE_*`: whether it runs, is halted, or waits to be started.
    pub mp_state: u32,
}

/// The answer of one leaf and subleaf (`kvm_cpuid_entry2`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the registers' names say it")]
pub struct CpuidEntryState {
    /// `eax` of the question.
    pub leaf: u32,
    /// `ecx` of the question.
    pub subleaf: u32,
    /// `KVM_CPUID_FLAG_*`.
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrState {
    /// The number that RDMSR takes in `ecx`.
    pub index: u32,
    /// Its 64 bits.
    pub value: u64,
}

/// What the vCPUs of a machine share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// `kvm_irqchip`: the first PIC.
    #[serde(with = "serde_bytes")]
    pub pic_master: Vec<u8>,
    /// `kvm_irqchip`: the second PIC.
    #[serde(with = "serde_bytes")]
    pub pic_slave: Vec<u8>,
    /// `kvm_irqchip`: the IOAPIC.
    #[serde(with = "serde_bytes")]
    pub ioapic: Vec<u8>,
    /// `kvm_pit_state2`: the timer.
    #[serde(with = "serde_bytes")]
    pub pit: Vec<u8>,
    /// The guest's time since its boot by kvmclock; it stands still in a snapshot.
    pub clock_ns: u64,
}

/// Why state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum StateError {
    #[error("the snapshot has {len} bytes of the {what}, and they have {expected}: it is damaged")]
    Length {
        what: &'static str,
        len: usize,
        expected: usize,
    },
    #[error("the snapshot has controller {number} in the place of the {chip}: it is damaged")]
    Chip { chip: &'static str, number: u32 },
    #[error(
        "the snapshot has {count} model-specific registers, and no processor has more than {MSRS_MAX}: it is damaged"
    )]
    TooManyMsrs { count: usize },
    #[error("the snapshot has {count} CPUID entries, and KVM takes {KVM_MAX_CPUID_ENTRIES}: it is damaged")]
    TooManyCpuidEntries { count: usize },
    #[error(
        "the floating-point and vector state has {len} bytes, and this host's KVM takes {limit}: restore the snapshot \
         on a host with at least the processor features of the one that made it"
    )]
    Xsave { len: usize, limit: usize },
    #[error(
        "this host's KVM does not take {value:#x} in MSR {index:#x} (and {msrs_left} more are like it): restore the \
         snapshot on a host with the processor and kernel of the one that made it, or start the guest with a CPU \
         template that hides what the register belongs to",
        msrs_left = .count - 1
    )]
    Msr { index: u32, value: u64, count: usize },
    #[error(
        "the guest's time stamp counter runs at {saved_khz} kHz and this host's at {host_khz} kHz, which its KVM \
         cannot change: restore the snapshot on a host with the same frequency"
    )]
    TscFrequency { saved_khz: u32, host_khz: u32 },
    #[error(
        "the guest uses nested virtualization, which a snapshot does not carry: stop its guests, or start it with a \
         CPU template that clears `vmx` (leaf 0x1, ecx bit 5) and `svm` (leaf 0x80000001, ecx bit 2)"
    )]
    Nested,
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// More than any processor's KVM has (some 200).
const MSRS_MAX: usize = 1024;

/// Which state a vCPU of this host has; asked once for a machine, since it needs more than the vCPU's descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateShape {
    /// Registers that may be there.
    msr_indices: Arc<[u32]>,
    /// Size of XSAVE's area.
    xsave_bytes: usize,
    sregs2: Support,
    tsc_khz: Support,
}

/// Whether the host's KVM has something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Support {
    Missing,
    Present,
}

impl StateShape {
    /// Asks KVM.
    ///
    /// # Errors
    ///
    /// [`KvmError`] naming the ioctl that failed.
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, KvmError> {
        let listed = kvm
            .get_msr_index_list()
            .map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        let support = |capability: u32| match vm.check_extension_raw(capability.into()) {
            1.. => Support::Present,
            _ => Support::Missing,
        };
        Ok(Self {
            msr_indices: msrs::indices(listed.as_slice()).into(),
            xsave_bytes: xsave::size_bytes(vm.check_extension_int(Cap::Xsave2)),
            sregs2: support(KVM_CAP_SREGS2),
            tsc_khz: support(Cap::GetTscKhz as u32),
        })
    }
}

impl From<&kvm_cpuid_entry2> for CpuidEntryState {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            ..
        } = *entry;
        Self {
            leaf: function,
            subleaf: index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        }
    }
}

impl From<&CpuidEntryState> for kvm_cpuid_entry2 {
    fn from(state: &CpuidEntryState) -> Self {
        let CpuidEntryState {
            leaf,
            subleaf,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        } = *state;
        Self {
            function: leaf,
            index: subleaf,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }
}
