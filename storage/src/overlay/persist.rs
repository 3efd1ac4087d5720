//! How bits reach the file: never before the data that they speak of.

use super::bitmap::{BLOCK_BYTES, Bitmap, IsSynced, Staged};
use super::flight::Stage;
use super::format::BITMAP_OFFSET_BYTES;
use super::port::{Side, Turn};
use super::{CYCLE, Lifetime, Overlay, Turned};
use crate::request::{Durability, Failure, Operation, Request, Segment};
use crate::segments;

/// One round of writing bits down, for all flushes and durable changes that waited when it began.
///
/// ```text
///   begin: dirty blocks are frozen
///     │ a flush, or cached data                      only durable data
///     ▼                                                    │
///   SyncData ──► Blocks ──cached data──► SyncBlocks ► End  ▼
///                  ▲  └──────────────────────────────► End (blocks are written with RWF_DSYNC)
///                  └───────────────────────────────────────┘
/// ```
pub(super) struct Cycle {
    round: Round,
    staged: Staged,
    /// The flights that it ends.
    pub(super) covers: Vec<usize>,
    outcome: Result<(), Failure>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Round {
    SyncData,
    /// Writes the run of this number.
    Blocks(usize),
    SyncBlocks,
    End,
}

/// Whether a flush is among those who wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Everything that has completed has to be on the medium.
    Flush,
    /// Bits of data that is on the medium.
    Bits,
}

impl Cycle {
    /// Freezes what the file lacks, for `covers`.
    pub(super) fn begin(purpose: Purpose, covers: Vec<usize>, bitmap: &mut Bitmap) -> Self {
        let staged = bitmap.stage();
        let round = if purpose == Purpose::Flush || staged.needs_sync {
            Round::SyncData
        } else {
            Round::Blocks(0)
        };
        Self {
            round,
            staged,
            covers,
            outcome: Ok(()),
        }
    }

    /// What the overlay's file has to do now; `None` at the end.
    pub(super) fn next(&mut self, bitmap: &mut Bitmap, spare: &mut Vec<Vec<Segment>>) -> Option<Request> {
        if let Round::Blocks(run) = self.round {
            match self.staged.runs.get(run) {
                Some(blocks) => {
                    let mut memory = spare.pop().unwrap_or_default();
                    memory.push(segments::own(bitmap.staged(blocks)));
                    let durability = match self.staged.needs_sync {
                        true => Durability::Cached,
                        false => Durability::Durable,
                    };
                    return Some(Request {
                        tag: 0,
                        operation: Operation::Write,
                        offset_bytes: BITMAP_OFFSET_BYTES + (blocks.start * BLOCK_BYTES) as u64,
                        len_bytes: (blocks.len() * BLOCK_BYTES) as u64,
                        durability,
                        segments: memory,
                    });
                }
                None if self.staged.needs_sync && run > 0 => self.round = Round::SyncBlocks,
                None => self.round = Round::End,
            }
        }
        (self.round != Round::End).then(|| Request {
            tag: 0,
            operation: Operation::Flush,
            offset_bytes: 0,
            len_bytes: 0,
            durability: Durability::Cached,
            segments: Vec::new(),
        })
    }

    /// Takes the end of that.
    pub(super) fn absorb(&mut self, outcome: Result<(), Failure>) {
        self.outcome = outcome;
        self.round = match self.round {
            _ if outcome.is_err() => Round::End,
            Round::SyncData => Round::Blocks(0),
            Round::Blocks(run) => Round::Blocks(run + 1),
            Round::SyncBlocks | Round::End => Round::End,
        };
    }

    /// Ends it. What failed is tried again by the next one.
    pub(super) fn finish(self, bitmap: &mut Bitmap) -> (Vec<usize>, Result<(), Failure>) {
        if self.outcome.is_err() {
            bitmap.restore(&self.staged);
        }
        (self.covers, self.outcome)
    }
}

impl Overlay {
    /// Sets the bits of a change whose data is written, and says whether a cycle has begun for it.
    pub(super) fn settle(&mut self, place: usize) -> bool {
        if self.growth_is_of(place) {
            self.adopt_growth();
        }
        let flight = self.flights.get_mut(place).expect("a flight settles once");
        let is_durable = self.lifetime == Lifetime::Kept && flight.asked.durability == Durability::Durable;
        flight.stage = Stage::End;
        if !flight.is_change() {
            return false;
        }
        let touched = flight.touched(&self.contents.shape);
        if let Some(claim) = flight.claim.take() {
            let is_synced = if is_durable { IsSynced::Yes } else { IsSynced::No };
            self.contents.bitmap.set(&claim, is_synced);
            self.contents.claims.release(&claim);
            self.stalled.append(&mut self.waiting);
        }
        // A bit of an earlier change may be on its way in the cycle that runs.
        if is_durable && (self.cycle.is_some() || self.contents.bitmap.is_dirty(&touched)) {
            flight.stage = Stage::Persist;
            return self.join(place);
        }
        false
    }

    /// Waits for the next cycle, and says whether it has begun by that.
    fn join(&mut self, place: usize) -> bool {
        self.joining.push(place);
        self.begin_cycle()
    }

    fn begin_cycle(&mut self) -> bool {
        if self.cycle.is_some() || self.joining.is_empty() {
            return false;
        }
        let covers = std::mem::take(&mut self.joining);
        let mut purpose = Purpose::Bits;
        for place in &covers {
            let flight = self.flights.get_mut(*place);
            if flight.is_some_and(|flight| flight.asked.operation == Operation::Flush) {
                purpose = Purpose::Flush;
            }
        }
        self.cycle = Some(Cycle::begin(purpose, covers, &mut self.contents.bitmap));
        true
    }

    pub(super) fn finish_cycle(&mut self) {
        let cycle = self.cycle.take().expect("a cycle ends once");
        let (covers, outcome) = cycle.finish(&mut self.contents.bitmap);
        for place in covers {
            let flight = self.flights.get_mut(place).expect("a cycle covers flights");
            flight.outcome = outcome;
            self.finish(place);
        }
        self.begin_cycle();
    }

    /// The first step of a flush: its own sync if the file lacks no bits, else a cycle.
    pub(super) fn start_flush(&mut self, place: usize, turn: &mut Turn<'_>) -> Turned {
        let is_behind = self.cycle.is_some() || self.contents.bitmap.has_dirty();
        let flight = self.flights.get_mut(place).expect("it was inserted just now");
        if !is_behind {
            flight.stage = Stage::Pass(Side::Store);
            return self.advance(place, turn);
        }
        flight.stage = Stage::Persist;
        if self.join(place) {
            self.advance(CYCLE, turn)
        } else {
            Turned::Pending
        }
    }
}

impl From<Durability> for IsSynced {
    fn from(durability: Durability) -> Self {
        match durability {
            Durability::Cached => Self::No,
            Durability::Durable => Self::Yes,
        }
    }
}
