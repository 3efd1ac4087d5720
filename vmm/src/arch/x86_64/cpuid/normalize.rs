//! What holds for every vendor: identity, APIC IDs, and leaf 0xb.

use std::arch::x86_64::CpuidResult;

use super::{Cpuid, Host, set_bits, subleaf_entry};
use crate::arch::x86_64::cpu::Topology;
use crate::arch::x86_64::layout::VCPUS_MAX;

/// CLFLUSH works on eight quadwords, the 64-byte line of every x86-64 processor.
const CLFLUSH_QUADWORDS: u32 = 8;

/// Domain types of leaf 0xb's `ecx[15:8]`.
const DOMAIN_THREAD: u32 = 1;
const DOMAIN_CORE: u32 = 2;

/// As many bits of the APIC ID as the largest machine needs.
const PACKAGE_ID_SHIFT: u32 = VCPUS_MAX.next_power_of_two().ilog2();

pub(super) fn common(cpuid: &mut Cpuid, index: u8, topology: Topology, host: Host<'_>) {
    vendor(cpuid, host);
    features(cpuid, index, topology);
    extended_topology(cpuid, index, topology);
    caches(cpuid, host);
}

/// The vendor is the host's, also against a template: its other leaves would make no sense.
fn vendor(cpuid: &mut Cpuid, host: Host<'_>) {
    if let Some(leaf) = cpuid.find_mut(0, 0) {
        let CpuidResult { ebx, ecx, edx, .. } = host(0, 0);
        (leaf.ebx, leaf.ecx, leaf.edx) = (ebx, ecx, edx);
    }
}

/// Leaf 1 (SDM volume 2A, CPUID, "Feature Information").
fn features(cpuid: &mut Cpuid, index: u8, topology: Topology) {
    const PDCM: u32 = 15;
    const TSC_DEADLINE: u32 = 24;
    const HYPERVISOR: u32 = 31;
    const HTT: u32 = 28;
    let Some(leaf) = cpuid.find_mut(1, 0) else { return };
    let ids = u32::from(topology.vcpus()).next_power_of_two();
    set_bits(&mut leaf.ebx, (15, 8), CLFLUSH_QUADWORDS);
    set_bits(&mut leaf.ebx, (23, 16), ids);
    set_bits(&mut leaf.ebx, (31, 24), index.into());
    // PDCM announces a performance MSR that the guest doesn't have.
    set_bits(&mut leaf.ecx, (PDCM, PDCM), 0);
    // The in-kernel APIC has the deadline timer whatever the host's has.
    set_bits(&mut leaf.ecx, (TSC_DEADLINE, TSC_DEADLINE), 1);
    set_bits(&mut leaf.ecx, (HYPERVISOR, HYPERVISOR), 1);
    set_bits(&mut leaf.edx, (HTT, HTT), u32::from(topology.vcpus() > 1));
}

/// Leaf 0xb: threads in a core, then everything in one package. KVM offers only subleaf 0.
fn extended_topology(cpuid: &mut Cpuid, index: u8, topology: Topology) {
    if cpuid.find_mut(0xb, 0).is_none() {
        return;
    }
    let edx = u32::from(index);
    let threads = CpuidResult {
        eax: topology.thread_bits(),
        ebx: topology.threads_per_core().into(),
        ecx: DOMAIN_THREAD << 8,
        edx,
    };
    let cores = CpuidResult {
        eax: PACKAGE_ID_SHIFT,
        ebx: topology.vcpus().into(),
        ecx: DOMAIN_CORE << 8 | 1,
        edx,
    };
    cpuid.replace(
        0xb,
        [subleaf_entry(0xb, 0, threads), subleaf_entry(0xb, 1, cores)],
    );
}

/// Cache sizes in AMD's leaves, which KVM does not fill in on every host.
fn caches(cpuid: &mut Cpuid, host: Host<'_>) {
    /// Reserved in 0x80000006, but some hosts set them.
    const RESERVED: u32 = 0x3_0000;
    for leaf in [0x8000_0005, 0x8000_0006] {
        if let Some(entry) = cpuid.find_mut(leaf, 0) {
            let CpuidResult { eax, ebx, ecx, edx } = host(leaf, 0);
            let edx = if leaf == 0x8000_0006 { edx & !RESERVED } else { edx };
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (eax, ebx, ecx, edx);
        }
    }
}
