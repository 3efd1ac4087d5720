//! Segments, descriptor tables and control registers: KVM_SET_SREGS, or KVM_SET_SREGS2 for what that one leaves out.
//!
//! A processor with PAE paging holds four page directory pointers that need not be in memory any more. Kernels before
//! 5.14 read them from memory when a vCPU is restored, which is right for every guest that exists.
#![expect(unsafe_code, reason = "kvm-ioctls does not have these two ioctls")]

use kvm_bindings::{KVM_SREGS2_FLAGS_PDPTRS_VALID, KVMIO, kvm_sregs, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ref};

use super::super::{KvmError, failed};
use super::{StateError, Support};

/// KVM API, section 4.132.
const KVM_GET_SREGS2: libc::c_ulong = number(_IOC_READ, 0xcc);
/// KVM API, section 4.133.
const KVM_SET_SREGS2: libc::c_ulong = number(_IOC_WRITE, 0xcd);

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LMA: u64 = 1 << 10;
/// The bits of CR3 that are an address (SDM volume 3, 4.4.1).
const CR3_PAE: u64 = 0xffff_ffe0;

const PDPTRS_VALID: u64 = KVM_SREGS2_FLAGS_PDPTRS_VALID as u64;

#[expect(clippy::cast_possible_truncation, reason = "the structure has 320 bytes")]
const fn number(direction: libc::c_uint, nr: libc::c_uint) -> libc::c_ulong {
    ioctl_expr(direction, KVMIO, nr, size_of::<kvm_sregs2>() as libc::c_uint)
}

/// The page directory pointers, if the vCPU holds some.
pub(super) fn page_directory_pointers(
    vcpu: &VcpuFd,
    sregs2: Support,
) -> Result<Option<[u64; 4]>, StateError> {
    if sregs2 == Support::Missing {
        return Ok(None);
    }
    let mut state = kvm_sregs2::default();
    // SAFETY: KVM has this ioctl and fills the structure, whose size is part of the ioctl's number.
    let done = unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2, &mut state) };
    succeeded(done, "KVM_GET_SREGS2")?;
    Ok((state.flags & PDPTRS_VALID != 0).then_some(state.pdptrs))
}

/// Sets all of it. Reads guest memory where a guest with PAE paging comes without its pointers.
pub(super) fn restore(
    vcpu: &VcpuFd,
    sregs: &kvm_sregs,
    pdptrs: Option<[u64; 4]>,
    sregs2: Support,
) -> Result<(), StateError> {
    vcpu.set_sregs(sregs).map_err(failed("KVM_SET_SREGS"))?;
    if let (Some(pdptrs), Support::Present) = (pdptrs, sregs2) {
        let state = with_pointers(sregs, pdptrs);
        // SAFETY: KVM has this ioctl and only reads the structure, whose size is part of the ioctl's number.
        let done = unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2, &state) };
        succeeded(done, "KVM_SET_SREGS2")?;
    }
    Ok(())
}

/// Where a processor with PAE paging has its page directory pointers, which KVM reads when the registers are set.
pub(super) fn page_directory(sregs: kvm_sregs) -> Option<(GuestAddress, u64)> {
    let is_pae = sregs.cr0 & CR0_PG != 0 && sregs.cr4 & CR4_PAE != 0 && sregs.efer & EFER_LMA == 0;
    is_pae.then_some((GuestAddress(sregs.cr3 & CR3_PAE), 32))
}

fn succeeded(done: libc::c_int, ioctl: &'static str) -> Result<(), KvmError> {
    match done {
        0 => Ok(()),
        _ => Err(failed(ioctl)(kvm_ioctls::Error::last())),
    }
}

fn with_pointers(sregs: &kvm_sregs, pdptrs: [u64; 4]) -> kvm_sregs2 {
    kvm_sregs2 {
        cs: sregs.cs,
        ds: sregs.ds,
        es: sregs.es,
        fs: sregs.fs,
        gs: sregs.gs,
        ss: sregs.ss,
        tr: sregs.tr,
        ldt: sregs.ldt,
        gdt: sregs.gdt,
        idt: sregs.idt,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        flags: PDPTRS_VALID,
        pdptrs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_processor_with_pae_paging_has_page_directory_pointers_in_memory() {
        let sregs = |cr0, cr4, efer| kvm_sregs {
            cr0,
            cr3: 0x1234_5018,
            cr4,
            efer,
            ..Default::default()
        };
        let pointers = page_directory(sregs(CR0_PG | 1, CR4_PAE, 0));
        assert_eq!(pointers, Some((GuestAddress(0x1234_5000), 32)));
        for (cr0, cr4, efer) in [
            (1, CR4_PAE, 0),
            (CR0_PG | 1, 0, 0),
            (CR0_PG | 1, CR4_PAE, EFER_LMA),
        ] {
            assert_eq!(page_directory(sregs(cr0, cr4, efer)), None);
        }
    }
}
