//! Persistent memory (virtio 1.2, 5.19): a file of the host that the guest has in its address space.
//!
//! ```text
//!   guest ── loads and stores ──► the mapping of the file, which KVM shows it: nobody here takes part
//!   guest ── FLUSH ─────────────► Medium::flush: what was stored by then is on the medium when it is answered
//! ```
//!
//! Where the file is mapped is the affair of whoever has KVM; the device is told where the guest sees it.

mod config;
mod device;
mod medium;
mod unwritable;
mod worker;

use serde::{Deserialize, Serialize};

pub use config::{HeldPmem, PartialPmem, PmemConfig, PmemError};
pub use device::{Pmem, PmemControl};
pub use medium::{FlushError, Medium, REGION_ALIGNMENT_BYTES};
pub use unwritable::Unwritable;
pub use worker::PmemCounts;

/// The guest-physical range of a device: its configuration space (5.19.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemRange {
    /// Where it begins: a multiple of [`REGION_ALIGNMENT_BYTES`].
    pub start: u64,
    /// How long it is, in bytes: likewise.
    pub size_bytes: u64,
}

#[cfg(test)]
mod tests;
