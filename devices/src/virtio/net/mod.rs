//! The network device (virtio 1.2, 5.1): Ethernet frames between the guest and a tap of the host.
//!
//! ```text
//!   guest ── transmitq ──► send.rs ───── writev ──► tap.rs      (header and frame, as the guest wrote them)
//!   guest ◄── receiveq ─── receive.rs ◄─ readv ──── tap.rs      (into the guest's own buffers: nothing is copied here)
//!   guest ── controlq ───► control.rs                           (its announcement after a change of hosts)
//! ```
//!
//! One thread for each pair of queues does all three; only the first has commands. A device with several pairs has a tap with
//! as many queues, and the kernel gives a flow's frames to the queue by which the guest has sent its own. The header before
//! each frame (5.1.6) is the tap's own: the kernel checks it and cuts or joins segments, so nothing of a frame is looked at in
//! this process.

mod config;
mod control;
mod device;
mod pairs;
mod receive;
mod send;
mod tap;
mod worker;

pub use config::{
    MTU_MIN, MacAddress, MacError, NetworkInterfaceConfig, PartialNetworkInterface, QUEUE_PAIRS_MAX,
};
pub use device::{Net, NetControl};
pub use tap::{Tap, TapError};
pub use worker::NetCounts;

use serde::{Deserialize, Serialize};

/// What a network device with one pair of queues takes along to go on elsewhere. Its limiters start full.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The driver has been asked to announce its guest, and has not said that it did.
    pub announces: bool,
}

/// What one with several does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MultiqueueState {
    /// As in [`NetState`].
    pub announces: bool,
    /// How many pairs of queues the driver uses.
    pub pairs: u16,
}

#[cfg(test)]
mod tests;
