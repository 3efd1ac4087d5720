//! Segments, descriptor tables and control registers: KVM_SET_SREGS, or KVM_SET_SREGS2 for what that one leaves out.
//!
//! A processor with PAE paging holds four page directory pointers that need not be in memory any more. Kernels before
//! 5.14 read them from memory when a vCPU is restored, which is right for every guest that exists.
#![expect(unsafe_code, reason = "kvm-ioctls does not have these two ioctls")]

use kvm_bindings::{KVM_SREGS2_FLAGS_PDPTRS_VALID, KVMIO, kvm_sregs, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ref};

use super::super::{KvmError, failed};
use super::{StateError, Support};

/// KVM API, section 4.132.
const KVM_GET_SREGS2: libc::c_ulong = number(_IOC_READ, 0xcc);
/// KVM API, section 4.133.
const KVM_SET_SREGS2: libc::c_ulong = number(_IOC_WRITE, 0xcd);

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
