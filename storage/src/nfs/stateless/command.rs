//! What the disk has done by the server: READs, and what became of them.

use crate::nfs::v3::Status;
use crate::request::Segment;
use crate::segments;

/// A READ, of as much as there is memory for.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) offset_bytes: u64,
    /// Its memory.
    pub(super) segments: Vec<Segment>,
    /// Its sender's own number for it.
    pub(super) cookie: u64,
}

/// How a command has ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) command: Command,
    pub(super) outcome: Result<Outcome, Status>,
}

/// So many bytes were read, up to the end of the file or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) bytes: u32,
    pub(super) is_end: bool,
}

impl Command {
    pub(super) fn len_bytes(&self) -> u64 {
        segments::total(&self.segments)
    }
}
