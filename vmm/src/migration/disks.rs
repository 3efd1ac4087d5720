//! Disks that go along with their machine, for a source whose images the target does not reach.
//!
//! ```text
//!   blocks   number of the disk (4 bytes, little endian)  offset (8)  what lies there
//!   holes    number of the disk (4)  offset (8)  length (8)
//! ```
//!
//! They go by the first connection, in rounds like memory: all of it once, then what was changed meanwhile, and the rest while
//! the guest stands still.

mod sending;
mod taking;

pub use sending::Copied;
pub(super) use sending::Sending;
pub use taking::{Abandoned, Copies, CopyError};

/// What stands before the bytes of a part of a disk.
pub const BLOCKS_HEAD_BYTES: usize = 12;
/// How long a message of zeros is.
pub const HOLES_BYTES: usize = 20;

#[cfg(test)]
mod tests;
