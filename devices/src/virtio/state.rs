//! What a virtio device itself, beside its registers and rings, takes along to go on elsewhere.

use serde::{Deserialize, Serialize};

use super::balloon::BalloonState;
use super::blk::BlkState;
use super::device::DeviceKind;
use super::mem::MemState;
use super::net::{MultiqueueState, NetState};
use super::pmem::PmemRange;
use super::vsock::VsockState;

/// The saved state of one device, by its kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// A block device.
    Block(BlkState),
    /// An entropy device: nothing. Its rate limiter starts full.
    Entropy,
    /// A network device.
    Network(NetState),
    /// A socket device.
    Socket(VsockState),
    /// A balloon.
    Balloon(BalloonState),
    /// Persistent memory: where it was. Its rate limiter starts full.
    Pmem(PmemRange),
    /// Memory that comes and goes.
    Memory(MemState),
    /// A network device with several pairs of queues.
    MultiqueueNetwork(MultiqueueState),
}

impl DeviceState {
    /// Which device it is of.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Block(_) => DeviceKind::Block,
            Self::Entropy => DeviceKind::Entropy,
            Self::Network(_) | Self::MultiqueueNetwork(_) => DeviceKind::Network,
            Self::Socket(_) => DeviceKind::Socket,
            Self::Balloon(_) => DeviceKind::Balloon,
            Self::Pmem(_) => DeviceKind::Pmem,
            Self::Memory(_) => DeviceKind::Memory,
        }
    }

    /// Why a device of that kind does not take it.
    pub(super) fn is_not_for(&self, here: DeviceKind) -> DeviceStateError {
        DeviceStateError::Kind {
            saved: self.kind(),
            here,
        }
    }
}

/// Why a device did not take up what was saved; it is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceStateError {
    /// It is of another kind.
    #[error("a virtio {saved:?} device was saved, and this is a virtio {here:?} device")]
    Kind {
        /// Of what kind the saved one is.
        saved: DeviceKind,
        /// Of what kind this one is.
        here: DeviceKind,
    },
    /// No socket device has said so.
    #[error("a virtio Socket device was saved whose next caller would have port {0}, which no caller gets")]
    HostPort(u32),
    /// A guest goes on using the addresses that it knows.
    #[error(
        "persistent memory was saved at {:#x} with {} bytes, and is at {:#x} with {} here",
        saved.start, saved.size_bytes, here.start, here.size_bytes
    )]
    Range {
        /// Where it was.
        saved: PmemRange,
        /// Where it is.
        here: PmemRange,
    },
    /// The driver would use queues that are not there.
    #[error(
        "a virtio Network device was saved whose driver uses {saved} pairs of queues, and this one has {here}: `queue_pairs` has \
         to be what it was"
    )]
    QueuePairs {
        /// How many it uses.
        saved: u16,
        /// How many there are.
        here: u16,
    },
    /// No memory that comes and goes is so.
    #[error("the state of memory that comes and goes is not one of this machine: {0}")]
    Memory(&'static str),
    /// The host does not let the guest reach a slot of it.
    #[error(
        "the guest cannot be let reach slot {slot} of its hot-plugged memory (error {errno} of KVM): look whether the host has \
         memory left"
    )]
    Slot {
        /// Which one.
        slot: u64,
        /// What the host answers.
        errno: i32,
    },
}
