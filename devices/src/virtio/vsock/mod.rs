//! The socket device (virtio 1.2, 5.10): streams between programs of the guest and Unix sockets of the host.
//!
//! ```text
//!   guest ── tx ──► send.rs ─────► connections.rs ──► connection.rs ── sendmsg ──► a program of the host
//!   guest ◄── rx ── receive.rs ◄── connections.rs ◄── connection.rs ◄─ recvmsg ─── a program of the host
//!   guest ◄─ event ─ worker.rs                          callers.rs  ◄── accept ─── who has not said yet what it wants
//! ```
//!
//! The convention is Firecracker's. A program of the host connects to `uds_path`, writes `CONNECT 52\n` for port 52 of the guest,
//! and reads `OK 1073741824\n`, with the port that it has there. A program of the guest that connects to port 52 of CID 2 reaches
//! who listens at `<uds_path>_52`.
//!
//! One thread does it all. Data goes between guest memory and sockets without a copy, but for what a program of the host does not
//! take at once: that is kept, no more of it than the guest was promised room for.

mod callers;
mod config;
mod connection;
mod connections;
mod device;
mod packet;
mod receive;
mod send;
mod socket;
mod worker;

pub use config::{CID_MAX, CID_MIN, VsockConfig};
pub use connections::VsockCounts;
pub use device::Vsock;
pub use socket::{ListenError, Listener};

use serde::{Deserialize, Serialize};

/// What a socket device takes along to go on elsewhere. Its connections stay behind, and the guest is told so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The port that the next caller of the host gets: none that a connection had that the guest may not know to be over.
    pub next_port: u32,
}

#[cfg(test)]
mod tests;
