//! AMD's own leaves (APM volume 3, appendix E).

use super::{Cpuid, Host, bits, brand, plain_entry, set_bits, subleaf_entry};
use crate::arch::x86_64::cpu::Topology;

const CACHE_TOPOLOGY: u32 = 0x8000_001d;
const PROCESSOR_TOPOLOGY: u32 = 0x8000_001e;
/// Processors have four caches; this bounds the walk.
const CACHES_MAX: u32 = 16;

pub(super) fn normalize(cpuid: &mut Cpuid, index: u8, topology: Topology, host: Host<'_>) {
    features(cpuid);
    processor_count(cpuid, topology);
    if host(0x8000_0000, 0).eax >= PROCESSOR_TOPOLOGY {
        cache_topology(cpuid, topology, host);
        processor_topology(cpuid, index, topology, host);
    }
    brand::set(cpuid, brand::AMD);
}

fn features(cpuid: &mut Cpuid) {
    const ARCH_CAPABILITIES: u32 = 29;
    const TOPOLOGY_EXTENSIONS: u32 = 22;
    if let Some(leaf) = cpuid.find_mut(7, 0) {
        // KVM emulates this MSR everywhere, but on AMD no kernel expects it.
        set_bits(&mut leaf.edx, (ARCH_CAPABILITIES, ARCH_CAPABILITIES), 0);
    }
    if let Some(leaf) = cpuid.find_mut(0x8000_0001, 0) {
        set_bits(&mut leaf.ecx, (TOPOLOGY_EXTENSIONS, TOPOLOGY_EXTENSIONS), 1);
    }
}

/// 0x80000008: how many threads there are, in seven bits of APIC ID.
fn processor_count(cpuid: &mut Cpuid, topology: Topology) {
    const APIC_ID_BITS: u32 = 7;
    if let Some(leaf) = cpuid.find_mut(0x8000_0008, 0) {
        set_bits(&mut leaf.ecx, (15, 12), APIC_ID_BITS);
        set_bits(&mut leaf.ecx, (7, 0), u32::from(topology.vcpus()) - 1);
    }
}

/// 0x8000001d: the host's caches, shared as the guest's processors share them.
fn cache_topology(cpuid: &mut Cpuid, topology: Topology, host: Host<'_>) {
    let caches = (0..CACHES_MAX).map(|index| (index, host(CACHE_TOPOLOGY, index)));
    let caches = caches.take_while(|(_, cache)| bits(cache.eax, (4, 0)) != 0);
    let entries: Vec<_> = caches
        .map(|(index, mut cache)| {
            let sharing = match bits(cache.eax, (7, 5)) {
                1 | 2 => Some(topology.threads_per_core()),
                3 => Some(topology.vcpus()),
                _ => None,
            };
            if let Some(sharing) = sharing {
                set_bits(&mut cache.eax, (25, 14), u32::from(sharing) - 1);
            }
            subleaf_entry(CACHE_TOPOLOGY, index, cache)
        })
        .collect();
    cpuid.replace(CACHE_TOPOLOGY, entries);
}

/// 0x8000001e: which core this thread belongs to; all in node 0 of one package.
fn processor_topology(cpuid: &mut Cpuid, index: u8, topology: Topology, host: Host<'_>) {
    let mut leaf = host(PROCESSOR_TOPOLOGY, 0);
    leaf.eax = index.into();
    set_bits(
        &mut leaf.ebx,
        (7, 0),
        (index / topology.threads_per_core()).into(),
    );
    set_bits(&mut leaf.ebx, (15, 8), u32::from(topology.threads_per_core()) - 1);
    set_bits(&mut leaf.ecx, (10, 0), 0);
    cpuid.replace(PROCESSOR_TOPOLOGY, [plain_entry(PROCESSOR_TOPOLOGY, leaf)]);
}
