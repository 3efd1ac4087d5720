//! The MP table (Intel MultiProcessor Specification 1.4), for kernels that don't read ACPI.

use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};

use super::layout;

const SPEC_1_4: u8 = 4;
/// The integrated APIC's version, as KVM reports it.
const APIC_VERSION: u8 = 0x14;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// Family 6 and the two features that an MP table must claim: FPU and APIC.
const SIGNATURE: u32 = 0x600;
const FEATURES: u32 = 0x201;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const KIND_INT: u8 = 0;
const KIND_NMI: u8 = 1;
const KIND_EXTINT: u8 = 3;
const ALL_LAPICS: u8 = 0xff;
const ISA_BUS: u8 = 0;

const FLOATING_POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;

/// Writes the floating pointer and, right after it, the configuration table.
pub(super) fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<(), GuestMemoryError> {
    let entries = entries(vcpus);
    let bytes: Vec<u8> = entries.iter().flatten().copied().collect();
    let mut table = header(bytes.len(), entries.len());
    table.extend_from_slice(&bytes);
    let mut whole = floating_pointer();
    whole.extend_from_slice(&checksummed(table, 7));
    // VCPUS_MAX processors take 924 bytes.
    assert!(
        whole.len() <= layout::MP_TABLE_BYTES_MAX,
        "the MP table ends with base memory"
    );
    memory.write_slice(&whole, layout::MP_TABLE)
}

fn floating_pointer() -> Vec<u8> {
    let table = layout::MP_TABLE.0 + FLOATING_POINTER_BYTES as u64;
    let mut bytes = b"_MP_".to_vec();
    bytes.extend_from_slice(&u32::try_from(table).expect("below 1 MiB").to_le_bytes());
    // Length in paragraphs, version, checksum, no default configuration, no IMCR.
    bytes.extend_from_slice(&[1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    checksummed(bytes, 10)
}

fn header(entries_bytes: usize, count: usize) -> Vec<u8> {
    let length = u16::try_from(HEADER_BYTES + entries_bytes).expect("below 1 KiB");
    let count = u16::try_from(count).expect("below 1 KiB");
    let mut bytes = b"PCMP".to_vec();
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&[SPEC_1_4, 0]);
    bytes.extend_from_slice(b"CORACLE MICROVM     ");
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&layout::LAPIC.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes
}

/// Processors, the ISA bus, the IOAPIC, its lines, the local pins; in the order of the types.
fn entries(vcpus: u8) -> Vec<Vec<u8>> {
    // An APIC ID that no processor has.
    let ioapic = vcpus;
    let mut entries = Vec::new();
    for index in 0..vcpus {
        let flags = if index == 0 {
            ENABLED | BOOT_PROCESSOR
        } else {
            ENABLED
        };
        let mut entry = vec![ENTRY_PROCESSOR, index, APIC_VERSION, flags];
        entry.extend_from_slice(&SIGNATURE.to_le_bytes());
        entry.extend_from_slice(&FEATURES.to_le_bytes());
        entry.extend_from_slice(&[0; 8]);
        entries.push(entry);
    }
    entries.push([&[ENTRY_BUS, ISA_BUS], &b"ISA   "[..]].concat());
    entries.push(
        [
            &[ENTRY_IOAPIC, ioapic, APIC_VERSION, ENABLED],
            &layout::IOAPIC.to_le_bytes()[..],
        ]
        .concat(),
    );
    // KVM routes each line to the IOAPIC's pin of the same number.
    let last = u8::try_from(layout::IRQ_LAST).expect("23");
    entries.extend((0..=last).map(|irq| vec![ENTRY_INTERRUPT, KIND_INT, 0, 0, ISA_BUS, irq, ioapic, irq]));
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, KIND_EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.push(vec![
        ENTRY_LOCAL_INTERRUPT,
        KIND_NMI,
        0,
        0,
        ISA_BUS,
        0,
        ALL_LAPICS,
        1,
    ]);
    entries
}

/// Sets the byte `at` so that all bytes add up to zero.
fn checksummed(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    *bytes.get_mut(at).expect("a constant offset within the structure") = sum.wrapping_neg();
    bytes
}

#[cfg(test)]
#[expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]
mod tests {
    use super::*;
    use crate::memory::{Backing, PageSize, allocate};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_table_is_whole_for_every_number_of_processors() {
        for vcpus in 1..=layout::VCPUS_MAX {
            let memory = allocate(1, Backing::Anonymous, PageSize::Base).unwrap();
            write(&memory, vcpus).unwrap();
            let mut bytes = [0u8; layout::MP_TABLE_BYTES_MAX];
            memory.read_slice(&mut bytes, layout::MP_TABLE).unwrap();
            let (pointer, table) = bytes.split_at(FLOATING_POINTER_BYTES);
            assert_eq!((&pointer[..4], sum(pointer)), (&b"_MP_"[..], 0));
            let length = usize::from(u16::from_le_bytes([table[4], table[5]]));
            assert_eq!((&table[..4], sum(&table[..length])), (&b"PCMP"[..], 0));
            let count = usize::from(u16::from_le_bytes([table[34], table[35]]));
            let mut kinds = [0; 5];
            let mut at = HEADER_BYTES;
            for _ in 0..count {
                kinds[usize::from(table[at])] += 1;
                at += if table[at] == ENTRY_PROCESSOR { 20 } else { 8 };
            }
            assert_eq!(at, length);
            assert_eq!(kinds, [usize::from(vcpus), 1, 1, 24, 2]);
        }
    }
}
