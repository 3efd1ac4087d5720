//! Intel's own leaves (SDM volume 2A, CPUID).

use super::{Cpuid, Host, bits, brand, set_bits};
use crate::arch::x86_64::cpu::Topology;

pub(super) fn normalize(cpuid: &mut Cpuid, topology: Topology, host: Host<'_>) {
    cache_sharing(cpuid, topology);
    power(cpuid);
    features(cpuid);
    performance_counters(cpuid);
    extended_topology_v2(cpuid);
    brand::set(cpuid, &brand::intel(host));
}

/// Leaf 4: who shares each cache, and how many cores there are.
fn cache_sharing(cpuid: &mut Cpuid, topology: Topology) {
    for entry in cpuid.leaf_mut(4).take_while(|entry| bits(entry.eax, (4, 0)) != 0) {
        let sharing = match bits(entry.eax, (7, 5)) {
            1 | 2 => Some(topology.threads_per_core()),
            3 => Some(topology.vcpus()),
            _ => None,
        };
        if let Some(sharing) = sharing {
            set_bits(&mut entry.eax, (25, 14), u32::from(sharing) - 1);
        }
        set_bits(&mut entry.eax, (31, 26), u32::from(topology.cores()) - 1);
    }
}

/// Leaf 6: no turbo and no energy bias, which belong to the host.
fn power(cpuid: &mut Cpuid) {
    if let Some(leaf) = cpuid.find_mut(6, 0) {
        set_bits(&mut leaf.eax, (1, 1), 0);
        set_bits(&mut leaf.ecx, (3, 3), 0);
    }
}

/// Leaf 7: the FPU leaves out FDP, FCS and FDS as every modern one does, and no user-mode waiting,
/// by which a guest could put a host's core to sleep.
fn features(cpuid: &mut Cpuid) {
    const FDP_EXCPTN_ONLY: u32 = 6;
    const NO_FPU_CS_DS: u32 = 13;
    const WAITPKG: u32 = 5;
    if let Some(leaf) = cpuid.find_mut(7, 0) {
        set_bits(&mut leaf.ebx, (FDP_EXCPTN_ONLY, FDP_EXCPTN_ONLY), 1);
        set_bits(&mut leaf.ebx, (NO_FPU_CS_DS, NO_FPU_CS_DS), 1);
        set_bits(&mut leaf.ecx, (WAITPKG, WAITPKG), 0);
    }
}

/// Leaf 0xa: the guest has no performance counters.
fn performance_counters(cpuid: &mut Cpuid) {
    for entry in cpuid.leaf_mut(0xa) {
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
    }
}

/// Leaf 0x1f repeats 0xb: the machine has no domains that only the newer leaf can tell.
fn extended_topology_v2(cpuid: &mut Cpuid) {
    if cpuid.find_mut(0x1f, 0).is_none() {
        return;
    }
    let mut copies: Vec<_> = cpuid.leaf_mut(0xb).map(|entry| *entry).collect();
    for copy in &mut copies {
        copy.function = 0x1f;
    }
    cpuid.replace(0x1f, copies);
}
