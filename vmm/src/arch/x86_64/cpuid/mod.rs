//! What the guest's CPUID instruction answers: what KVM supports, changed by the template, made
//! true for one virtual processor, less the leaves that the template drops.
//!
//! The result is Firecracker's, so that a template made for it means the same here.

mod amd;
mod brand;
pub mod compatibility;
mod features;
mod intel;
mod normalize;

use std::arch::x86_64::{__cpuid_count, CpuidResult};

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd};

use super::cpu::Topology;
use super::template::{CpuTemplate, CpuidModifier, CpuidRegister};

/// Why CPUID could not be made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum CpuidError {
    #[error("KVM_GET_SUPPORTED_CPUID failed")]
    Supported(#[source] kvm_ioctls::Error),
    #[error(
        "the CPU template changes CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, which this host's KVM does \
         not have: take it out of the template"
    )]
    Missing { leaf: u32, subleaf: u32 },
    #[error("KVM_GET_CPUID2 failed")]
    Given(#[source] kvm_ioctls::Error),
    #[error("CPUID has {count} entries, and KVM takes {KVM_MAX_CPUID_ENTRIES}")]
    TooMany { count: usize },
    #[error("KVM_SET_CPUID2 failed with {count} entries: look at the CPU template")]
    Set {
        count: usize,
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// The answers of one processor, in the order of their leaves.
#[derive(Clone, Debug)]
pub struct Cpuid {
    entries: Vec<kvm_cpuid_entry2>,
}

/// The processor that this process runs on, or a test's.
pub type Host<'a> = &'a dyn Fn(u32, u32) -> CpuidResult;

/// Asks the processor that this process runs on.
pub fn this_host(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// Who made the processor; some leaves mean different things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vendor {
    Intel,
    Amd,
    Other,
}

impl Cpuid {
    /// What KVM can give a guest on this host.
    pub fn supported(kvm: &Kvm) -> Result<Cpuid, CpuidError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(CpuidError::Supported)?;
        Ok(Cpuid::from_entries(supported.as_slice()))
    }

    /// These answers, put in order.
    pub fn from_entries(entries: &[kvm_cpuid_entry2]) -> Cpuid {
        let mut cpuid = Cpuid {
            entries: entries.to_vec(),
        };
        cpuid.entries.sort_by_key(|entry| (entry.function, entry.index));
        cpuid
    }

    /// Applies the template's modifiers; a leaf that isn't there is an error.
    pub fn modify(&mut self, modifiers: &[CpuidModifier]) -> Result<(), CpuidError> {
        for modifier in modifiers {
            let CpuidModifier {
                leaf,
                subleaf,
                flags,
                ref registers,
            } = *modifier;
            let entry = self
                .find_mut(leaf, subleaf)
                .ok_or(CpuidError::Missing { leaf, subleaf })?;
            entry.flags = flags;
            for (register, mask) in registers {
                let register = match register {
                    CpuidRegister::Eax => &mut entry.eax,
                    CpuidRegister::Ebx => &mut entry.ebx,
                    CpuidRegister::Ecx => &mut entry.ecx,
                    CpuidRegister::Edx => &mut entry.edx,
                };
                *register = mask.apply(*register);
            }
        }
        Ok(())
    }

    /// The answers of processor `index` of a machine of `topology`.
    pub fn for_vcpu(&self, index: u8, topology: Topology, template: &CpuTemplate, host: Host<'_>) -> Cpuid {
        let mut cpuid = self.clone();
        normalize::common(&mut cpuid, index, topology, host);
        match Vendor::of(host) {
            Vendor::Intel => intel::normalize(&mut cpuid, topology, host),
            Vendor::Amd => amd::normalize(&mut cpuid, index, topology, host),
            Vendor::Other => {}
        }
        cpuid
            .entries
            .retain(|entry| !template.cpuid_drop.contains(&entry.function));
        cpuid
    }

    /// Gives `vcpu` these answers.
    pub fn set(&self, vcpu: &VcpuFd) -> Result<(), CpuidError> {
        let count = self.entries.len();
        let cpuid = CpuId::from_entries(&self.entries).map_err(|_| CpuidError::TooMany { count })?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(|source| CpuidError::Set { count, source })
    }

    /// What `vcpu` really answers.
    pub fn of_vcpu(vcpu: &VcpuFd) -> Result<Cpuid, CpuidError> {
        let given = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(CpuidError::Given)?;
        Ok(Cpuid::from_entries(given.as_slice()))
    }

    /// All answers.
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// One register of an answer; zero where there is none, as a processor has it.
    fn answer(&self, leaf: u32, subleaf: u32, register: CpuidRegister) -> u32 {
        self.entries
            .iter()
            .find(|entry| (entry.function, entry.index) == (leaf, subleaf))
            .map_or(0, |entry| match register {
                CpuidRegister::Eax => entry.eax,
                CpuidRegister::Ebx => entry.ebx,
                CpuidRegister::Ecx => entry.ecx,
                CpuidRegister::Edx => entry.edx,
            })
    }

    fn find_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.entries
            .iter_mut()
            .find(|entry| entry.function == leaf && entry.index == subleaf)
    }

    fn leaf_mut(&mut self, leaf: u32) -> impl Iterator<Item = &mut kvm_cpuid_entry2> {
        self.entries
            .iter_mut()
            .filter(move |entry| entry.function == leaf)
    }

    /// Puts `entries` in the place of all subleaves of `leaf`.
    fn replace(&mut self, leaf: u32, entries: impl IntoIterator<Item = kvm_cpuid_entry2>) {
        self.entries.retain(|entry| entry.function != leaf);
        let at = self.entries.partition_point(|entry| entry.function < leaf);
        self.entries.splice(at..at, entries);
    }
}

impl Vendor {
    fn of(host: Host<'_>) -> Vendor {
        let leaf = host(0, 0);
        match (
            &leaf.ebx.to_le_bytes(),
            &leaf.edx.to_le_bytes(),
            &leaf.ecx.to_le_bytes(),
        ) {
            (b"Genu", b"ineI", b"ntel") => Vendor::Intel,
            (b"Auth", b"enti", b"cAMD") => Vendor::Amd,
            _ => Vendor::Other,
        }
    }
}

/// An entry with the answer `result`, one of several subleaves.
fn subleaf_entry(leaf: u32, subleaf: u32, result: CpuidResult) -> kvm_cpuid_entry2 {
    let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    kvm_cpuid_entry2 {
        index: subleaf,
        flags,
        ..plain_entry(leaf, result)
    }
}

/// An entry with the answer `result`, whatever the subleaf.
fn plain_entry(leaf: u32, result: CpuidResult) -> kvm_cpuid_entry2 {
    let CpuidResult { eax, ebx, ecx, edx } = result;
    kvm_cpuid_entry2 {
        function: leaf,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// Replaces bits `low..=high` of `register` by `value`, cut to that width.
fn set_bits(register: &mut u32, (high, low): (u32, u32), value: u32) {
    let mask = (u32::MAX >> (31 - (high - low))) << low;
    *register = *register & !mask | (value << low) & mask;
}

/// Bits `low..=high` of `register`.
fn bits(register: u32, (high, low): (u32, u32)) -> u32 {
    (register >> low) & (u32::MAX >> (31 - (high - low)))
}

#[cfg(test)]
mod tests;
