//! A request in flight: the commands that it takes, one after the other, and what becomes of them.

use std::time::{Duration, Instant};

use crate::backend::{Access, Discard, Geometry};
use crate::request::{Durability, Failure, Operation, Request, Segment, Space};
use crate::segments;

use super::super::scsi::capacity::{CAPACITY_BYTES, Capacity};
use super::super::scsi::cdb::{self, Blocks};
use super::super::scsi::sense::{Attention, Verdict, verdict};
use super::super::session::{Command, Ended, Transfer};
use super::super::unit::{Cache, Fua, Unit};
use crate::remote::flights;
use crate::remote::retained::{Moment, Retained};

/// A request that was accepted.
///
/// ```text
///   Transfer ──not durable yet──► Flush            Discard: Unmap
///   WriteZeroes: WriteSame ──not supported──► WriteZeros       Grow: Capacity      Raise, Yield, TakeBack: Chore
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
    /// The write under way is on the medium when it is acknowledged.
    is_forced: bool,
    /// Some of what it has changed may be in the cache only.
    is_cached: bool,
    /// What a flush under way covers.
    covers: Option<Moment>,
    /// How often the unit has put it off.
    retries: u32,
    /// Parameters that a command sends, or data of ours that it fills.
    buffer: Vec<u8>,
    /// The generation that is to be raised.
    raised_from: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Transfer,
    Flush,
    Unmap,
    WriteSame,
    WriteZeros,
    Capacity,
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
    /// The session has to begin anew: the unit was reset, or somebody else has it.
    Reconnect(&'static str),
    /// It has ended.
    End(Result<(), Failure>),
}

const RETRY_AFTER: Duration = Duration::from_millis(100);
/// How often a unit may put a command off with something to say before it is asked more rarely.
const ATTENTIONS_MAX: u32 = 32;
/// Zeros that are written where a range cannot be zeroed in a better way.
pub(super) const ZEROS_BYTES: usize = 64 << 10;

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
        unit: &Unit,
        now: Instant,
    ) -> Result<Self, (Request, Result<(), Failure>)> {
        match first_stage(&request, geometry, unit) {
            Ok(stage) => Ok(Self {
                request,
                accepted: now,
                stage,
                sent: None,
                done_bytes: 0,
                under_way_bytes: 0,
                is_forced: false,
                is_cached: false,
                covers: None,
                retries: 0,
                buffer: Vec::new(),
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
        unit: &Unit,
        retained: &Retained,
        zeros: &mut [u8],
        mut segments: Vec<Segment>,
    ) -> Command {
        self.sent.get_or_insert(retained.now());
        let left = self.request.len_bytes - self.done_bytes;
        if self.stage == Stage::WriteSame && unit.limits.write_same_blocks == 0 {
            // It could when this was begun.
            self.stage = Stage::WriteZeros;
        }
        let blocks_max = match self.stage {
            Stage::Transfer | Stage::WriteZeros => unit.limits.transfer_blocks,
            // As that: it refuses all of it.
            Stage::Unmap if unit.limits.unmap_blocks == 0 => u32::MAX,
            Stage::Unmap => unit.limits.unmap_blocks,
            Stage::WriteSame => unit.limits.write_same_blocks,
            Stage::Flush | Stage::Capacity | Stage::Chore => u32::MAX,
        };
        let len = left.min(u64::from(blocks_max) * u64::from(unit.block_bytes));
        self.under_way_bytes = len;
        let range = unit.blocks(self.request.offset_bytes + self.done_bytes, len);
        let (cdb, transfer) = match self.stage {
            Stage::Transfer => {
                segments::slice(
                    &self.request.segments,
                    self.done_bytes..self.done_bytes + len,
                    &mut segments,
                );
                if self.request.operation == Operation::Read {
                    (cdb::read(range, Durability::Cached), Transfer::In)
                } else {
                    let durability = self.force(unit);
                    (cdb::write(range, durability), Transfer::Out)
                }
            }
            Stage::Flush => {
                self.covers = Some(retained.now());
                (cdb::synchronize_cache(Blocks::ALL), Transfer::None)
            }
            Stage::Unmap => {
                let (cdb, parameters) = cdb::unmap(&[range]);
                self.buffer = parameters;
                segments.push(segments::own(&mut self.buffer));
                (cdb, Transfer::Out)
            }
            Stage::WriteSame => {
                let block = usize::try_from(unit.block_bytes).expect("a block is small");
                segments.push(segments::own(zeros.get_mut(..block).unwrap_or_default()));
                (cdb::write_same(range, self.space(unit)), Transfer::Out)
            }
            Stage::WriteZeros => {
                let mut left = usize::try_from(len).expect("it is at most 1 MiB");
                while left > 0 {
                    let piece = left.min(zeros.len());
                    segments.push(segments::own(zeros.get_mut(..piece).unwrap_or_default()));
                    left -= piece;
                }
                let durability = self.force(unit);
                (cdb::write(range, durability), Transfer::Out)
            }
            Stage::Capacity => {
                self.buffer = vec![0; CAPACITY_BYTES as usize];
                segments.push(segments::own(&mut self.buffer));
                (cdb::read_capacity(CAPACITY_BYTES), Transfer::In)
            }
            Stage::Chore => unreachable!("it is done by a procedure"),
        };
        Command {
            cdb,
            transfer,
            segments,
            cookie,
        }
    }

    /// Whether a write has to pass the cache by, and can.
    fn force(&mut self, unit: &Unit) -> Durability {
        self.is_forced =
            self.request.durability == Durability::Durable && unit.cache() == Cache::Volatile(Fua::Supported);
        if self.is_forced {
            Durability::Durable
        } else {
            Durability::Cached
        }
    }

    fn space(&self, unit: &Unit) -> Space {
        match self.request.operation {
            Operation::WriteZeroes {
                space: Space::MayBeFreed,
            } if unit.limits.write_same_unmaps => Space::MayBeFreed,
            _ => Space::Stays,
        }
    }

    /// Takes the end of its command in. What the cache of the unit may forget is retained.
    pub(super) fn judge(&mut self, ended: &Ended, unit: &mut Unit, retained: &mut Retained) -> Next {
        match verdict(ended.status, ended.sense) {
            Verdict::Good => self.done(ended, unit, retained),
            Verdict::Retry(Attention::Reset | Attention::Cleared) => {
                Next::Reconnect("the unit was reset, which forgets what it was doing")
            }
            Verdict::Retry(Attention::Identity) => {
                Next::Reconnect("the unit is not what it was, by its own account")
            }
            Verdict::Retry(Attention::Parameters) => {
                unit.has_other_parameters();
                self.retry(Duration::ZERO)
            }
            Verdict::Deferred(_) => Next::Reconnect("the unit has lost something that it had only cached"),
            Verdict::Conflict => Next::Reconnect("somebody else has the reservation of the unit"),
            Verdict::LunMissing => Next::Reconnect("the target does not know the unit any more"),
            Verdict::Retry(_) | Verdict::CapacityChanged | Verdict::ReservationChanged => {
                self.retry(Duration::ZERO)
            }
            Verdict::BusyLater => self.retry(RETRY_AFTER),
            Verdict::Failed(Failure::Unsupported) if self.stage == Stage::WriteSame => {
                unit.limits.write_same_blocks = 0;
                self.stage = Stage::WriteZeros;
                Next::Send
            }
            Verdict::Failed(Failure::Unsupported) if self.stage == Stage::Unmap => {
                unit.limits.unmap_blocks = 0;
                Next::End(Err(Failure::Unsupported))
            }
            // A unit without a cache to speak of.
            Verdict::Failed(Failure::Unsupported) if self.stage == Stage::Flush => {
                unit.has_no_cache();
                retained.covered(retained.now());
                Next::End(Ok(()))
            }
            Verdict::Failed(failure) => Next::End(Err(failure)),
            Verdict::Miscompare => Next::End(Err(Failure::Host(libc::EIO))),
        }
    }

    fn sent(&self) -> Moment {
        self.sent.expect("what has ended was sent")
    }

    /// The same again: at once if the unit had something to say, unless it always has; or after a while. Whoever does not want to
    /// wait for that has a limit to the time of a request.
    fn retry(&mut self, patience: Duration) -> Next {
        self.retries = self.retries.saturating_add(1);
        if patience.is_zero() && self.retries <= ATTENTIONS_MAX {
            Next::Send
        } else {
            Next::Later(patience.max(RETRY_AFTER))
        }
    }

    fn done(&mut self, ended: &Ended, unit: &Unit, retained: &mut Retained) -> Next {
        self.retries = 0;
        let offset = self.request.offset_bytes + self.done_bytes;
        let may_be_forgotten = unit.cache() != Cache::None && !self.is_forced;
        match self.stage {
            Stage::Transfer if u64::from(ended.moved_bytes) < self.under_way_bytes => {
                return Next::End(Err(Failure::Truncated));
            }
            Stage::Transfer if self.request.operation == Operation::Write && may_be_forgotten => {
                retained.keep(offset, &ended.command.segments);
            }
            // A range that was discarded may read as anything, but not as one thing now and as another later.
            Stage::Unmap | Stage::WriteSame | Stage::WriteZeros if may_be_forgotten => {
                retained.keep_zeroes(offset, self.under_way_bytes, self.request.operation.space());
            }
            // What an earlier write left in the cache must not be written over it again.
            Stage::Transfer | Stage::Unmap | Stage::WriteSame | Stage::WriteZeros
                if self.request.operation != Operation::Read =>
            {
                retained.supersede(offset, self.under_way_bytes, self.sent());
            }
            Stage::Flush => {
                if let Some(moment) = self.covers {
                    retained.covered(moment);
                }
                return Next::End(Ok(()));
            }
            Stage::Capacity => return Next::End(self.grown(ended, unit)),
            Stage::Transfer | Stage::Unmap | Stage::WriteSame | Stage::WriteZeros | Stage::Chore => {}
        }
        self.done_bytes += self.under_way_bytes;
        self.is_cached |= may_be_forgotten;
        if self.done_bytes < self.request.len_bytes {
            return Next::Send;
        }
        let is_change = self.request.operation != Operation::Read;
        if is_change && self.request.durability == Durability::Durable && self.is_cached {
            self.stage = Stage::Flush;
            return Next::Send;
        }
        Next::End(Ok(()))
    }

    /// Whether the unit has become as large as the request asks for. It is not ours to make it so.
    fn grown(&self, ended: &Ended, unit: &Unit) -> Result<(), Failure> {
        let moved = usize::try_from(ended.moved_bytes).unwrap_or(0);
        let told = self.buffer.get(..moved).unwrap_or_default();
        let capacity = Capacity::parse(told).map_err(|_| Failure::Host(libc::EPROTO))?;
        // What lies behind a tail is not part of the disk: the tail stays where it is.
        let bytes_max = match unit.tail {
            Some(_) => unit.size_bytes,
            None => capacity.size_bytes,
        };
        if bytes_max < self.request.len_bytes {
            return Err(Failure::TooLarge { bytes_max });
        }
        Ok(())
    }
}

/// The stage in which `request` starts, or its end.
fn first_stage(request: &Request, geometry: &Geometry, unit: &Unit) -> Result<Stage, Result<(), Failure>> {
    if request.operation == Operation::Grow {
        return match request.len_bytes {
            len if len < geometry.size_bytes || !len.is_multiple_of(unit.block_bytes.into()) => {
                Err(Err(Failure::OutOfRange))
            }
            len if len == geometry.size_bytes => Err(Ok(())),
            _ => Ok(Stage::Capacity),
        };
    }
    let end = request.offset_bytes.checked_add(request.len_bytes);
    if end.is_none_or(|end| end > geometry.size_bytes) {
        return Err(Err(Failure::OutOfRange));
    }
    let is_read_only = geometry.access == Access::ReadOnly;
    let is_aligned = (request.offset_bytes | request.len_bytes).is_multiple_of(unit.block_bytes.into());
    match request.operation {
        Operation::Raise | Operation::Yield | Operation::TakeBack => Ok(Stage::Chore),
        Operation::Flush if is_read_only || unit.cache() == Cache::None => Err(Ok(())),
        Operation::Flush => Ok(Stage::Flush),
        Operation::Write | Operation::Discard | Operation::WriteZeroes { .. } if is_read_only => {
            Err(Err(Failure::ReadOnly))
        }
        _ if request.len_bytes == 0 => Err(Ok(())),
        // A unit has no holes.
        Operation::FindData => Err(Ok(())),
        // The guest was told the size of a block.
        _ if !is_aligned => Err(Err(Failure::Unsupported)),
        Operation::Read | Operation::Write => Ok(Stage::Transfer),
        Operation::Discard if geometry.discard == Discard::Ignored || unit.limits.unmap_blocks == 0 => {
            Err(Ok(()))
        }
        Operation::Discard => Ok(Stage::Unmap),
        Operation::WriteZeroes { .. } if unit.limits.write_same_blocks > 0 => Ok(Stage::WriteSame),
        Operation::WriteZeroes { .. } | Operation::Grow => Ok(Stage::WriteZeros),
    }
}

#[cfg(test)]
mod tests;
