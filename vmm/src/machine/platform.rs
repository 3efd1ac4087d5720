//! The devices that every machine has, on the I/O ports: serial port, keyboard controller, power.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use coracle_devices::bus::{Bus, BusDevice, BusError, BusRange};
use coracle_devices::hotplug::{HOTPLUG_PORT, HOTPLUG_PORTS, Hotplug, HotplugRegisters};
use coracle_devices::i8042::{I8042, I8042_IRQ, I8042_PORT, I8042_PORTS};
use coracle_devices::power::{EndSignal, POWER_PORT, POWER_PORTS, Power};
use coracle_devices::serial::{Output, SERIAL_IRQ, SERIAL_PORT, SERIAL_PORTS, SerialConfig, SerialPort};
use coracle_devices::vmclock::{Disruption, VMCLOCK_BYTES, VmClockError};
use coracle_devices::vmgenid::{self, GENERATION_ID_BYTES, GenerationError, GenerationId};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::layout;
use crate::kvm::KvmError;
use crate::kvm::vm::Vm;

/// Why a fixed device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// The file for serial output cannot be opened.
    #[error("cannot open `{}` for the guest's serial output: check the path and its permissions", path.display())]
    SerialOutput {
        /// As configured.
        path: PathBuf,
        /// What the host answered.
        #[source]
        source: io::Error,
    },
    /// The host gave no descriptor.
    #[error("cannot make the {device}")]
    Device {
        /// Which.
        device: &'static str,
        /// What the host answered.
        #[source]
        source: io::Error,
    },
    /// KVM does not take an interrupt line.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Two devices want the same port.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The VM generation ID cannot be written.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// Nor the VMClock.
    #[error(transparent)]
    Clock(#[from] VmClockError),
}

/// The fixed devices, on their bus.
pub(super) struct Platform {
    pub(super) ports: Bus,
    pub(super) serial: Arc<Mutex<SerialPort>>,
    pub(super) keyboard: Arc<Mutex<I8042>>,
    pub(super) generation: GenerationId,
}

impl Platform {
    /// Makes the devices, and connects their interrupts.
    pub(super) fn new(
        vm: &Vm,
        serial: &SerialConfig,
        end: &Arc<EndSignal>,
        hotplug: &Arc<Hotplug>,
    ) -> Result<Self, PlatformError> {
        let serial = SerialPort::new(output(serial)?).map_err(device_failed("serial port"))?;
        vm.connect_interrupt(serial.line(), SERIAL_IRQ)?;
        let keyboard = I8042::new(Arc::clone(end)).map_err(device_failed("keyboard controller"))?;
        vm.connect_interrupt(keyboard.line(), I8042_IRQ)?;
        let generation = GenerationId::new(layout::VMGENID)?;
        vm.connect_interrupt(generation.line(), layout::EVENT_IRQ)?;
        vm.connect_interrupt(hotplug.line(), layout::EVENT_IRQ)?;

        let (serial, keyboard) = (Arc::new(Mutex::new(serial)), Arc::new(Mutex::new(keyboard)));
        let power: Arc<Mutex<dyn BusDevice>> = Arc::new(Mutex::new(Power::new(Arc::clone(end))));
        let mut ports = Bus::new();
        ports.insert(range(SERIAL_PORT, SERIAL_PORTS), "serial port", serial.clone())?;
        ports.insert(
            range(I8042_PORT, I8042_PORTS),
            "keyboard controller",
            keyboard.clone(),
        )?;
        ports.insert(range(POWER_PORT, POWER_PORTS), "power device", power)?;
        let places: Arc<Mutex<dyn BusDevice>> = Arc::new(Mutex::new(HotplugRegisters(Arc::clone(hotplug))));
        ports.insert(range(HOTPLUG_PORT, HOTPLUG_PORTS), "places of devices", places)?;
        Ok(Self {
            ports,
            serial,
            keyboard,
            generation,
        })
    }
}

/// Gives the guest a fresh generation ID.
///
/// # Errors
///
/// When the host has no random bytes, or the guest no memory there.
pub(super) fn renew_generation(memory: &GuestMemoryMmap) -> Result<(), PlatformError> {
    Ok(vmgenid::renew(layout::VMGENID, memory)?)
}

/// The memory that the host itself writes when a guest goes on from a snapshot: where, and how many bytes.
pub const GENERATION_MEMORY: [(GuestAddress, u64); 2] = [
    (layout::VMGENID, GENERATION_ID_BYTES as u64),
    (layout::VMCLOCK.0, VMCLOCK_BYTES as u64),
];

/// Lets a guest that goes on from a snapshot know that there may be others like it. Its [`GENERATION_MEMORY`] is there.
///
/// # Errors
///
/// When the host has no random bytes, or the guest no memory there.
pub fn tell_restored(memory: &GuestMemoryMmap) -> Result<(), PlatformError> {
    layout::VMCLOCK.disrupt(memory, Disruption::Restored)?;
    renew_generation(memory)
}

fn output(config: &SerialConfig) -> Result<Output, PlatformError> {
    let output = match &config.serial_out_path {
        Some(path) => Output::to_path(path).map_err(|source| PlatformError::SerialOutput {
            path: path.clone(),
            source,
        })?,
        None => Output::to_descriptor(rustix::stdio::stdout()).map_err(device_failed("console"))?,
    };
    Ok(match config.rate_limiter {
        Some(bucket) => output.limited(bucket),
        None => output,
    })
}

fn device_failed(device: &'static str) -> impl FnOnce(io::Error) -> PlatformError {
    move |source| PlatformError::Device { device, source }
}

fn range(first: u16, count: u16) -> BusRange {
    BusRange {
        start: u64::from(first),
        len: u64::from(count),
    }
}
