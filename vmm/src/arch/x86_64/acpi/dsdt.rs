//! The DSDT: the devices that a guest cannot find by itself, and how to switch off.

use acpi_tables::aml::{
    And, Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, ONE, OpRegion, OpRegionSpace, Package,
    Path, ResourceTemplate, Return, Scope, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use coracle_devices::hotplug::{HOTPLUG_PORT, HOTPLUG_PORTS};
use coracle_devices::i8042::{I8042_IRQ, I8042_PORT, I8042_PORTS};
use coracle_devices::power::SLEEP_TYPE_OFF;
use coracle_devices::serial::{SERIAL_IRQ, SERIAL_PORT, SERIAL_PORTS};
use coracle_devices::vmclock::VMCLOCK_BYTES;

use crate::arch::x86_64::layout::{self, VirtioWindow};
use crate::arch::x86_64::tables::Platform;

/// A device changed (ACPI 6.5, 5.6.6): for the VM generation ID, its value; for the VMClock, its page.
const NOTIFY_CHANGED: u8 = 0x80;
/// A device has come, or has gone (the same, table 5.163: "Device Check").
const NOTIFY_DEVICE_CHECK: u8 = 1;
/// Present, enabled, shown and working (6.3.7).
const STATUS_THERE: u8 = 0xf;
/// The name of [`coracle_devices::hotplug`]'s first register.
const OCCUPIED: &str = "OCCU";
/// The name of its second.
const CHANGED: &str = "CHNG";

/// The table's AML, without its header.
pub(super) fn definition_block(platform: &Platform<'_>) -> Vec<u8> {
    let mut aml = Vec::new();
    let windows: Vec<_> = (0u8..).zip(VirtioWindow::all()).collect();
    let (occupied, vacant) = windows.split_at(platform.virtio.len());
    for (index, window) in occupied {
        in_system_bus(&mut aml, &Virtio(*index, *window));
    }
    hotplug_registers(&mut aml);
    for (index, window) in vacant {
        vacancy(&mut aml, *index, *window);
    }
    serial(&mut aml);
    keyboard(&mut aml);
    vm_generation_id(&mut aml);
    vm_clock(&mut aml);
    event_device(&mut aml, vacant.iter().map(|(index, _)| *index));
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_OFF])).to_aml_bytes(&mut aml);
    aml
}

/// An edge on `irq`, which no other device uses.
fn edge(irq: u32) -> Interrupt {
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge_triggered, active_low, shared, irq)
}

/// A virtio-mmio device: `LNRO0005` is the ID that Linux's driver binds to.
struct Virtio(u8, VirtioWindow);

impl Aml for Virtio {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self(index, window) = self;
        let address = u32::try_from(window.address).expect("windows lie below 4 GiB");
        let memory = Memory32Fixed::new(true, address, layout::VIRTIO_MMIO_BYTES);
        let resources = current_resources(vec![&memory, &edge(window.irq)]);
        let path = format!("VR{index:02}");
        Device::new(
            path.as_str().into(),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), index),
                // Memory accesses are coherent.
                &Name::new("_CCA".into(), &ONE),
                &resources,
            ],
        )
        .to_aml_bytes(sink);
    }
}

fn hotplug_registers(aml: &mut Vec<u8>) {
    let region = OpRegion::new(
        "HPRG".into(),
        OpRegionSpace::SystemIO,
        &HOTPLUG_PORT,
        &HOTPLUG_PORTS,
    );
    in_system_bus(aml, &region);
    let name = |name: &str| name.as_bytes().try_into().expect("names have four letters");
    let registers = [OCCUPIED, CHANGED].map(|register| FieldEntry::Named(name(register), 32));
    let fields = Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        registers.into(),
    );
    in_system_bus(aml, &fields);
}

/// A place to which a device may come while the guest runs. Kernels look again at containers (`ACPI0004`) when they are told to,
/// and at plain devices they do not, so it is in one; which is absent as long as the device is.
fn vacancy(aml: &mut Vec<u8>, index: u8, window: VirtioWindow) {
    let occupied = Path::new(OCCUPIED);
    let bit = bit(index);
    let is_there = And::new(&ZERO, &occupied, &bit);
    let (there, absent) = (Return::new(&STATUS_THERE), Return::new(&ZERO));
    let if_there = If::new(&is_there, vec![&there]);
    let status = Method::new("_STA".into(), 0, false, vec![&if_there, &absent]);
    in_system_bus(
        aml,
        &Device::new(
            vacancy_name(index).as_str().into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0004"),
                &Name::new("_UID".into(), &index),
                &status,
                &Virtio(index, window),
            ],
        ),
    );
}

fn vacancy_name(index: u8) -> String {
    format!("HP{index:02}")
}

fn bit(index: u8) -> u32 {
    1 << index
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

/// The VMClock, by the IDs of its specification: its page is its one resource.
fn vm_clock(aml: &mut Vec<u8>) {
    let address = u32::try_from(layout::VMCLOCK.0.0).expect("below 1 MiB");
    let page = Memory32Fixed::new(true, address, VMCLOCK_BYTES);
    let resources = current_resources(vec![&page]);
    in_system_bus(
        aml,
        &Device::new(
            "VCLK".into(),
            vec![
                &Name::new("_HID".into(), &"AMZNC10C"),
                &Name::new("_CID".into(), &"VMCLOCK"),
                &Name::new("_DDN".into(), &"VMCLOCK"),
                &resources,
            ],
        ),
    );
}

/// The generic event device (ACPI 6.5, 5.6.9), which turns interrupts into notifications.
///
/// It tells of a changed generation and of a disrupted clock: a restored guest goes on with its tables as they were, and must
/// hear that its identifier is another. And it tells of devices that have come to `vacancies`.
fn event_device(aml: &mut Vec<u8>, vacancies: impl Iterator<Item = u8>) {
    let resources = current_resources(vec![&edge(layout::EVENT_IRQ)]);
    let generation = Path::new("\\_SB_.VGEN");
    let (changed, local) = (Path::new(CHANGED), Local(0));
    let checks: Vec<Check> = vacancies.map(Check).collect();
    let (heard, known) = (Store::new(&local, &changed), Store::new(&changed, &local));
    // One may have come and the generation have changed: whoever looks at an identifier that has not loses nothing.
    let notify = Notify::new(&generation, &NOTIFY_CHANGED);
    let clock = Path::new("\\_SB_.VCLK");
    let disrupted = Notify::new(&clock, &NOTIFY_CHANGED);
    let mut parts: Vec<&dyn Aml> = vec![&heard, &known];
    parts.extend(checks.iter().map(|check| -> &dyn Aml { check }));
    parts.push(&notify);
    parts.push(&disrupted);
    let is_ours = Equal::new(&Arg(0), &layout::EVENT_IRQ);
    in_system_bus(
        aml,
        &Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ZERO),
                &resources,
                &Method::new("_EVT".into(), 1, true, vec![&If::new(&is_ours, parts)]),
            ],
        ),
    );
}

/// Has the guest look at one vacancy, if its bit is among those that were read.
struct Check(u8);

impl Aml for Check {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let path = Path::new(&format!("\\_SB_.{}", vacancy_name(self.0)));
        let (local, bit) = (Local(0), bit(self.0));
        let has_changed = And::new(&ZERO, &local, &bit);
        let notify = Notify::new(&path, &NOTIFY_DEVICE_CHECK);
        If::new(&has_changed, vec![&notify]).to_aml_bytes(sink);
    }
}

fn in_system_bus(aml: &mut Vec<u8>, device: &dyn Aml) {
    Scope::new("\\_SB_".into(), vec![device]).to_aml_bytes(aml);
}

fn current_resources(resources: Vec<&dyn Aml>) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(resources))
}
