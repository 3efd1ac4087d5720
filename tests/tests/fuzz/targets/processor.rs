//! A CPU template from its JSON to the answers of CPUID. An input is the JSON.

use std::arch::x86_64::CpuidResult;

use coracle_vmm::arch::x86_64::cpu::{Smt, Topology};
use coracle_vmm::arch::x86_64::cpuid::Cpuid;
use coracle_vmm::config::CpuConfig;
use coracle_vmm::machine::cpu_template;

pub(crate) fn run(data: &[u8]) {
    if let Ok(config) = serde_json::from_slice::<CpuConfig>(data) {
        check(&config);
    }
}

/// The template is the same when it is read again, and what it drops is gone.
pub(super) fn check(config: &CpuConfig) {
    let text = serde_json::to_vec(config).expect("a template can be written");
    let again: CpuConfig = serde_json::from_slice(&text).expect("and read again");
    assert_eq!(again, *config);

    let template = cpu_template::parsed(config);
    let mut cpuid = answers();
    if cpuid.modify(&template.cpuid_modifiers).is_err() {
        return;
    }
    for (vcpus, smt) in [(1, Smt::Off), (32, Smt::On)] {
        let topology = Topology::new(vcpus, smt).expect("both are possible");
        for host in [intel, amd] {
            let of_last = cpuid.for_vcpu(vcpus - 1, topology, &template, &host);
            let dropped = |leaf: &u32| template.cpuid_drop.contains(leaf);
            assert!(!of_last.entries().iter().any(|entry| dropped(&entry.function)));
        }
    }
}

/// Leaf and subleaf of everything that some line of the code looks at, and of one that nobody knows.
const LEAVES: &[(u32, u32)] = &[
    (0, 0),
    (1, 0),
    (2, 0),
    (4, 0),
    (4, 1),
    (4, 3),
    (6, 0),
    (7, 0),
    (7, 1),
    (0xa, 0),
    (0xb, 0),
    (0xb, 1),
    (0xd, 0),
    (0xd, 1),
    (0x1f, 0),
    (0x4000_0000, 0),
    (0x4000_0001, 0),
    (0x8000_0000, 0),
    (0x8000_0001, 0),
    (0x8000_0002, 0),
    (0x8000_0005, 0),
    (0x8000_0008, 0),
    (0x8000_001d, 0),
    (0x8000_001d, 3),
    (0x8000_001e, 0),
    (0xdead_beef, 7),
];

/// Answers such as KVM might give.
fn answers() -> Cpuid {
    let mut entries = Cpuid::from_entries(&[Default::default(); LEAVES.len()])
        .entries()
        .to_vec();
    for (entry, (leaf, subleaf)) in entries.iter_mut().zip(LEAVES) {
        (entry.function, entry.index) = (*leaf, *subleaf);
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0x1234_5678, u32::MAX, 0x8000_0001, 0x0f0f_0f0f);
    }
    Cpuid::from_entries(&entries)
}

fn intel(leaf: u32, subleaf: u32) -> CpuidResult {
    host(*b"GenuineIntel", leaf, subleaf)
}

fn amd(leaf: u32, subleaf: u32) -> CpuidResult {
    host(*b"AuthenticAMD", leaf, subleaf)
}

/// A processor of that vendor, the same on every machine.
fn host(vendor: [u8; 12], leaf: u32, subleaf: u32) -> CpuidResult {
    match (leaf, vendor.as_chunks::<4>().0) {
        (0, [ebx, edx, ecx]) => CpuidResult {
            eax: 0x20,
            ebx: u32::from_le_bytes(*ebx),
            ecx: u32::from_le_bytes(*ecx),
            edx: u32::from_le_bytes(*edx),
        },
        _ => CpuidResult {
            eax: leaf ^ 0x0102_0304,
            ebx: !leaf,
            ecx: subleaf ^ 0x5555_5555,
            edx: leaf.rotate_left(subleaf),
        },
    }
}
