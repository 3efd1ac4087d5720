//! XSAVE's area in its standard format: 4096 bytes, which hold everything up to AVX-512, and more where the host's
//! features need more.
#![expect(unsafe_code, reason = "KVM copies as many bytes as the host's features need")]

use kvm_bindings::{Xsave, kvm_xsave, kvm_xsave2};
use kvm_ioctls::VcpuFd;
use zerocopy::IntoBytes;

use super::super::failed;
use super::StateError;

/// The part that every host has.
const FIXED_BYTES: usize = size_of::<kvm_xsave>();
/// The area is an array of these.
const WORD_BYTES: usize = size_of::<u32>();

/// The size of the area by the host's answer to KVM_CAP_XSAVE2: none where it knows only the fixed part.
pub(super) fn size_bytes(answer: i32) -> usize {
    let size_bytes = usize::try_from(answer).unwrap_or(0).max(FIXED_BYTES);
    size_bytes.next_multiple_of(WORD_BYTES)
}

pub(super) fn save(vcpu: &VcpuFd, size_bytes: usize) -> Result<Vec<u8>, StateError> {
    if size_bytes == FIXED_BYTES {
        let area = vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
        return Ok(area.region.as_bytes().to_vec());
    }
    let mut area = area([0; FIXED_BYTES / WORD_BYTES], size_bytes);
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says. That does not change later: it would by
    // arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which this process does not call.
    unsafe { vcpu.get_xsave2(&mut area) }.map_err(failed("KVM_GET_XSAVE2"))?;
    let fixed = &area.as_fam_struct_ref().xsave.region;
    Ok([fixed.as_bytes(), area.as_slice().as_bytes()].concat())
}

/// Takes an area of another size than this host's too, if what this host has no room for is zero.
pub(super) fn restore(vcpu: &VcpuFd, bytes: &[u8], size_bytes: usize) -> Result<(), StateError> {
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED_BYTES>() else {
        return Err(StateError::Length {
            what: "floating-point and vector registers",
            len: bytes.len(),
            expected: FIXED_BYTES,
        });
    };
    let (rest, beyond) = rest.split_at(rest.len().min(size_bytes - FIXED_BYTES));
    if beyond.iter().any(|byte| *byte != 0) {
        let (len, limit) = (bytes.len(), size_bytes);
        return Err(StateError::Xsave { len, limit });
    }
    let mut area = area(zerocopy::transmute!(*fixed), size_bytes);
    let room = area.as_mut_slice().as_mut_bytes();
    room.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says, as above.
    unsafe { vcpu.set_xsave2(&area) }.map_err(failed("KVM_SET_XSAVE"))?;
    Ok(())
}

/// An area of this host's size with `fixed` at its start and zeros after that.
fn area(fixed: [u32; FIXED_BYTES / WORD_BYTES], size_bytes: usize) -> Xsave {
    let len = (size_bytes - FIXED_BYTES) / WORD_BYTES;
    let xsave = kvm_xsave {
        region: fixed,
        ..Default::default()
    };
    Xsave::from_header(kvm_xsave2 { len, xsave }).expect("KVM gives the area a size far below the limit")
}
