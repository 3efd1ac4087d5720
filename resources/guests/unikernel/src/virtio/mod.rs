//! virtio 1.2 over MMIO, driven by polling or by interrupts.

use core::fmt;

use crate::memory::OutOfMemory;

pub mod blk;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod outbox;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod vsock;

/// What goes wrong between the guest and a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The command line names no such device.
    NoDevice {
        /// Of which kind.
        kind: &'static str,
        /// Which one of its kind.
        index: u64,
    },
    /// The device did not return to status 0.
    ResetRefused {
        /// Its status.
        status: u32,
    },
    /// The device does not speak virtio 1, or withdrew FEATURES_OK.
    FeaturesRefused {
        /// What it offered.
        offered: u64,
    },
    /// There is no queue of that index.
    NoQueue {
        /// The index.
        index: u16,
    },
    /// The device's interrupt is no input of the IOAPIC.
    NoInterrupt {
        /// What the command line says.
        irq: u32,
    },
    /// The device set DEVICE_NEEDS_RESET.
    NeedsReset,
    /// A request did not come back in time.
    TimedOut {
        /// The limit.
        seconds: u64,
    },
    /// The device returned a chain that it was not given.
    ForeignChain {
        /// The index of its head.
        head: u32,
    },
    /// There is no memory for its rings.
    Memory(OutOfMemory),
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoDevice { kind, index } => write!(out, "the command line names no {kind} device {index}"),
            Self::ResetRefused { status } => {
                write!(out, "the device does not reset: its status is {status:#x}")
            }
            Self::FeaturesRefused { offered } => write!(out, "no agreement on features out of {offered:#x}"),
            Self::NoQueue { index } => write!(out, "the device has no queue {index}"),
            Self::NoInterrupt { irq } => write!(out, "interrupt {irq} is no input of the IOAPIC"),
            Self::NeedsReset => write!(out, "the device asks to be reset"),
            Self::TimedOut { seconds } => write!(out, "a request did not complete in {seconds} s"),
            Self::ForeignChain { head } => {
                write!(out, "the device returned chain {head}, which it did not have")
            }
            Self::Memory(error) => error.fmt(out),
        }
    }
}

impl From<OutOfMemory> for Error {
    fn from(error: OutOfMemory) -> Self {
        Self::Memory(error)
    }
}

/// Features of the transport (virtio 1.2, section 6).
pub mod feature {
    /// VIRTIO_RING_F_INDIRECT_DESC.
    pub const INDIRECT: u64 = 1 << 28;
    /// VIRTIO_RING_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
}
