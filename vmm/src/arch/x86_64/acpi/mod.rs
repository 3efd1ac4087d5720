//! ACPI 6.5 tables of a hardware-reduced machine: RSDP → XSDT → FADT (→ DSDT), MADT.
//!
//! Hardware-reduced means: no PM timer, no SCI, no legacy power registers; sleep and reset are
//! registers of the power device, and events come from the generic event device in the DSDT.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use coracle_devices::power;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;
use super::tables::Platform;

const OEM_ID: [u8; 6] = *b"CORACL";
const OEM_REVISION: u32 = 1;

/// IA-PC boot flags (ACPI 6.5, 5.2.9.3): there is a keyboard controller, but no VGA, no PCI and no
/// CMOS clock, so that a guest need not look for them.
const HAS_8042: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
const NO_MSI: u16 = 1 << 3;
const NO_ASPM: u16 = 1 << 4;
const NO_CMOS_RTC: u16 = 1 << 5;

/// Writes all tables; the RSDP lies where kernels search and where the boot protocols point.
pub(super) fn write(memory: &GuestMemoryMmap, platform: &Platform<'_>) -> Result<(), GuestMemoryError> {
    let mut writer = Writer {
        memory,
        next: layout::ACPI_TABLES,
    };
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, *b"MACHINE_", OEM_REVISION);
    dsdt.append_slice(&dsdt::definition_block(platform));
    let dsdt = writer.put(dsdt.as_slice())?;
    let fadt = writer.put_aml(&fadt(dsdt).finalize())?;
    let madt = writer.put_aml(&madt(platform.vcpus))?;
    let mut xsdt = XSDT::new(OEM_ID, *b"MACHINE_", OEM_REVISION);
    xsdt.add_entry(fadt.0);
    xsdt.add_entry(madt.0);
    let xsdt = writer.put_aml(&xsdt)?;
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt.0).to_aml_bytes(&mut rsdp);
    memory.write_slice(&rsdp, layout::RSDP)
}

/// Puts one table after the other.
struct Writer<'a> {
    memory: &'a GuestMemoryMmap,
    next: GuestAddress,
}

impl Writer<'_> {
    fn put_aml(&mut self, table: &dyn Aml) -> Result<GuestAddress, GuestMemoryError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.put(&bytes)
    }

    fn put(&mut self, table: &[u8]) -> Result<GuestAddress, GuestMemoryError> {
        let at = self.next;
        let end = (at.0 + table.len() as u64).next_multiple_of(16);
        // The most devices and processors fill a twentieth of this room.
        assert!(end <= layout::HIGH_LOAD_START.0, "ACPI tables end below 1 MiB");
        self.memory.write_slice(table, at)?;
        self.next = GuestAddress(end);
        Ok(at)
    }
}

fn fadt(dsdt: GuestAddress) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM_ID, *b"MACHINE_", OEM_REVISION)
        .dsdt_64(dsdt.0)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // No fixed buttons: "control method" buttons, of which there are none.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (HAS_8042 | NO_VGA | NO_MSI | NO_ASPM | NO_CMOS_RTC).into();
    fadt.reset_reg = port(power::RESET_PORT);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"CORACLE\0").into();
    fadt
}

fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// Interrupt lines reach the IOAPIC under their own numbers (KVM's default routing), so there are
/// no source overrides.
fn madt(vcpus: u8) -> MADT {
    let controller = LocalInterruptController::Address(layout::LAPIC);
    let mut madt = MADT::new(OEM_ID, *b"MACHINE_", OEM_REVISION, controller);
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    for index in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt
}

#[cfg(test)]
mod tests;
