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

#[cfg(test)]
#[expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]
mod tests {
    use super::*;
    use crate::arch::x86_64::template::{Mask, MsrModifier};
    use crate::arch::x86_64::testing;

    const SYSCALL_MASK: u32 = 0xc000_0084;

    #[test]
    fn a_topology_is_checked() {
        assert_eq!(Topology::new(32, Smt::On).unwrap().cores(), 16);
        assert_eq!(Topology::new(1, Smt::On).unwrap().threads_per_core(), 1);
        assert!(matches!(
            Topology::new(0, Smt::Off),
            Err(CpuError::Vcpus { vcpus: 0 })
        ));
        assert!(matches!(
            Topology::new(33, Smt::Off),
            Err(CpuError::Vcpus { vcpus: 33 })
        ));
        assert!(matches!(
            Topology::new(3, Smt::On),
            Err(CpuError::OddSmt { vcpus: 3 })
        ));
    }

    #[test]
    fn each_vcpu_becomes_the_templates_processor() {
        let Some(vm) = testing::vm("each_vcpu_becomes_the_templates_processor", 2) else {
            return;
        };
        let mask = Mask {
            filter: 0xff,
            value: 0x55,
        };
        let template = CpuTemplate {
            cpuid_drop: vec![7, 0xd],
            msr_modifiers: vec![MsrModifier {
                index: SYSCALL_MASK,
                mask,
            }],
            ..CpuTemplate::default()
        };
        let topology = Topology::new(2, Smt::Off).unwrap();
        let cpu = Cpu::new(&vm.kvm, topology, template).unwrap();
        for (index, vcpu) in (0..).zip(&vm.vcpus) {
            cpu.configure(vcpu, index).unwrap();
            assert_eq!(msr::read(vcpu, &[SYSCALL_MASK]).unwrap()[0].value, 0x55);
            let cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
            assert!(cpuid.as_slice().iter().all(|entry| entry.function != 7));
        }
    }

    #[test]
    fn a_capability_that_the_host_lacks_is_named() {
        let Some(vm) = testing::vm("a_capability_that_the_host_lacks_is_named", 0) else {
            return;
        };
        let topology = Topology::new(1, Smt::Off).unwrap();
        let with = |kvm_capabilities| CpuTemplate {
            kvm_capabilities,
            ..CpuTemplate::default()
        };
        let absurd = with(vec![KvmCapability::Require(100_000)]);
        let text = Cpu::new(&vm.kvm, topology, absurd).unwrap_err().to_string();
        assert!(text.contains("100000"), "{text}");
        let waived = with(vec![
            KvmCapability::Waive(Cap::Xcrs as u32),
            KvmCapability::Require(0),
        ]);
        assert!(Cpu::new(&vm.kvm, topology, waived).is_ok());
    }
}
