//! A CPU template: changes to what the guest is told about its processor, as masks.
//!
//! The JSON form is Firecracker's custom CPU template; this is what remains of it after parsing.

use std::fmt;

/// Changes to the processor, in the order in which they are applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuTemplate {
    /// KVM capabilities that the host must have, and ones that it need not have after all.
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Bits of CPUID leaves. A leaf that KVM doesn't offer is an error.
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Leaves that the guest must not find at all, with all their subleaves.
    pub cpuid_drop: Vec<u32>,
    /// Bits of model-specific registers.
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A number of `KVM_CAP_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    /// Required.
    Require(u32),
    /// Not required, although the machine normally asks for it (`!` in JSON).
    Waive(u32),
}

/// Bits of one CPUID leaf and subleaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidModifier {
    /// `eax` of the question.
    pub leaf: u32,
    /// `ecx` of the question.
    pub subleaf: u32,
    /// KVM_CPUID_FLAG_*: whether the subleaf counts.
    pub flags: u32,
    /// The answer's registers.
    pub registers: Vec<(CpuidRegister, Mask<u32>)>,
}

/// A register of CPUID's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuidRegister {
    /// `eax`
    Eax,
    /// `ebx`
    Ebx,
    /// `ecx`
    Ecx,
    /// `edx`
    Edx,
}

impl fmt::Display for CpuidRegister {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        })
    }
}

/// Bits of one model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrModifier {
    /// The register's number.
    pub index: u32,
    /// Its new bits.
    pub mask: Mask<u64>,
}

/// Which bits get a new value, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask<T> {
    /// Ones where the value counts.
    pub filter: T,
    /// The new bits; zero outside of `filter`.
    pub value: T,
}

impl Mask<u32> {
    /// `old` with the masked bits replaced.
    pub fn apply(self, old: u32) -> u32 {
        old & !self.filter | self.value & self.filter
    }
}

impl Mask<u64> {
    /// `old` with the masked bits replaced.
    pub fn apply(self, old: u64) -> u64 {
        old & !self.filter | self.value & self.filter
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_touches_only_its_own_bits() {
        let mask = Mask {
            filter: 0b0111u32,
            value: 0b0101,
        };
        assert_eq!(mask.apply(0b1010), 0b1101);
        let mask = Mask {
            filter: 1u64 << 63,
            value: u64::MAX,
        };
        assert_eq!(mask.apply(0), 1 << 63);
    }
}
