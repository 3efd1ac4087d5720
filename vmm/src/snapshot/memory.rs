//! Guest memory in a file: every page at its place, and a table that says which there are and what they add up to.
//!
//! ```text
//!  memory file                                       memory table (a section of the state file)
//!  0 ┌─────────────────────────────────────────┐     id, size, full or diff (of which parent),
//!    │ guest memory in the order of addresses, │     one bit per page: the file has it,
//!    │ without the gap for devices; sparse     │     one sum per chunk, over the pages that there are: see `seal`
//!  n ├─────────────────────────────────────────┤
//!    │ trailer: id and size once more          │
//!    └─────────────────────────────────────────┘
//! ```
//!
//! A full file has every page that is not zeros; one that it does not have is zeros. A diff has the pages that were written since
//! its parent. Where the file has no page it has a hole, and where it has a page of zeros too, unless that is encrypted.

mod copy;
mod merge;
mod output;
mod pages;
mod reader;
mod residence;
#[cfg(test)]
mod scratch;
mod seal;
mod table;
mod trailer;
mod verify;
mod writer;

pub use copy::{CopyError, copy};
pub use merge::{MergeError, Source, merge};
pub use pages::{PageSet, PageSetError};
pub use reader::ReadError;
pub use residence::touched;
pub use seal::{HashKey, Seal, SealKind};
pub use table::{Damage, Kind, MemoryId, MemoryTable, MemoryTableState, MemoryTableStateV1, TableError};
pub use trailer::{TRAILER_BYTES, Trailer, TrailerError};
pub use verify::verify;
pub use writer::{Content, Progress, Untouched, WriteError, write};

/// The unit in which a file has memory or has it not, in bytes.
pub const PAGE_BYTES: usize = 4096;

/// The unit that has one checksum, in bytes: what is read, checked and given to a guest at a time.
pub const CHUNK_BYTES: usize = 64 << 10;

/// Pages of a chunk: as many as a mask has bits.
const CHUNK_PAGES: usize = CHUNK_BYTES / PAGE_BYTES;

/// How long the file of `size_bytes` of memory is.
pub const fn file_bytes(size_bytes: u64) -> u64 {
    size_bytes + TRAILER_BYTES as u64
}
