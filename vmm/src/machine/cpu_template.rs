//! From the CPU template as a user writes it to the one that the processors are made by.

use crate::arch::x86_64::template::{
    CpuTemplate, CpuidModifier, CpuidRegister, KvmCapability, Mask, MsrModifier,
};
use crate::config::{self, Bits, CpuConfig};

/// The template that `config` describes.
pub fn parsed(config: &CpuConfig) -> CpuTemplate {
    CpuTemplate {
        kvm_capabilities: config.kvm_capabilities.iter().copied().map(capability).collect(),
        cpuid_modifiers: config.cpuid_modifiers.iter().map(cpuid_modifier).collect(),
        cpuid_drop: config.cpuid_drop.iter().map(|leaf| leaf.0).collect(),
        msr_modifiers: config
            .msr_modifiers
            .iter()
            .map(|modifier| MsrModifier {
                index: modifier.addr.0,
                mask: mask(modifier.bitmap),
            })
            .collect(),
    }
}

fn capability(capability: config::KvmCapability) -> KvmCapability {
    match capability {
        config::KvmCapability::Require(number) => KvmCapability::Require(number),
        config::KvmCapability::Waive(number) => KvmCapability::Waive(number),
    }
}

fn cpuid_modifier(modifier: &config::CpuidModifier) -> CpuidModifier {
    CpuidModifier {
        leaf: modifier.leaf.0,
        subleaf: modifier.subleaf.0,
        flags: modifier.flags,
        registers: modifier
            .modifiers
            .iter()
            .map(|one| (register(one.register), mask(one.bitmap)))
            .collect(),
    }
}

fn register(register: config::CpuidRegister) -> CpuidRegister {
    match register {
        config::CpuidRegister::Eax => CpuidRegister::Eax,
        config::CpuidRegister::Ebx => CpuidRegister::Ebx,
        config::CpuidRegister::Ecx => CpuidRegister::Ecx,
        config::CpuidRegister::Edx => CpuidRegister::Edx,
    }
}

fn mask<T>(bits: Bits<T>) -> Mask<T> {
    Mask {
        filter: bits.mask,
        value: bits.value,
    }
}
