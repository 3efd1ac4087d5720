//! CPUID as guests of invented Intel and AMD hosts read it, and as this host's KVM takes it.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use super::*;
use crate::arch::x86_64::cpu::Smt;
use crate::arch::x86_64::template::Mask;
use crate::arch::x86_64::testing;

const ZERO: CpuidResult = CpuidResult {
    eax: 0,
    ebx: 0,
    ecx: 0,
    edx: 0,
};

fn word(text: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*text)
}

/// A processor by Intel whose name ends in its frequency.
fn intel(leaf: u32, _: u32) -> CpuidResult {
    let name = b"Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz\0\0";
    match leaf {
        0 => CpuidResult {
            eax: 0x16,
            ebx: word(b"Genu"),
            ecx: word(b"ntel"),
            edx: word(b"ineI"),
        },
        0x8000_0002..=0x8000_0004 => {
            let at = usize::try_from(leaf - 0x8000_0002).unwrap() * 16;
            let part = |n: usize| word(name[at + n * 4..at + n * 4 + 4].try_into().unwrap());
            CpuidResult {
                eax: part(0),
                ebx: part(1),
                ecx: part(2),
                edx: part(3),
            }
        }
        0x8000_0006 => CpuidResult {
            eax: 1,
            ebx: 2,
            ecx: 3,
            edx: 0x3_0004,
        },
        _ => ZERO,
    }
}

/// A processor by AMD with three caches, shared as on the host.
fn amd(leaf: u32, subleaf: u32) -> CpuidResult {
    match (leaf, subleaf) {
        (0, _) => CpuidResult {
            eax: 0x10,
            ebx: word(b"Auth"),
            ecx: word(b"cAMD"),
            edx: word(b"enti"),
        },
        (0x8000_0000, _) => CpuidResult {
            eax: 0x8000_0021,
            ..ZERO
        },
        (0x8000_001d, 0) => CpuidResult {
            eax: 0x1 | 1 << 5 | 1 << 14,
            ..ZERO
        },
        (0x8000_001d, 1) => CpuidResult {
            eax: 0x3 | 2 << 5 | 1 << 14,
            ..ZERO
        },
        (0x8000_001d, 2) => CpuidResult {
            eax: 0x3 | 3 << 5 | 15 << 14,
            ..ZERO
        },
        (0x8000_001e, _) => CpuidResult {
            eax: 77,
            ebx: 0x177,
            ecx: 0x707,
            edx: 0,
        },
        _ => ZERO,
    }
}

/// What KVM might offer: leaf, subleaf if it counts, then `eax` to `edx`.
type Offer = (u32, Option<u32>, [u32; 4]);

#[rustfmt::skip]
const OFFERED: [Offer; 19] = [
    (0, None, [0x1f, 1, 2, 3]),
    (1, None, [0, 0, 1 << 15, 1 << 28]),
    (4, Some(0), [1 | 1 << 5 | 63 << 26, 0, 0, 0]),
    (4, Some(1), [3 | 3 << 5 | 127 << 14, 0, 0, 0]),
    (4, Some(2), [0; 4]),
    (6, None, [0b111, 0, 0b1001, 0]),
    (7, Some(0), [0, 0, 1 << 5, 1 << 29]),
    (7, Some(1), [0; 4]),
    (0xa, None, [2, 3, 4, 5]),
    (0xb, Some(0), [0; 4]),
    (0xd, Some(0), [0; 4]),
    (0xd, Some(1), [0; 4]),
    (0x1f, Some(0), [0; 4]),
    (0x8000_0001, None, [0; 4]),
    (0x8000_0002, None, [0; 4]),
    (0x8000_0003, None, [0; 4]),
    (0x8000_0004, None, [0; 4]),
    (0x8000_0006, None, [0; 4]),
    (0x8000_0008, None, [0x3030, 4, 0, 0]),
];

fn offered() -> Cpuid {
    let entry = |(leaf, subleaf, [eax, ebx, ecx, edx]): Offer| {
        let result = CpuidResult { eax, ebx, ecx, edx };
        subleaf.map_or(plain_entry(leaf, result), |subleaf| {
            subleaf_entry(leaf, subleaf, result)
        })
    };
    Cpuid::from_entries(&OFFERED.map(entry))
}

fn normalized(index: u8, vcpus: u8, smt: Smt, host: Host<'_>) -> Cpuid {
    offered().for_vcpu(
        index,
        Topology::new(vcpus, smt).unwrap(),
        &CpuTemplate::default(),
        host,
    )
}

fn answer(cpuid: &Cpuid, leaf: u32, subleaf: u32) -> kvm_cpuid_entry2 {
    *cpuid
        .entries()
        .iter()
        .find(|entry| (entry.function, entry.index) == (leaf, subleaf))
        .unwrap()
}

#[test]
fn leaf_1_identifies_the_processor() {
    let leaf = answer(&normalized(5, 6, Smt::Off, &intel), 1, 0);
    assert_eq!(leaf.ebx, 5 << 24 | 8 << 16 | 8 << 8);
    assert_eq!(leaf.ecx, 1 << 31 | 1 << 24);
    assert_eq!(leaf.edx, 1 << 28);
    let alone = answer(&normalized(0, 1, Smt::On, &intel), 1, 0);
    assert_eq!((alone.ebx, alone.edx), (1 << 16 | 8 << 8, 0));
}

#[test]
fn the_vendor_is_the_hosts() {
    let leaf = answer(&normalized(0, 1, Smt::Off, &amd), 0, 0);
    assert_eq!(
        (leaf.eax, leaf.ebx, leaf.edx),
        (0x1f, word(b"Auth"), word(b"enti"))
    );
}

#[test]
fn extended_topology_tells_threads_from_cores() {
    let cpuid = normalized(3, 4, Smt::On, &intel);
    let threads = answer(&cpuid, 0xb, 0);
    assert_eq!(
        (threads.eax, threads.ebx, threads.ecx, threads.edx),
        (1, 2, 0x100, 3)
    );
    let cores = answer(&cpuid, 0xb, 1);
    assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (5, 4, 0x201, 3));
    let newer = answer(&cpuid, 0x1f, 1);
    assert_eq!((newer.eax, newer.ebx, newer.ecx, newer.edx), (5, 4, 0x201, 3));
    let off = answer(&normalized(3, 4, Smt::Off, &intel), 0xb, 0);
    assert_eq!((off.eax, off.ebx), (0, 1));
}

#[test]
fn intels_leaves_fit_the_machine() {
    let cpuid = normalized(0, 8, Smt::On, &intel);
    assert_eq!(answer(&cpuid, 4, 0).eax, 1 | 1 << 5 | 1 << 14 | 3 << 26);
    assert_eq!(answer(&cpuid, 4, 1).eax, 3 | 3 << 5 | 7 << 14 | 3 << 26);
    assert_eq!(answer(&cpuid, 4, 2).eax, 0);
    let power = answer(&cpuid, 6, 0);
    assert_eq!((power.eax, power.ecx), (0b101, 0b0001));
    let features = answer(&cpuid, 7, 0);
    assert_eq!(
        (features.ebx, features.ecx, features.edx),
        (1 << 13 | 1 << 6, 0, 1 << 29)
    );
    let counters = answer(&cpuid, 0xa, 0);
    assert_eq!(
        (counters.eax, counters.ebx, counters.ecx, counters.edx),
        (0, 0, 0, 0)
    );
    assert_eq!(answer(&cpuid, 0x8000_0006, 0).edx, 4);
}

#[test]
fn amds_leaves_fit_the_machine() {
    let cpuid = normalized(3, 4, Smt::On, &amd);
    assert_eq!(answer(&cpuid, 7, 0).edx, 0);
    assert_eq!(answer(&cpuid, 0x8000_0001, 0).ecx, 1 << 22);
    let size = answer(&cpuid, 0x8000_0008, 0);
    assert_eq!((size.eax, size.ebx, size.ecx), (0x3030, 4, 0x7003));
    let sharing: Vec<_> = (0..3)
        .map(|cache| bits(answer(&cpuid, 0x8000_001d, cache).eax, (25, 14)))
        .collect();
    assert_eq!(sharing, [1, 1, 3]);
    let topology = answer(&cpuid, 0x8000_001e, 0);
    assert_eq!((topology.eax, topology.ebx, topology.ecx), (3, 0x101, 0));
}

#[test]
fn the_name_gives_the_family_and_intels_frequency() {
    let name = |host: Host<'_>| {
        let cpuid = normalized(0, 1, Smt::Off, host);
        let leaves = (0x8000_0002..=0x8000_0004).map(|leaf| answer(&cpuid, leaf, 0));
        let bytes: Vec<u8> = leaves
            .flat_map(|l| [l.eax, l.ebx, l.ecx, l.edx])
            .flat_map(u32::to_le_bytes)
            .collect();
        String::from_utf8(bytes)
            .unwrap()
            .trim_end_matches('\0')
            .to_owned()
    };
    assert_eq!(name(&intel), "Intel(R) Xeon(R) Processor @ 3.00GHz");
    assert_eq!(name(&amd), "AMD EPYC");
    let nameless = |leaf, subleaf| {
        if leaf == 0 {
            intel(0, 0)
        } else {
            amd(leaf, subleaf)
        }
    };
    assert_eq!(name(&nameless), "Intel(R) Xeon(R) Processor");
}

#[test]
fn a_template_changes_bits_and_drops_leaves() {
    let mut cpuid = offered();
    let mask = Mask {
        filter: u32::MAX,
        value: 6,
    };
    let level = CpuidModifier {
        leaf: 0,
        subleaf: 0,
        flags: 0,
        registers: vec![(CpuidRegister::Eax, mask)],
    };
    cpuid.modify(&[level]).unwrap();
    let template = CpuTemplate {
        cpuid_drop: vec![7, 0xd],
        ..CpuTemplate::default()
    };
    let topology = Topology::new(1, Smt::Off).unwrap();
    let cpuid = cpuid.for_vcpu(0, topology, &template, &amd);
    assert_eq!(answer(&cpuid, 0, 0).eax, 6);
    assert!(
        cpuid
            .entries()
            .iter()
            .all(|entry| entry.function != 7 && entry.function != 0xd)
    );
}

#[test]
fn a_template_for_a_leaf_that_is_not_there_is_refused() {
    let modifier = CpuidModifier {
        leaf: 0x42,
        subleaf: 1,
        flags: 1,
        registers: vec![],
    };
    let text = offered().modify(&[modifier]).unwrap_err().to_string();
    assert!(text.contains("leaf 0x42, subleaf 0x1"), "{text}");
}

#[test]
fn kvm_takes_what_it_supports_on_every_vcpu() {
    let Some(vm) = testing::vm("kvm_takes_what_it_supports_on_every_vcpu", 2) else {
        return;
    };
    let supported = Cpuid::supported(&vm.kvm).unwrap();
    let topology = Topology::new(2, Smt::On).unwrap();
    for (index, vcpu) in (0..).zip(&vm.vcpus) {
        supported
            .for_vcpu(index, topology, &CpuTemplate::default(), &this_host)
            .set(vcpu)
            .unwrap();
        let set = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
        let leaf = set.as_slice().iter().find(|entry| entry.function == 1).unwrap();
        assert_eq!(leaf.ebx >> 24, u32::from(index));
    }
}
