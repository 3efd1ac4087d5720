//! The guest's processors: chosen once for the machine, then given to each virtual processor.

use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::cpuid::{Cpuid, CpuidError, this_host};
use super::lapic::{self, LapicError};
use super::layout::VCPUS_MAX;
use super::msr::{self, Msr, MsrError};
use super::regs::{self, RegsError};
use super::template::{CpuTemplate, KvmCapability};

/// Why the processors could not be made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum CpuError {
    #[error("a machine cannot have {vcpus} virtual processors: give it 1 to {VCPUS_MAX}")]
    Vcpus { vcpus: u8 },
    #[error("with SMT a machine has pairs of virtual processors, not {vcpus}: give it 1 or an even number")]
    OddSmt { vcpus: u8 },
    #[error("this host's KVM lacks capability {number}{name}: a newer kernel may have it")]
    Capability { number: u32, name: String },
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    #[error(transparent)]
    Msr(#[from] MsrError),
    #[error(transparent)]
    Lapic(#[from] LapicError),
    #[error(transparent)]
    Regs(#[from] RegsError),
}

/// Whether two virtual processors share a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Smt {
    /// Each has a core of its own.
    Off,
    /// Neighbours share one.
    On,
}

/// How many processors a machine has and how they hang together: one package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    vcpus: u8,
    smt: Smt,
}

impl Topology {
    /// Checks the number against the limit and against `smt`.
    pub fn new(vcpus: u8, smt: Smt) -> Result<Topology, CpuError> {
        if vcpus == 0 || vcpus > VCPUS_MAX {
            return Err(CpuError::Vcpus { vcpus });
        }
        if smt == Smt::On && vcpus > 1 && vcpus % 2 == 1 {
            return Err(CpuError::OddSmt { vcpus });
        }
        Ok(Topology { vcpus, smt })
    }

    /// The number of virtual processors, at least one.
    pub fn vcpus(self) -> u8 {
        self.vcpus
    }

    /// One or two.
    pub fn threads_per_core(self) -> u8 {
        1 << self.thread_bits()
    }

    /// The number of cores, at least one.
    pub fn cores(self) -> u8 {
        self.vcpus / self.threads_per_core()
    }

    /// How many low bits of the APIC ID tell threads of a core apart.
    pub fn thread_bits(self) -> u32 {
        u32::from(self.smt == Smt::On && self.vcpus > 1)
    }
}

/// The processor that all virtual processors of a machine are.
#[derive(Clone, Debug)]
pub struct Cpu {
    cpuid: Cpuid,
    template: CpuTemplate,
    topology: Topology,
}

impl Cpu {
    /// What this host can give, changed by `template`; checks the capabilities that are needed.
    pub fn new(kvm: &Kvm, topology: Topology, template: CpuTemplate) -> Result<Cpu, CpuError> {
        check_capabilities(kvm, &template.kvm_capabilities)?;
        let mut cpuid = Cpuid::supported(kvm)?;
        cpuid.modify(&template.cpuid_modifiers)?;
        Ok(Cpu {
            cpuid,
            template,
            topology,
        })
    }

    /// Makes `vcpu` the processor number `index` in the state that it has after power-on.
    ///
    /// The in-kernel interrupt controller must exist. The boot processor is then sent to the kernel
    /// by [`regs::enter`]; the others wait for it.
    pub fn configure(&self, vcpu: &VcpuFd, index: u8) -> Result<(), CpuError> {
        // First CPUID: by it KVM decides which MSRs there are.
        self.cpuid
            .for_vcpu(index, self.topology, &self.template, &this_host)
            .set(vcpu)?;
        msr::set_for_boot(vcpu, &self.template_msrs(vcpu)?)?;
        regs::reset_fpu(vcpu)?;
        lapic::set_pins(vcpu)?;
        Ok(())
    }

    /// How the processors hang together.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    fn template_msrs(&self, vcpu: &VcpuFd) -> Result<Vec<Msr>, MsrError> {
        let modifiers = &self.template.msr_modifiers;
        let indices: Vec<u32> = modifiers.iter().map(|modifier| modifier.index).collect();
        let mut msrs = msr::read(vcpu, &indices)?;
        for (msr, modifier) in msrs.iter_mut().zip(modifiers) {
            msr.value = modifier.mask.apply(msr.value);
        }
        Ok(msrs)
    }
}

/// What the machine is built on.
const REQUIRED: [Cap; 14] = [
    Cap::Irqchip,
    Cap::Ioeventfd,
    Cap::Irqfd,
    Cap::UserMemory,
    Cap::SetTssAddr,
    Cap::Pit2,
    Cap::PitState2,
    Cap::AdjustClock,
    Cap::Debugregs,
    Cap::MpState,
    Cap::VcpuEvents,
    Cap::Xcrs,
    Cap::Xsave,
    Cap::ExtCpuid,
];

fn check_capabilities(kvm: &Kvm, asked: &[KvmCapability]) -> Result<(), CpuError> {
    let waived = |cap: &Cap| asked.contains(&KvmCapability::Waive(*cap as u32));
    for cap in REQUIRED.into_iter().filter(|cap| !waived(cap)) {
        if !kvm.check_extension(cap) {
            return Err(CpuError::Capability {
                number: cap as u32,
                name: format!(" ({cap:?})"),
            });
        }
    }
    for capability in asked {
        if let KvmCapability::Require(number) = *capability
            && kvm.check_extension_raw(number.into()) <= 0
        {
            return Err(CpuError::Capability {
                number,
                name: String::new(),
            });
        }
    }
    Ok(())
}
