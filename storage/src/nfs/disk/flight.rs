//! A request in flight: the commands that it takes, one after the other, and what becomes of them.

use std::time::{Duration, Instant};

use crate::backend::{Access, Discard, Geometry};
use crate::remote::flights;
use crate::remote::retained::{Moment, Retained};
use crate::request::{Durability, Failure, Operation, Request, Segment, Space};
use crate::segments;

use super::super::bringup::File;
use super::super::command::{Action, Command, Ended, Outcome};
use super::super::v4::status::{Verdict, verdict};
use super::super::v4::{Content, Stability, Verifier};

/// A request that was accepted.
///
/// ```text
///   Transfer ──not durable yet──► Commit           Discard: Deallocate
///   WriteZeroes: Deallocate ──not supported──► WriteZeros       Grow: Resize
///   FindData: FindData ──there──► FindHole        Raise, Yield, TakeBack: Chore
/// ```
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) request: Request,
    accepted: Instant,
    stage: Stage,
    /// When its first command was sent.
    sent: Option<Moment>,
    /// How much of it is done.
    done_bytes: u64,
    /// How much the command under way does.
    under_way_bytes: u64,
    /// Some of what it has changed may be forgotten by the server.
    is_cached: bool,
    /// What a commit under way covers.
    covers: Option<Moment>,
    /// The generation that is to be raised.
    raised_from: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Transfer,
    Commit,
    Deallocate,
    WriteZeros,
    Resize,
    FindData,
    FindHole,
    /// No command does it.
    Chore,
}

/// What is to be done about a flight.
#[derive(Debug)]
pub(super) enum Next {
    /// Its next command is to be sent.
    Send,
    /// The same after a while.
    Later(Duration),
    /// The right to use the file is to be proved first.
    Doubt(&'static str),
    /// The server may have forgotten what it had acknowledged: that is to be written again first.
    Rewrite(&'static str),
    /// It has ended.
    End(Result<(), Failure>),
}

/// What the server says of itself with each write: another verifier is another life of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Life(Option<Verifier>);

/// How long a server that puts a command off is left alone. Whoever does not want to wait for that has a limit to the time of a
/// request.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// Zeros that are written where a range cannot be freed.
pub(super) const ZEROS_BYTES: usize = 64 << 10;

impl Life {
    /// One in which nothing was written yet, as far as it is known.
    pub(super) fn begins(verifier: Option<Verifier>) -> Self {
        Self(verifier)
    }

    /// Whether a server with this verifier is the one that acknowledged everything before.
    pub(super) fn goes_on(&mut self, verifier: Verifier) -> bool {
        *self.0.get_or_insert(verifier) == verifier
    }
}

impl flights::Flight for Flight {
    fn accepted(&self) -> Instant {
        self.accepted
    }

    fn request(&self) -> &Request {
        &self.request
    }

    fn into_request(self) -> Request {
        self.request
    }
}

impl Flight {
    /// A flight of `request`, or how that ends at once.
    pub(super) fn begin(
        request: Request,
        geometry: &Geometry,
        file: &File,
        now: Instant,
    ) -> Result<Self, (Request, Result<(), Failure>)> {
        match first_stage(&request, geometry, file) {
            Ok(stage) => Ok(Self {
                request,
                accepted: now,
                stage,
                sent: None,
                done_bytes: 0,
                under_way_bytes: 0,
                is_cached: false,
                covers: None,
                raised_from: None,
            }),
            Err(outcome) => Err((request, outcome)),
        }
    }

    /// Whether the generation is raised, now that it is `generation`. It has to become a higher one than it was when this was
    /// asked first.
    pub(super) fn is_raised(&mut self, generation: u64) -> bool {
        generation > *self.raised_from.get_or_insert(generation)
    }

    /// The flight's next command. `segments` is empty, `zeros` are [`ZEROS_BYTES`] of them.
    pub(super) fn command(
        &mut self,
        cookie: u64,
        file: &File,
        retained: &Retained,
        zeros: &mut [u8],
        mut segments: Vec<Segment>,
    ) -> Command {
        self.sent.get_or_insert(retained.now());
        let left = self.request.len_bytes - self.done_bytes;
        let is_read = self.request.operation == Operation::Read;
        let len_max = match self.stage {
            Stage::Transfer if is_read => file.read_bytes_max.into(),
            Stage::Transfer | Stage::WriteZeros => file.write_bytes_max.into(),
            _ => u64::MAX,
        };
        let len_bytes = left.min(len_max);
        self.under_way_bytes = len_bytes;
        let offset_bytes = self.request.offset_bytes + self.done_bytes;
        let stability = match self.request.durability {
            Durability::Durable => Stability::FileSync,
            Durability::Cached => Stability::Unstable,
        };
        let action = match self.stage {
            Stage::Transfer => {
                let range = self.done_bytes..self.done_bytes + len_bytes;
                segments::slice(&self.request.segments, range, &mut segments);
                if is_read {
                    Action::Read { offset_bytes }
                } else {
                    Action::Write {
                        offset_bytes,
                        stability,
                    }
                }
            }
            Stage::WriteZeros => {
                let mut left = usize::try_from(len_bytes).expect("it is at most 1 MiB");
                while left > 0 {
                    let piece = left.min(zeros.len());
                    segments.push(segments::own(zeros.get_mut(..piece).unwrap_or_default()));
                    left -= piece;
                }
                Action::Write {
                    offset_bytes,
                    stability,
                }
            }
            Stage::Commit => {
                self.covers = Some(retained.now());
                Action::Commit
            }
            Stage::Deallocate => Action::Deallocate {
                offset_bytes,
                len_bytes,
            },
            Stage::Resize => Action::Resize {
                size_bytes: self.request.len_bytes,
            },
            Stage::FindData => Action::Seek {
                offset_bytes,
                what: Content::Data,
            },
            Stage::FindHole => Action::Seek {
                offset_bytes,
                what: Content::Hole,
            },
            Stage::Chore => unreachable!("it is done by a procedure"),
        };
        Command {
            action,
            segments,
            cookie,
        }
    }

    /// Takes the end of its command in. What the server may forget is retained.
    pub(super) fn judge(
        &mut self,
        ended: &Ended,
        file: &mut File,
        retained: &mut Retained,
        life: &mut Life,
    ) -> Next {
        let outcome = match ended.outcome {
            Ok(outcome) => outcome,
            Err(status) => return self.refused(verdict(status), file),
        };
        match outcome {
            Outcome::Read { bytes, is_end } => self.moved(bytes.into(), is_end),
            Outcome::Written {
                bytes,
                stability,
                verifier,
            } => self.written(ended, bytes, stability, verifier, (retained, life)),
            Outcome::Committed(verifier) => {
                if !life.goes_on(verifier) {
                    return Next::Rewrite("the server has restarted since it was written to");
                }
                if let Some(moment) = self.covers {
                    retained.covered(moment);
                }
                Next::End(Ok(()))
            }
            Outcome::Found(at) => self.found(at),
            Outcome::Done if self.stage == Stage::Deallocate => {
                let offset = self.request.offset_bytes + self.done_bytes;
                retained.keep_zeroes(offset, self.under_way_bytes, self.request.operation.space());
                self.is_cached = true;
                self.moved(self.under_way_bytes, false)
            }
            Outcome::Done => Next::End(Ok(())),
        }
    }

    fn refused(&mut self, verdict: Verdict, file: &mut File) -> Next {
        match verdict {
            Verdict::Good => unreachable!("what is good is no refusal"),
            Verdict::Later | Verdict::Grace => Next::Later(RETRY_AFTER),
            Verdict::SessionLost | Verdict::ClientLost => Next::Doubt("the server does not know the session"),
            Verdict::StateLost | Verdict::NoGrace => {
                Next::Doubt("the server does not have the image open any more")
            }
            Verdict::Denied => Next::Doubt("somebody else has the image"),
            Verdict::FileLost => Next::Doubt("the server does not know the file any more"),
            Verdict::Failed(Failure::Unsupported) if self.stage == Stage::Deallocate => {
                file.can_deallocate = false;
                if self.request.operation == Operation::Discard {
                    return Next::End(Err(Failure::Unsupported));
                }
                self.stage = Stage::WriteZeros;
                Next::Send
            }
            // It is asked for what lies behind its end, and the rest of a file may be a hole: that is the same to some.
            Verdict::Failed(Failure::Host(libc::ENXIO)) if self.stage == Stage::FindData => self.found(None),
            Verdict::Failed(_) if matches!(self.stage, Stage::FindData | Stage::FindHole) => {
                // All of it may be data. If something is the matter with the file, reading it will tell.
                file.can_seek = false;
                Next::End(Ok(()))
            }
            Verdict::Failed(failure) => Next::End(Err(failure)),
        }
    }

    /// Narrows the range by where data, or the hole behind them, begin. No server is believed that would have a caller go around
    /// in circles.
    fn found(&mut self, at: Option<u64>) -> Next {
        let whole = self.request.range();
        let at = at.unwrap_or(whole.end).min(whole.end);
        match self.stage {
            Stage::FindData if at >= whole.start => {
                self.request.narrow(&(at..whole.end));
                self.stage = Stage::FindHole;
                if at == whole.end {
                    Next::End(Ok(()))
                } else {
                    Next::Send
                }
            }
            // Somebody has freed what was there a moment ago, or the server is wrong. Where the hole ends, nobody has said.
            Stage::FindHole if at == whole.start => Next::End(Ok(())),
            Stage::FindHole if at > whole.start => {
                self.request.narrow(&(whole.start..at));
                Next::End(Ok(()))
            }
            _ => Next::End(Err(Failure::Host(libc::EIO))),
        }
    }

    fn sent(&self) -> Moment {
        self.sent.expect("what has ended was sent")
    }

    fn written(
        &mut self,
        ended: &Ended,
        bytes: u32,
        stability: Stability,
        verifier: Verifier,
        (retained, life): (&mut Retained, &mut Life),
    ) -> Next {
        let offset = self.request.offset_bytes + self.done_bytes;
        if stability == Stability::Unstable {
            if !life.goes_on(verifier) {
                // What was acknowledged before may be forgotten, and is older than this.
                return Next::Rewrite("the server has restarted since it was written to");
            }
            self.is_cached = true;
            match self.stage {
                Stage::WriteZeros => {
                    retained.keep_zeroes(offset, bytes.into(), self.request.operation.space());
                }
                _ => {
                    let mut written = Vec::new();
                    segments::slice(&ended.command.segments, 0..u64::from(bytes), &mut written);
                    retained.keep(offset, &written);
                }
            }
        } else {
            // What an earlier write left behind must not be written over it again.
            retained.supersede(offset, bytes.into(), self.sent());
        }
        self.moved(bytes.into(), false)
    }

    /// Goes on behind what was done.
    fn moved(&mut self, bytes: u64, is_end: bool) -> Next {
        let bytes = bytes.min(self.under_way_bytes);
        self.done_bytes += bytes;
        if self.done_bytes < self.request.len_bytes {
            return match bytes {
                // The file has become shorter.
                _ if is_end => Next::End(Err(Failure::Truncated)),
                0 => Next::Later(RETRY_AFTER),
                _ => Next::Send,
            };
        }
        let is_change = self.request.operation != Operation::Read;
        if is_change && self.request.durability == Durability::Durable && self.is_cached {
            self.stage = Stage::Commit;
            return Next::Send;
        }
        Next::End(Ok(()))
    }
}

/// The stage in which `request` starts, or its end.
fn first_stage(request: &Request, geometry: &Geometry, file: &File) -> Result<Stage, Result<(), Failure>> {
    const SECTOR_BYTES: u64 = 512;
    if request.operation == Operation::Grow {
        return match request.len_bytes {
            len if len < geometry.size_bytes || !len.is_multiple_of(SECTOR_BYTES) => {
                Err(Err(Failure::OutOfRange))
            }
            len if len == geometry.size_bytes => Err(Ok(())),
            _ if geometry.access == Access::ReadOnly => Err(Err(Failure::ReadOnly)),
            _ => Ok(Stage::Resize),
        };
    }
    let end = request.offset_bytes.checked_add(request.len_bytes);
    if end.is_none_or(|end| end > geometry.size_bytes) {
        return Err(Err(Failure::OutOfRange));
    }
    let is_read_only = geometry.access == Access::ReadOnly;
    match request.operation {
        Operation::Raise | Operation::Yield | Operation::TakeBack => Ok(Stage::Chore),
        Operation::Flush if is_read_only => Err(Ok(())),
        Operation::Flush => Ok(Stage::Commit),
        Operation::Write | Operation::Discard | Operation::WriteZeroes { .. } if is_read_only => {
            Err(Err(Failure::ReadOnly))
        }
        _ if request.len_bytes == 0 => Err(Ok(())),
        Operation::Read | Operation::Write => Ok(Stage::Transfer),
        Operation::FindData if !file.can_seek => Err(Ok(())),
        Operation::FindData => Ok(Stage::FindData),
        Operation::Discard if geometry.discard == Discard::Ignored || !file.can_deallocate => Err(Ok(())),
        Operation::Discard => Ok(Stage::Deallocate),
        Operation::WriteZeroes {
            space: Space::MayBeFreed,
        } if file.can_deallocate => Ok(Stage::Deallocate),
        // Where the space is to stay, ALLOCATE behind a DEALLOCATE (RFC 7862, 15.1) would have less to send, and is not as good:
        // the two are not one step. Between them the space is anybody's, and if the second finds none left, or the server dies
        // before it, the range has lost what it had; a write that worked before fails then. No other operation zeroes in place.
        Operation::WriteZeroes { .. } | Operation::Grow => Ok(Stage::WriteZeros),
    }
}
