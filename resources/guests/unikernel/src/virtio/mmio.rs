//! The registers of a virtio device (virtio 1.2, section 4.2).

#![expect(
    unsafe_code,
    reason = "takes the addresses on the command line for device registers"
)]

use instrument::cmdline::{CommandLine, DeviceWindow};
use instrument::width::low32;

use super::{Error, feature};
use crate::cpu::{self, Registers};

/// A device's registers and its interrupt.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    registers: Registers,
    /// How many bytes of registers there are; at least 512.
    pub window_bytes: u64,
    /// Input of the IOAPIC.
    pub irq: u32,
}

/// The kinds of devices that the guest drives: their virtio device identifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A network interface.
    Network = 1,
    /// A block device.
    Block = 2,
    /// An entropy source.
    Entropy = 4,
    /// A balloon.
    Balloon = 5,
    /// A socket device.
    Vsock = 19,
    /// Memory that comes and goes.
    Memory = 24,
    /// Persistent memory.
    Pmem = 27,
}

/// Where the three parts of a queue lie.
#[derive(Clone, Copy, Debug)]
pub struct QueueAddresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
}

/// Offsets of registers.
pub mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESCRIPTORS: u64 = 0x080;
    pub const QUEUE_AVAIL: u64 = 0x090;
    pub const QUEUE_USED: u64 = 0x0a0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the status register (section 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
}

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// What the registers and any configuration space need.
const WINDOW_BYTES_MIN: u64 = 512;
/// How often the status is read until a reset must have shown.
const RESET_POLLS_MAX: u32 = 10_000;

impl Transport {
    /// Finds the device number `index` of its kind among those on the command line.
    pub fn find(line: CommandLine<'static>, kind: Kind, index: u64) -> Result<Self, Error> {
        let mut index_left = index;
        for window in line.devices() {
            let transport = Self::at(window);
            if transport.read(register::MAGIC) != MAGIC
                || transport.read(register::VERSION) != VERSION
                || transport.read(register::DEVICE_ID) != kind as u32
            {
                continue;
            }
            if index_left == 0 {
                return Ok(transport);
            }
            index_left -= 1;
        }
        let kind = match kind {
            Kind::Network => "network",
            Kind::Block => "block",
            Kind::Entropy => "entropy",
            Kind::Balloon => "balloon",
            Kind::Vsock => "vsock",
            Kind::Memory => "memory",
            Kind::Pmem => "pmem",
        };
        Err(Error::NoDevice { kind, index })
    }

    fn at(window: DeviceWindow) -> Self {
        // SAFETY: the monitor wrote this word of the command line for the device that it put there; the last GiB below
        // 4 GiB, where such windows are, is mapped and holds no RAM that the guest uses.
        let registers = unsafe { Registers::new(window.base) };
        Self {
            registers,
            window_bytes: window.bytes.max(WINDOW_BYTES_MIN),
            irq: window.irq,
        }
    }

    /// The bare registers, for those who mean to misuse them.
    pub const fn registers(&self) -> Registers {
        self.registers
    }

    /// Resets the device: afterwards it touches no memory until its queues are set up again.
    pub fn reset(&self) -> Result<(), Error> {
        self.write(register::STATUS, 0);
        for _ in 0..RESET_POLLS_MAX {
            if self.read(register::STATUS) == 0 {
                return Ok(());
            }
            cpu::relax();
        }
        Err(Error::ResetRefused {
            status: self.read(register::STATUS),
        })
    }

    /// Resets the device and agrees on those of `wanted` that it offers, and on virtio 1; returns what was agreed.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, Error> {
        self.reset()?;
        self.write(register::STATUS, status::ACKNOWLEDGE);
        self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let offered = self.offered();
        let agreed = offered & (wanted | feature::VERSION_1);
        if agreed & feature::VERSION_1 == 0 {
            return Err(Error::FeaturesRefused { offered });
        }
        for (select, half) in [(0, low32(agreed)), (1, low32(agreed >> 32))] {
            self.write(register::DRIVER_FEATURES_SELECT, select);
            self.write(register::DRIVER_FEATURES, half);
        }
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(register::STATUS, ready);
        if self.read(register::STATUS) & status::FEATURES_OK == 0 {
            return Err(Error::FeaturesRefused { offered });
        }
        Ok(agreed)
    }

    /// All features that the device offers.
    pub fn offered(&self) -> u64 {
        [1u32, 0].into_iter().fold(0, |features, select| {
            self.write(register::DEVICE_FEATURES_SELECT, select);
            features << 32 | u64::from(self.read(register::DEVICE_FEATURES))
        })
    }

    /// The largest size of a queue; 0 for a queue that does not exist.
    pub fn queue_size_max(&self, index: u16) -> u32 {
        self.write(register::QUEUE_SELECT, u32::from(index));
        self.read(register::QUEUE_SIZE_MAX)
    }

    /// Gives the device the memory of a queue.
    pub fn set_queue(&self, index: u16, size: u16, addresses: &QueueAddresses) {
        self.write(register::QUEUE_SELECT, u32::from(index));
        self.write(register::QUEUE_SIZE, u32::from(size));
        for (offset, address) in [
            (register::QUEUE_DESCRIPTORS, addresses.descriptors),
            (register::QUEUE_AVAIL, addresses.avail),
            (register::QUEUE_USED, addresses.used),
        ] {
            self.write(offset, low32(address));
            self.write(offset + 4, low32(address >> 32));
        }
        self.write(register::QUEUE_READY, 1);
    }

    /// Tells the device that all is set up.
    pub fn start(&self) {
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.write(register::STATUS, all);
    }

    /// Tells the device to look at a queue.
    pub fn notify(&self, index: u16) {
        self.write(register::QUEUE_NOTIFY, u32::from(index));
    }

    /// Acknowledges what the device interrupted for.
    pub fn acknowledge_interrupt(&self) {
        let pending = self.read(register::INTERRUPT_STATUS);
        self.write(register::INTERRUPT_ACK, pending);
    }

    /// Whether the device gave up.
    pub fn needs_reset(&self) -> bool {
        self.read(register::STATUS) & status::NEEDS_RESET != 0
    }

    /// A byte of the configuration space.
    pub fn config8(&self, offset: u64) -> u8 {
        self.registers.read8(register::CONFIG + offset)
    }

    /// Two bytes of the configuration space.
    pub fn config16(&self, offset: u64) -> u16 {
        self.registers.read16(register::CONFIG + offset)
    }

    /// Four bytes of the configuration space.
    pub fn config32(&self, offset: u64) -> u32 {
        self.read(register::CONFIG + offset)
    }

    /// Eight bytes of the configuration space, of one generation.
    pub fn config64(&self, offset: u64) -> u64 {
        loop {
            let generation = self.read(register::CONFIG_GENERATION);
            let low = self.config32(offset);
            let high = self.config32(offset + 4);
            if self.read(register::CONFIG_GENERATION) == generation {
                return u64::from(high) << 32 | u64::from(low);
            }
        }
    }

    fn read(&self, offset: u64) -> u32 {
        self.registers.read32(offset)
    }

    fn write(&self, offset: u64, value: u32) {
        self.registers.write32(offset, value);
    }
}
