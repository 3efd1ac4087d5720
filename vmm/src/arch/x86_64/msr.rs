//! Model-specific registers at boot.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// Why registers could not be set.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum MsrError {
    #[error("KVM_SET_MSRS failed for {count} registers")]
    Set {
        count: usize,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("KVM_GET_MSRS failed")]
    Get(#[source] kvm_ioctls::Error),
    #[error(
        "this host's KVM does not let a guest have {value:#x} in MSR {index:#x}: take it out of the CPU template"
    )]
    Refused { index: u32, value: u64 },
    #[error(
        "the CPU template changes MSR {index:#x}, which this host's KVM does not have: take it out of the template"
    )]
    Missing { index: u32 },
}

const TSC: u32 = 0x10;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, and write-back where none says otherwise.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// One register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msr {
    /// The number that RDMSR takes in `ecx`.
    pub index: u32,
    /// Its 64 bits.
    pub value: u64,
}

/// What a kernel expects at its entry: no leftovers in the system-call registers, the time stamp
/// counter from zero, fast strings, memory cached.
const AT_BOOT: [Msr; 11] = [
    Msr {
        index: SYSENTER_CS,
        value: 0,
    },
    Msr {
        index: SYSENTER_ESP,
        value: 0,
    },
    Msr {
        index: SYSENTER_EIP,
        value: 0,
    },
    Msr {
        index: STAR,
        value: 0,
    },
    Msr {
        index: CSTAR,
        value: 0,
    },
    Msr {
        index: KERNEL_GS_BASE,
        value: 0,
    },
    Msr {
        index: SYSCALL_MASK,
        value: 0,
    },
    Msr {
        index: LSTAR,
        value: 0,
    },
    Msr { index: TSC, value: 0 },
    Msr {
        index: MISC_ENABLE,
        value: MISC_ENABLE_FAST_STRING,
    },
    Msr {
        index: MTRR_DEF_TYPE,
        value: MTRR_ENABLED_WRITE_BACK,
    },
];

/// Sets the registers for boot, and over them `template`'s, which must all be taken.
///
/// A boot register that this KVM doesn't have is left out: the guest can't have it either.
pub fn set_for_boot(vcpu: &VcpuFd, template: &[Msr]) -> Result<(), MsrError> {
    let mut left = &AT_BOOT[..];
    while let Some(refused) = set(vcpu, left)? {
        log::debug!(
            "KVM does not take MSR {:#x} = {:#x} at boot",
            refused.msr.index,
            refused.msr.value
        );
        left = left.get(refused.position + 1..).unwrap_or_default();
    }
    match set(vcpu, template)? {
        Some(Refused { msr, .. }) => Err(MsrError::Refused {
            index: msr.index,
            value: msr.value,
        }),
        None => Ok(()),
    }
}

/// Reads registers that a template is going to change.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, MsrError> {
    let mut read = Vec::with_capacity(indices.len());
    for &index in indices {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).expect("one entry is within the limit");
        let count = vcpu.get_msrs(&mut msrs).map_err(MsrError::Get)?;
        match msrs.as_slice().first() {
            Some(entry) if count == 1 => read.push(Msr {
                index,
                value: entry.data,
            }),
            _ => return Err(MsrError::Missing { index }),
        }
    }
    Ok(read)
}

struct Refused {
    position: usize,
    msr: Msr,
}

/// KVM takes registers in order up to the first that it refuses, which is the answer.
fn set(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<Option<Refused>, MsrError> {
    let entry = |msr: &Msr| kvm_msr_entry {
        index: msr.index,
        data: msr.value,
        ..Default::default()
    };
    for (chunk_index, chunk) in msrs.chunks(CHUNK).enumerate() {
        let entries: Vec<_> = chunk.iter().map(entry).collect();
        let entries = Msrs::from_entries(&entries).expect("a chunk is within the limit");
        let done = vcpu.set_msrs(&entries).map_err(|source| MsrError::Set {
            count: chunk.len(),
            source,
        })?;
        if let Some(msr) = chunk.get(done) {
            return Ok(Some(Refused {
                position: chunk_index * CHUNK + done,
                msr: *msr,
            }));
        }
    }
    Ok(None)
}

/// Below KVM's limit of 256 for one call.
const CHUNK: usize = 128;

#[cfg(test)]
#[expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]
mod tests {
    use super::*;
    use crate::arch::x86_64::testing;

    #[test]
    fn a_vcpu_takes_the_boot_registers_and_a_templates() {
        let Some(vm) = testing::vm("a_vcpu_takes_the_boot_registers_and_a_templates", 1) else {
            return;
        };
        let star = Msr {
            index: STAR,
            value: 0x0023_0010_0000_0000,
        };
        set_for_boot(&vm.vcpus[0], &[star]).unwrap();
        let read = read(&vm.vcpus[0], &[MTRR_DEF_TYPE, STAR]).unwrap();
        assert_eq!(
            read,
            [
                Msr {
                    index: MTRR_DEF_TYPE,
                    value: MTRR_ENABLED_WRITE_BACK
                },
                star
            ]
        );
    }

    #[test]
    fn a_register_that_kvm_lacks_is_named() {
        let Some(vm) = testing::vm("a_register_that_kvm_lacks_is_named", 1) else {
            return;
        };
        let absent = Msr {
            index: 0xdead_beef,
            value: 1,
        };
        let missing = read(&vm.vcpus[0], &[absent.index]).unwrap_err().to_string();
        assert!(missing.contains("0xdeadbeef"), "{missing}");
        let refused = set_for_boot(&vm.vcpus[0], &[absent]).unwrap_err().to_string();
        assert!(refused.contains("0xdeadbeef"), "{refused}");
    }
}
