//! The DSDT: the devices that a guest cannot find by itself, and how to switch off.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Package, Path,
    ResourceTemplate, Scope, ZERO,
};

use coracle_devices::i8042::{I8042_IRQ, I8042_PORT, I8042_PORTS};
use coracle_devices::power::SLEEP_TYPE_OFF;
use coracle_devices::serial::{SERIAL_IRQ, SERIAL_PORT, SERIAL_PORTS};

use crate::arch::x86_64::layout::{self, VirtioWindow};
use crate::arch::x86_64::tables::Platform;

/// A device changed (ACPI 6.5, 5.6.6): for the VM generation ID, its value.
const NOTIFY_CHANGED: u8 = 0x80;

/// The table's AML, without its header.
pub(super) fn definition_block(platform: &Platform<'_>) -> Vec<u8> {
    let mut aml = Vec::new();
    for (index, window) in (0u8..).zip(platform.virtio) {
        virtio(&mut aml, index, *window);
    }
    serial(&mut aml);
    keyboard(&mut aml);
    vm_generation_id(&mut aml);
    event_device(&mut aml);
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_OFF])).to_aml_bytes(&mut aml);
    aml
}

/// An edge on `irq`, which no other device uses.
fn edge(irq: u32) -> Interrupt {
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge_triggered, active_low, shared, irq)
}

/// `LNRO0005` is the ID that Linux's virtio-mmio driver binds to.
fn virtio(aml: &mut Vec<u8>, index: u8, window: VirtioWindow) {
    let address = u32::try_from(window.address).expect("windows lie below 4 GiB");
    let memory = Memory32Fixed::new(true, address, layout::VIRTIO_MMIO_BYTES);
    let resources = current_resources(vec![&memory, &edge(window.irq)]);
    let path = format!("VR{index:02}");
    in_system_bus(
        aml,
        &Device::new(
            path.as_str().into(),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &index),
                // Memory accesses are coherent.
                &Name::new("_CCA".into(), &ONE),
                &resources,
            ],
        ),
    );
}

fn serial(aml: &mut Vec<u8>) {
    let ports = u8::try_from(SERIAL_PORTS).expect("8");
    let io = IO::new(SERIAL_PORT, SERIAL_PORT, 1, ports);
    let resources = current_resources(vec![&io, &edge(SERIAL_IRQ)]);
    in_system_bus(
        aml,
        &Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &resources,
            ],
        ),
    );
}

/// The controller's data and command ports, the first and the last of its range.
fn keyboard(aml: &mut Vec<u8>) {
    let port = |at: u16| IO::new(at, at, 1, 1);
    let (data, command) = (port(I8042_PORT), port(I8042_PORT + I8042_PORTS - 1));
    let resources = current_resources(vec![&data, &command, &edge(I8042_IRQ)]);
    let id = EISAName::new("PNP0303");
    in_system_bus(
        aml,
        &Device::new("PS2_".into(), vec![&Name::new("_HID".into(), &id), &resources]),
    );
}

/// Microsoft's "Virtual Machine Generation ID": `ADDR` gives the two halves of its address.
fn vm_generation_id(aml: &mut Vec<u8>) {
    let address = u32::try_from(layout::VMGENID.0).expect("below 1 MiB");
    in_system_bus(
        aml,
        &Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"CRCL0001"),
                &Name::new("_CID".into(), &"VM_Gen_Counter"),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &Name::new("ADDR".into(), &Package::new(vec![&address, &ZERO])),
            ],
        ),
    );
}

/// The generic event device (ACPI 6.5, 5.6.9), which turns interrupts into notifications.
///
/// It tells of a changed generation: a restored guest goes on with its tables as they were, and must hear that its
/// identifier is another.
fn event_device(aml: &mut Vec<u8>) {
    let resources = current_resources(vec![&edge(layout::VMGENID_IRQ)]);
    let generation = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&generation, &NOTIFY_CHANGED);
    let is_generation = Equal::new(&Arg(0), &layout::VMGENID_IRQ);
    in_system_bus(
        aml,
        &Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ZERO),
                &resources,
                &Method::new(
                    "_EVT".into(),
                    1,
                    true,
                    vec![&If::new(&is_generation, vec![&notify])],
                ),
            ],
        ),
    );
}

fn in_system_bus(aml: &mut Vec<u8>, device: &dyn Aml) {
    Scope::new("\\_SB_".into(), vec![device]).to_aml_bytes(aml);
}

fn current_resources(resources: Vec<&dyn Aml>) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(resources))
}
