//! The tables as a guest finds them in memory, and as iasl reads them.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use std::path::Path;
use std::process::Command;

use super::*;
use crate::arch::x86_64::layout::{VCPUS_MAX, VirtioWindow};
use crate::memory::{Backing, PageSize, allocate};

fn tables(vcpus: u8, virtio: &[VirtioWindow]) -> Vec<(String, Vec<u8>)> {
    let memory = allocate(1, Backing::Anonymous, PageSize::Base).unwrap();
    write(&memory, &Platform { vcpus, virtio }).unwrap();
    let read = |at: u64, bytes: usize| {
        let mut table = vec![0u8; bytes];
        memory.read_slice(&mut table, GuestAddress(at)).unwrap();
        table
    };
    let table = |at: u64| {
        let length = u32::from_le_bytes(read(at + 4, 4).try_into().unwrap());
        let bytes = read(at, usize::try_from(length).unwrap());
        (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
    };
    let pointer = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let rsdp = read(layout::RSDP.0, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let xsdt = table(pointer(&rsdp[24..32]));
    let mut tables: Vec<_> = xsdt.1[36..].chunks(8).map(|at| table(pointer(at))).collect();
    let fadt = tables.iter().find(|(name, _)| name == "FACP").unwrap();
    let dsdt = table(pointer(&fadt.1[140..148]));
    tables.push(dsdt);
    tables.push(xsdt);
    tables
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn all_windows() -> Vec<VirtioWindow> {
    VirtioWindow::all().collect()
}

#[test]
fn every_table_can_be_reached_and_adds_up() {
    let tables = tables(VCPUS_MAX, &all_windows());
    let names: Vec<_> = tables.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["FACP", "APIC", "DSDT", "XSDT"]);
    for (name, bytes) in tables {
        assert_eq!(sum(&bytes), 0, "{name}");
    }
}

#[test]
fn the_madt_lists_every_processor() {
    for vcpus in [1, 2, VCPUS_MAX] {
        let tables = tables(vcpus, &[]);
        let madt = &tables.iter().find(|(name, _)| name == "APIC").unwrap().1;
        assert_eq!(madt.len(), 44 + 12 + 8 * usize::from(vcpus));
    }
}

fn iasl(arguments: &[&str], directory: &Path) -> String {
    let output = Command::new("iasl")
        .args(arguments)
        .current_dir(directory)
        .output();
    let output = output.expect("iasl runs: install the package acpica-tools");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "iasl {arguments:?}: {text}");
    text
}

#[test]
fn iasl_disassembles_and_recompiles_every_table_without_a_warning() {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in tables(2, &all_windows()) {
        let file = format!("{name}.dat");
        std::fs::write(directory.path().join(&file), bytes).unwrap();
        let text = iasl(&["-d", &file], directory.path());
        assert!(
            !text.contains("Warning") && !text.contains("Error"),
            "{name}: {text}"
        );
        let source = std::fs::read_to_string(directory.path().join(format!("{name}.dsl"))).unwrap();
        assert!(
            !source.contains("Invalid") && !source.contains("Incorrect checksum"),
            "{source}"
        );
        let text = iasl(&["-p", "again", &format!("{name}.dsl")], directory.path());
        assert!(
            text.contains("0 Errors, 0 Warnings") || !text.contains("Warning"),
            "{name}: {text}"
        );
    }
}

#[test]
fn the_dsdt_shows_each_device_where_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let tables = tables(1, &[VirtioWindow::of_device(0).unwrap()]);
    let dsdt = &tables.iter().find(|(name, _)| name == "DSDT").unwrap().1;
    std::fs::write(directory.path().join("dsdt.dat"), dsdt).unwrap();
    iasl(&["-d", "dsdt.dat"], directory.path());
    let source = std::fs::read_to_string(directory.path().join("dsdt.dsl")).unwrap();
    let expected = [
        "LNRO0005",
        "0xC0001000",
        "0x00000005",
        "0xC0012000",
        "0x00000016",
        "PNP0501",
        "PNP0303",
        "0x03F8",
        "VM_Gen_Counter",
        "0x000DF000",
        "ACPI0013",
        "_EVT",
        "0x00000017",
        "Notify (\\_SB.VGEN, 0x80)",
        "VMCLOCK",
        "0x000DE000",
        "Notify (\\_SB.VCLK, 0x80)",
        "ACPI0004",
        "If ((OCCU & 0x02))",
        "Notify (\\_SB.HP01, One)",
        "Notify (\\_SB.HP17, One)",
        "OperationRegion (HPRG, SystemIO, 0x0610, 0x08)",
        "_S5",
    ];
    for word in expected {
        assert!(source.contains(word), "{word} in {source}");
    }
    assert!(
        !source.contains("HP00"),
        "a device that is there has no vacancy: {source}"
    );
}
