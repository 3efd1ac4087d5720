//! What is done to the file of an image: operations, their arguments, and what their results say.

use crate::request::Segment;
use crate::segments;

use super::v4::{
    Allocation, Attributes, Commit, Compound, CompoundReply, Content, FileHandle, Read, ReplyError, Seek,
    Setattr, Stability, Stateid, Status, Verifier,
};

/// Something to be done to the file, and the memory that it fills or sends.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) action: Action,
    /// Its memory; empty without a transfer.
    pub(super) segments: Vec<Segment>,
    /// Its sender's own number for it.
    pub(super) cookie: u64,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// As much as there is memory for, from there on.
    Read { offset_bytes: u64 },
    /// All that is in memory, to there.
    Write { offset_bytes: u64, stability: Stability },
    /// Whatever was written before is to be on the medium.
    Commit,
    /// A range is to be zeros, without space of its own.
    Deallocate { offset_bytes: u64, len_bytes: u64 },
    /// The file is to have this size.
    Resize { size_bytes: u64 },
    /// Where the next of that begins is to be said.
    Seek { offset_bytes: u64, what: Content },
}

/// How a command has ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) command: Command,
    pub(super) outcome: Result<Outcome, Status>,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// So many bytes were read, up to the end of the file or not.
    Read { bytes: u32, is_end: bool },
    /// So many were written, and are safe or may be forgotten by the server whose verifier this is.
    Written {
        bytes: u32,
        stability: Stability,
        verifier: Verifier,
    },
    /// All that a server with this verifier has acknowledged is safe.
    Committed(Verifier),
    /// It begins there; `None`: nowhere.
    Found(Option<u64>),
    /// It.
    Done,
}

/// The file that commands are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) handle: FileHandle,
    /// By what right it is read and written.
    pub(super) stateid: Stateid,
}

/// Payloads up to this length are copied: it costs less than a piece of memory of its own.
pub(super) const STAGED_BYTES_MAX: u64 = 16 << 10;

/// What stands around them in a good answer, at least: a fragment's header, that of a reply (RFC 5531, 9), and the results of the
/// compound, of SEQUENCE and PUTFH, and of one operation more (RFC 8881, 18.46).
const RESULTS_BYTES: usize = 4 + 24 + 12 + 44 + 8 + 8;

impl Command {
    /// Whether data come back.
    pub(super) fn is_read(&self) -> bool {
        matches!(self.action, Action::Read { .. })
    }

    /// Whether so many do that they are received where they belong.
    pub(super) fn is_long_read(&self) -> bool {
        self.is_read() && segments::total(&self.segments) > STAGED_BYTES_MAX
    }

    /// Whether all data have come that were asked for, or all has been done.
    pub(super) fn is_whole(&self, outcome: Result<&Outcome, &Status>) -> bool {
        match outcome {
            Ok(Outcome::Read { bytes, .. }) => *bytes == self.len(),
            other => other.is_ok(),
        }
    }

    /// How long its answer is at least, if it is a good one.
    pub(super) fn answer_bytes(&self) -> usize {
        match self.action {
            Action::Read { .. } => {
                usize::try_from(self.len()).expect("this is a 64-bit monitor") + RESULTS_BYTES
            }
            _ => RESULTS_BYTES,
        }
    }

    fn len(&self) -> u32 {
        u32::try_from(segments::total(&self.segments)).expect("a command moves less than 4 GiB")
    }

    /// Writes what comes behind the SEQUENCE, but for the data of a WRITE.
    pub(super) fn put(&self, target: &Target, mut compound: Compound<'_>) {
        compound.put_fh(&target.handle);
        let stateid = target.stateid;
        match self.action {
            Action::Read { offset_bytes } => compound.read(&Read {
                stateid,
                offset: offset_bytes,
                count: self.len(),
            }),
            Action::Write {
                offset_bytes,
                stability,
            } => return compound.write(stateid, offset_bytes, stability, self.len()),
            // All of it.
            Action::Commit => compound.commit(&Commit { offset: 0, count: 0 }),
            Action::Deallocate {
                offset_bytes,
                len_bytes,
            } => compound.deallocate(&Allocation {
                stateid,
                offset: offset_bytes,
                length: len_bytes,
            }),
            Action::Resize { size_bytes } => compound.setattr(&Setattr {
                stateid,
                attributes: Attributes {
                    size: Some(size_bytes),
                    ..Attributes::default()
                },
            }),
            Action::Seek { offset_bytes, what } => compound.seek(&Seek {
                stateid,
                offset: offset_bytes,
                what,
            }),
        }
        compound.finish();
    }

    /// What the results behind that of the SEQUENCE say; data that were read are put where they belong.
    pub(super) fn outcome(&self, results: &mut CompoundReply<'_>) -> Result<Outcome, ReplyError> {
        results.put_fh()?;
        Ok(match self.action {
            Action::Read { .. } => {
                let read = results.read()?;
                let len_max = segments::total(&self.segments);
                let data = read.data.get(..usize::try_from(len_max).unwrap_or(usize::MAX));
                let data = data.unwrap_or(read.data);
                segments::fill(&self.segments, data);
                Outcome::Read {
                    bytes: u32::try_from(data.len()).expect("it is no longer than what was asked for"),
                    is_end: read.eof,
                }
            }
            Action::Write { .. } => {
                let written = results.write_copied()?;
                Outcome::Written {
                    bytes: written.count.min(self.len()),
                    stability: written.committed,
                    verifier: written.verifier,
                }
            }
            Action::Commit => Outcome::Committed(results.commit()?),
            Action::Deallocate { .. } => {
                results.deallocate()?;
                Outcome::Done
            }
            Action::Resize { .. } => {
                results.setattr()?;
                Outcome::Done
            }
            Action::Seek { .. } => {
                let found = results.seek()?;
                Outcome::Found((!found.eof).then_some(found.offset))
            }
        })
    }
}
