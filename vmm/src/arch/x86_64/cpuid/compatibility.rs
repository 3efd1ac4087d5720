//! Whether a guest that was made on another host can go on here: what its CPUID promised it must be there.

use std::fmt;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::features::FEATURE_WORDS;
use super::{Cpuid, CpuidError};
use crate::arch::x86_64::template::CpuidRegister;
use crate::kvm::KvmError;
use crate::kvm::state::{CpuidEntryState, VcpuState};
use crate::kvm::vm::BlankVcpu;

/// Something that a guest was given and a host cannot give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// A feature bit of CPUID.
    Feature {
        /// `eax` of the question.
        leaf: u32,
        /// `ecx` of the question.
        subleaf: u32,
        /// The answer's register.
        register: CpuidRegister,
        /// From 0.
        bit: u8,
        /// As /proc/cpuinfo has it, where it has one.
        name: Option<&'static str>,
    },
    /// Processors of another vendor.
    Vendor {
        /// The guest's.
        saved: String,
        /// This host's.
        host: String,
    },
    /// Physical addresses as wide as the guest's.
    AddressBits {
        /// The guest's.
        saved: u8,
        /// This host's.
        host: u8,
    },
}

/// Why a guest cannot go on on this host.
#[derive(Debug, thiserror::Error)]
pub enum CompatibilityError {
    /// Named one by one.
    #[error(
        "this host cannot give the guest what its processor has: {}. Let it go on on a host that can, or start guests \
         that shall come here with a CPU template that clears these bits",
        list(.0)
    )]
    Missing(Vec<Missing>),
    /// KVM does not say what there is.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// KVM does not do anything.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Refuses vCPUs that a host whose KVM says that it has `supported` cannot run as they were; to be asked before anything is
/// loaded. Where there is doubt `given` says what a vCPU really gets there that is given all of that.
///
/// # Errors
///
/// [`CompatibilityError::Missing`] with everything that stands in the way.
pub fn check(
    supported: &Cpuid,
    given: impl FnOnce() -> Result<Cpuid, CompatibilityError>,
    vcpus: &[VcpuState],
) -> Result<(), CompatibilityError> {
    check_answers(supported, given, vcpus.iter().map(|vcpu| vcpu.cpuid.as_slice()))
}

/// The same for what vCPUs answer to CPUID, which is all that it is about.
///
/// # Errors
///
/// As [`check`].
pub fn check_answers<'a>(
    supported: &Cpuid,
    given: impl FnOnce() -> Result<Cpuid, CompatibilityError>,
    vcpus: impl IntoIterator<Item = &'a [CpuidEntryState]>,
) -> Result<(), CompatibilityError> {
    let mut missing = Vec::new();
    for answers in vcpus {
        for one in compatibility(answers, supported) {
            if !missing.contains(&one) {
                missing.push(one);
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    // A KVM that runs a guest's code on the host's processor as it is gives more than it says that it can.
    let given = given()?;
    missing.retain(|one| match one {
        Missing::Feature {
            leaf,
            subleaf,
            register,
            bit,
            ..
        } => given.answer(*leaf, *subleaf, *register) >> bit & 1 == 0,
        Missing::Vendor { .. } | Missing::AddressBits { .. } => true,
    });
    if missing.is_empty() {
        return Ok(());
    }
    Err(CompatibilityError::Missing(missing))
}

/// What a vCPU gets that is given all of `supported`, and is good for nothing else.
///
/// # Errors
///
/// What KVM refuses.
pub fn given_to_blank(kvm: &Kvm, supported: &Cpuid) -> Result<Cpuid, CompatibilityError> {
    let blank = BlankVcpu::new(kvm)?;
    supported.set(blank.fd())?;
    Ok(Cpuid::of_vcpu(blank.fd())?)
}

/// What of the answers `saved` a host whose KVM can give `host` cannot give.
pub fn compatibility(saved: &[CpuidEntryState], host: &Cpuid) -> Vec<Missing> {
    // More than that is refused when it is restored.
    let saved: Vec<_> = saved
        .iter()
        .take(KVM_MAX_CPUID_ENTRIES)
        .map(kvm_cpuid_entry2::from)
        .collect();
    let saved = Cpuid::from_entries(&saved);
    let mut missing = Vec::new();
    missing.extend(vendor(&saved, host));
    missing.extend(address_bits(&saved, host));
    missing.extend(FEATURE_WORDS.iter().flat_map(|word| {
        let given = saved.answer(word.leaf, word.subleaf, word.register);
        let lost = word.lost(given, host);
        lost.map(|bit| Missing::Feature {
            leaf: word.leaf,
            subleaf: word.subleaf,
            register: word.register,
            bit,
            name: word.name(bit),
        })
    }));
    missing
}

fn vendor(saved: &Cpuid, host: &Cpuid) -> Option<Missing> {
    let name = |cpuid: &Cpuid| {
        let registers = [CpuidRegister::Ebx, CpuidRegister::Edx, CpuidRegister::Ecx];
        let name = registers.map(|register| cpuid.answer(0, 0, register).to_le_bytes());
        name.as_flattened().escape_ascii().to_string()
    };
    let (saved, host) = (name(saved), name(host));
    (saved != host).then_some(Missing::Vendor { saved, host })
}

fn address_bits(saved: &Cpuid, host: &Cpuid) -> Option<Missing> {
    let bits = |cpuid: &Cpuid| {
        let [bits, ..] = cpuid.answer(0x8000_0008, 0, CpuidRegister::Eax).to_le_bytes();
        bits
    };
    let (saved, host) = (bits(saved), bits(host));
    (saved > host).then_some(Missing::AddressBits { saved, host })
}

fn list(missing: &[Missing]) -> String {
    let texts: Vec<_> = missing.iter().map(Missing::to_string).collect();
    texts.join(", ")
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Feature {
                leaf,
                subleaf,
                register,
                bit,
                name,
            } => {
                let name = name.unwrap_or("a feature without a name");
                write!(
                    f,
                    "{name} (leaf {leaf:#x}, subleaf {subleaf:#x}, {register} bit {bit})"
                )
            }
            Self::Vendor { saved, host } => write!(f, "a processor by {saved} (this one is by {host})"),
            Self::AddressBits { saved, host } => {
                write!(
                    f,
                    "physical addresses of {saved} bits (leaf 0x80000008, eax; here {host})"
                )
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;
    use crate::arch::x86_64::cpu::{Cpu, Smt, Topology};
    use crate::arch::x86_64::template::CpuTemplate;
    use crate::arch::x86_64::testing;
    use crate::kvm::state::StateShape;

    /// Answers with every register of every leaf that is compared as given.
    fn cpuid(value: u32) -> Vec<CpuidEntryState> {
        let mut entries: Vec<CpuidEntryState> = Vec::new();
        for word in &FEATURE_WORDS {
            if !entries
                .iter()
                .any(|entry| (entry.leaf, entry.subleaf) == (word.leaf, word.subleaf))
            {
                entries.push(CpuidEntryState {
                    leaf: word.leaf,
                    subleaf: word.subleaf,
                    flags: 0,
                    eax: value,
                    ebx: value,
                    ecx: value,
                    edx: value,
                });
            }
        }
        entries
    }

    fn host(entries: &[CpuidEntryState]) -> Cpuid {
        let entries: Vec<_> = entries.iter().map(kvm_cpuid_entry2::from).collect();
        Cpuid::from_entries(&entries)
    }

    #[test]
    fn each_feature_that_the_host_lacks_is_named_and_no_other() {
        let full = cpuid(u32::MAX);
        for (leaf, register, bit, name) in [
            (1, CpuidRegister::Ecx, 28, "avx "),
            (1, CpuidRegister::Ecx, 30, "rdrand "),
            (1, CpuidRegister::Edx, 31, "pbe "),
            (7, CpuidRegister::Ebx, 16, "avx512f "),
            (7, CpuidRegister::Ebx, 31, "avx512vl "),
            (7, CpuidRegister::Ecx, 31, "pks "),
            (7, CpuidRegister::Edx, 31, "ssbd "),
            (0x4000_0001, CpuidRegister::Eax, 24, "kvm_clocksource_stable "),
            (0x8000_0001, CpuidRegister::Ecx, 29, "mwaitx "),
            (0x8000_0001, CpuidRegister::Edx, 29, "lm "),
            (0x8000_0007, CpuidRegister::Edx, 8, "nonstop_tsc "),
            (0x8000_0008, CpuidRegister::Ebx, 12, "ibpb "),
            (0x8000_0008, CpuidRegister::Ebx, 31, "brs "),
            (0x8000_000a, CpuidRegister::Edx, 25, "vnmi "),
            (0x8000_0021, CpuidRegister::Eax, 28, "ibpb_brtype "),
        ] {
            let mut poorer = full.clone();
            let entry = poorer
                .iter_mut()
                .find(|entry| (entry.leaf, entry.subleaf) == (leaf, 0));
            let entry = entry.unwrap();
            *match register {
                CpuidRegister::Eax => &mut entry.eax,
                CpuidRegister::Ebx => &mut entry.ebx,
                CpuidRegister::Ecx => &mut entry.ecx,
                CpuidRegister::Edx => &mut entry.edx,
            } &= !(1 << bit);
            let missing = compatibility(&full, &host(&poorer));
            assert_eq!(missing.len(), 1, "{name}: {missing:?}");
            let text = CompatibilityError::Missing(missing).to_string();
            assert!(text.contains(name), "{name}: {text}");
            let place = format!("leaf {leaf:#x}, subleaf 0x0, {register} bit {bit})");
            assert!(text.contains(&place), "{place}: {text}");
            assert_eq!(compatibility(&poorer, &host(&full)), [], "more is no harm");
        }
    }

    #[test]
    fn a_leaf_that_the_host_does_not_have_is_missing_bit_by_bit() {
        let named = compatibility(&cpuid(u32::MAX), &host(&[]))
            .iter()
            .filter(|missing| matches!(missing, Missing::Feature { .. }))
            .count();
        let bits: u32 = FEATURE_WORDS
            .iter()
            .map(|word| word.compared().count_ones())
            .sum();
        assert_eq!(named, usize::try_from(bits).unwrap());
        assert_eq!(compatibility(&cpuid(0), &host(&[])), []);
    }

    #[test]
    fn another_vendor_and_wider_addresses_are_named() {
        let entry = |leaf, text: &[u8; 12], eax| {
            let word = |at: usize| u32::from_le_bytes(text.get(at..at + 4).unwrap().try_into().unwrap());
            CpuidEntryState {
                leaf,
                subleaf: 0,
                flags: 0,
                eax,
                ebx: word(0),
                ecx: word(8),
                edx: word(4),
            }
        };
        let none = b"\0\0\0\0\0\0\0\0\0\0\0\0";
        let saved = [entry(0, b"AuthenticAMD", 16), entry(0x8000_0008, none, 0x3034)];
        let host = host(&[entry(0, b"GenuineIntel", 36), entry(0x8000_0008, none, 0x302e)]);
        let missing = compatibility(&saved, &host);
        let text = CompatibilityError::Missing(missing).to_string();
        assert!(
            text.contains("by AuthenticAMD (this one is by GenuineIntel)"),
            "{text}"
        );
        assert!(text.contains("addresses of 52 bits"), "{text}");
        assert!(text.contains("here 46"), "{text}");
    }

    #[test]
    fn a_host_can_run_what_it_has_made() {
        let Some(vm) = testing::vm("a_host_can_run_what_it_has_made", 2) else {
            return;
        };
        let topology = Topology::new(2, Smt::On).unwrap();
        let cpu = Cpu::new(&vm.kvm, topology, CpuTemplate::default()).unwrap();
        let shape = StateShape::new(&vm.kvm, &vm.vm).unwrap();
        let mut saved = Vec::new();
        let supported = Cpuid::supported(&vm.kvm).unwrap();
        let given = || given_to_blank(&vm.kvm, &supported);
        for (index, vcpu) in (0..).zip(&vm.vcpus) {
            cpu.configure(vcpu, index).unwrap();
            saved.push(VcpuState::save(vcpu, &shape).unwrap());
        }
        check(&supported, given, &saved).unwrap();
        for entry in saved.iter_mut().flat_map(|vcpu| &mut vcpu.cpuid) {
            if (entry.leaf, entry.subleaf) == (7, 1) {
                // A bit that no processor has.
                entry.eax |= 1 << 31;
            }
        }
        let text = check(&supported, given, &saved).unwrap_err().to_string();
        let bit = "leaf 0x7, subleaf 0x1, eax bit 31";
        assert_eq!(text.matches(bit).count(), 1, "{text}");
    }

    #[test]
    fn absurdly_many_answers_are_no_burden() {
        let mut entries = cpuid(u32::MAX);
        entries = entries.iter().cycle().take(1_000_000).copied().collect();
        assert!(compatibility(&entries, &host(&[])).len() < 1000);
    }

    #[test]
    fn every_name_belongs_to_a_bit_and_is_there_once_in_its_register() {
        for word in &FEATURE_WORDS {
            let names: Vec<_> = (0..64).filter_map(|bit| word.name(bit)).collect();
            assert!((32..64).all(|bit| word.name(bit).is_none()), "{names:?}");
            let mut unique = names.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), names.len(), "{names:?}");
        }
    }
}
