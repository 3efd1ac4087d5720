//! The model-specific registers of a vCPU, as many as its host's KVM can read.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

use super::super::failed;
use super::{MSRS_MAX, MsrState, StateError};

/// The time at which the local timer fires.
const TSC_DEADLINE: u32 = 0x6e0;
/// What KVM does not list, or not on every kernel, and the guest has nevertheless: memory types (MTRRs: SDM volume 3,
/// 12.11) and DEBUGCTL.
const UNLISTED: [RangeInclusive<u32>; 6] = [
    0x1d9..=0x1d9,
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];
/// Hyper-V's, which KVM lists always. Our guests do not have them, as KVM_GET_SUPPORTED_CPUID does not offer them; and to
/// set one makes KVM keep Hyper-V's state for the vCPU.
const HYPER_V: RangeInclusive<u32> = 0x4000_0000..=0x4000_0fff;
/// Below KVM's limit of 256 for one call.
const CHUNK: usize = 128;

/// KVM's own registers that name a place in guest memory (Documentation/virt/kvm/x86/msr.rst): which bits are the address, and
/// how many bytes lie there. When one is set KVM writes there, or looks the page up.
const POINTERS: [(u32, u64, u64); 7] = [
    (0x11, !0, 12),
    (0x12, !1, 32),
    (0x4b56_4d00, !0, 12),
    (0x4b56_4d01, !1, 32),
    (0x4b56_4d02, !0x3f, 64),
    (0x4b56_4d03, !0x3f, 64),
    (0x4b56_4d04, !3, 4),
];

/// The place that `msr` names, if it is such a register and in use.
pub(super) fn memory_behind(msr: &MsrState) -> Option<(GuestAddress, u64)> {
    let (_, mask, len_bytes) = POINTERS.iter().find(|(index, ..)| *index == msr.index)?;
    let address = msr.value & mask;
    (address != 0).then_some((GuestAddress(address), *len_bytes))
}

/// What is read of a vCPU by a host whose KVM lists `listed`.
pub(super) fn indices(listed: &[u32]) -> Vec<u32> {
    let mut indices = listed.to_vec();
    indices.extend(UNLISTED.into_iter().flatten());
    indices.sort_unstable();
    indices.dedup();
    indices.retain(|index| !HYPER_V.contains(index));
    indices
}

/// Those of `indices` that this vCPU has, with their values.
pub(super) fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrState>, StateError> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let (chunk, _) = left.split_at(left.len().min(CHUNK));
        let read = read(vcpu, chunk)?;
        // KVM reads in order up to the first that the vCPU does not have.
        left = left
            .get(read.len() + usize::from(read.len() < chunk.len())..)
            .unwrap_or_default();
        saved.extend(read);
    }
    Ok(saved)
}

/// Sets every register of `saved`, the timer's deadline last: it is counted by the time stamp counter, and KVM drops it
/// unless the local interrupt controller is there already.
///
/// A register that KVM does not take is without harm if it has its value anyway: those that only tell the guest what
/// the processor can do, and those that follow from others.
pub(super) fn restore(vcpu: &VcpuFd, saved: &[MsrState]) -> Result<(), StateError> {
    let count = saved.len();
    if count > MSRS_MAX {
        return Err(StateError::TooManyMsrs { count });
    }
    let mut ordered = saved.to_vec();
    ordered.sort_by_key(|msr| (msr.index == TSC_DEADLINE, msr.index));
    let mut refused = Vec::new();
    let mut left = ordered.as_slice();
    while !left.is_empty() {
        let (chunk, _) = left.split_at(left.len().min(CHUNK));
        let done = write(vcpu, chunk)?;
        refused.extend(chunk.get(done));
        left = left
            .get(done + usize::from(done < chunk.len())..)
            .unwrap_or_default();
    }
    different(vcpu, &refused)
}

/// Whether registers that KVM did not take have other values than these.
fn different(vcpu: &VcpuFd, refused: &[&MsrState]) -> Result<(), StateError> {
    let mut different = Vec::new();
    for msr in refused {
        if read(vcpu, &[msr.index])?.first() != Some(msr) {
            different.push(*msr);
        }
    }
    match different.first() {
        None => Ok(()),
        Some(MsrState { index, value }) => Err(StateError::Msr {
            index: *index,
            value: *value,
            count: different.len(),
        }),
    }
}

/// The first of `indices` up to one that cannot be read.
fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrState>, StateError> {
    let entry = |index: &u32| kvm_msr_entry {
        index: *index,
        ..Default::default()
    };
    let entries: Vec<_> = indices.iter().map(entry).collect();
    let mut msrs = Msrs::from_entries(&entries).expect("a chunk is within the limit");
    let count = vcpu.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
    let state = |entry: &kvm_msr_entry| MsrState {
        index: entry.index,
        value: entry.data,
    };
    Ok(msrs.as_slice().iter().take(count).map(state).collect())
}

/// How many of `msrs` KVM has taken, up to one that it refuses.
fn write(vcpu: &VcpuFd, msrs: &[MsrState]) -> Result<usize, StateError> {
    let entry = |msr: &MsrState| kvm_msr_entry {
        index: msr.index,
        data: msr.value,
        ..Default::default()
    };
    let entries: Vec<_> = msrs.iter().map(entry).collect();
    let entries = Msrs::from_entries(&entries).expect("a chunk is within the limit");
    Ok(vcpu.set_msrs(&entries).map_err(failed("KVM_SET_MSRS"))?)
}

#[cfg(test)]
#[expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]
mod tests {
    use super::*;
    use crate::arch::x86_64::testing;

    const STAR: u32 = 0xc000_0081;
    /// Can be read, and is not for anybody to set.
    const MCG_CAP: u32 = 0x179;

    #[test]
    fn a_list_has_each_register_once_and_none_of_hyper_vs() {
        let indices = indices(&[STAR, 0x2ff, 0x4000_0001, 0x10]);
        assert!(indices.is_sorted_by(|a, b| a < b));
        assert_eq!((indices.first(), indices.last()), (Some(&0x10), Some(&STAR)));
        assert!(!indices.contains(&0x4000_0001));
    }

    #[test]
    fn a_register_that_names_memory_names_it_without_its_flags_and_only_when_it_is_in_use() {
        let behind = |index, value| memory_behind(&MsrState { index, value });
        assert_eq!(
            behind(0x4b56_4d01, 0x5001),
            Some((GuestAddress(0x5000), 32)),
            "the clock"
        );
        assert_eq!(
            behind(0x4b56_4d03, 0x7041),
            Some((GuestAddress(0x7040), 64)),
            "stolen time"
        );
        for (index, value) in [(0x4b56_4d01, 1), (0x4b56_4d01, 0), (STAR, 0x5001)] {
            assert_eq!(behind(index, value), None, "{index:#x} {value:#x}");
        }
    }

    #[test]
    fn registers_that_the_vcpu_lacks_are_left_out_of_a_list_of_many_chunks() {
        let test = "registers_that_the_vcpu_lacks_are_left_out_of_a_list_of_many_chunks";
        let Some(vm) = testing::vm(test, 1) else {
            return;
        };
        let absent = 0xdead_0000..0xdead_0000 + 300;
        let indices: Vec<u32> = [STAR].into_iter().chain(absent).chain([STAR]).collect();
        let saved = save(&vm.vcpus[0], &indices).unwrap();
        assert_eq!(
            saved.iter().map(|msr| msr.index).collect::<Vec<_>>(),
            [STAR, STAR]
        );
        let value = 0x0023_0010_0000_0000;
        let many: Vec<_> = (0..300).map(|value| MsrState { index: STAR, value }).collect();
        let last = MsrState { index: STAR, value };
        restore(&vm.vcpus[0], &[many.as_slice(), &[last]].concat()).unwrap();
        assert_eq!(save(&vm.vcpus[0], &[STAR]).unwrap(), [last]);
    }

    #[test]
    fn a_register_that_cannot_be_set_is_missed_only_where_its_value_differs() {
        let test = "a_register_that_cannot_be_set_is_missed_only_where_its_value_differs";
        let Some(vm) = testing::vm(test, 1) else {
            return;
        };
        let saved = save(&vm.vcpus[0], &[MCG_CAP, STAR]).unwrap();
        restore(&vm.vcpus[0], &saved).unwrap();
        let mut other = saved.clone();
        other[0].value ^= 1;
        let text = restore(&vm.vcpus[0], &other).unwrap_err().to_string();
        assert!(text.contains("MSR 0x179"), "{text}");
    }
}
