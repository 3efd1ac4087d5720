//! Memory that comes and goes while the guest runs (virtio 1.2, 5.15).
//!
//! ```text
//!          region, above the memory that the guest boots with
//!   ┌─────────── slot ───────────┬─────────── slot ───────────┬──  …
//!   │ block │ block │ …          │                            │
//!   └────────────────────────────┴────────────────────────────┴──  …
//!     plugged, or not              the guest reaches a slot while a block of it is plugged
//!
//!   host ── requested size ──► driver ── PLUG, UNPLUG ──► Region ──► Slots: show, came, hide, discard
//! ```
//!
//! The driver asks, block by block, until it has as much as is requested; it cannot be made to give anything back. What it
//! unplugs no device reads or writes from then on (see [`Blocks`]), and it goes back to the host before anything else is done. A
//! processor of the guest reaches whole slots.

mod blocks;
mod config;
mod device;
mod region;
mod request;
mod worker;

use std::io;
use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use blocks::Blocks;
pub use config::{MemoryHotplugConfig, MemoryHotplugSizeUpdate, MemoryHotplugStatus};
pub use device::{Mem, MemControl};
pub use region::{Geometry, MemCounts, OfRequest};
pub use request::{Request, RequestedRange};

/// What the guest reaches of the region, and what becomes of what it unplugs: the affair of whoever made the memory.
///
/// Slots are counted from the beginning of the region, and ranges are in bytes from there.
pub trait Slots: Send {
    /// Lets the guest reach `slot`, which it does not.
    ///
    /// # Errors
    ///
    /// What the host answers; then nothing has changed.
    fn show(&mut self, slot: u64) -> io::Result<()>;

    /// Is told that the memory of `range`, which the guest reaches, is about to be plugged.
    fn came(&mut self, range: Range<u64>);

    /// Is told that the memory of `range` is not plugged any more: it is hidden and discarded later, and until then has what it
    /// had.
    fn goes(&mut self, range: Range<u64>);

    /// Has the guest reach `slot` no more.
    ///
    /// # Errors
    ///
    /// What the host answers; then nothing has changed.
    fn hide(&mut self, slot: u64) -> io::Result<()>;

    /// Gives the memory of `range` back to the host. What it had is gone.
    ///
    /// # Errors
    ///
    /// What the host answers; then some of it may still be there.
    fn discard(&mut self, range: Range<u64>) -> io::Result<()>;
}

/// What the device takes along to go on elsewhere, beside its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    /// How much the guest is to have plugged, in bytes.
    pub requested_bytes: u64,
    /// How much of the region its driver may plug from, in bytes.
    pub usable_bytes: u64,
    /// One bit for each block that is plugged, the lowest first.
    pub plugged: Vec<u64>,
}

#[cfg(test)]
mod tests;
