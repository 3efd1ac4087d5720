//! What was acknowledged and may have been forgotten, being written again.

use std::sync::Arc;

use crate::reactor::Submit;
use crate::request::{Durability, Failure, Space};
use crate::segments;

use super::super::scsi::cdb;
use super::super::scsi::sense::{Attention, Verdict, verdict};
use super::super::session::{Command, Ended, Transfer};
use super::super::unit::{Cache, Unit};
use super::{Disk, REWRITE, State};
use crate::remote::retained::{Retained, Rewrite};

/// Rewrites, some of which are under way. They do not overlap, so they need no order.
#[derive(Debug)]
pub(super) struct Rewriting {
    waiting: Vec<Rewrite>,
    /// Those under way, each in its place.
    under_way: Vec<Option<Rewrite>>,
    /// A block of zeros, and more.
    zeros: Arc<[u8]>,
    retries: u32,
}

/// Rewrites under way at a time.
const UNDER_WAY_MAX: usize = 16;
/// What is zeroed by one command, in bytes.
const ZEROS_BYTES: usize = 256 << 10;
/// How often a rewrite may be put off before the session begins anew.
const RETRIES_MAX: u32 = 1_000;

impl Rewriting {
    pub(super) fn new(retained: &Retained) -> Self {
        let waiting = retained.replay();
        Self {
            waiting,
            under_way: (0..UNDER_WAY_MAX).map(|_| None).collect(),
            zeros: Arc::from(vec![0; ZEROS_BYTES]),
            retries: 0,
        }
    }

    fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.under_way.iter().all(Option::is_none)
    }

    /// The next rewrite as a command, if there is one and there is room.
    fn next_command(&mut self, unit: &Unit) -> Option<Command> {
        let place = self.under_way.iter().position(Option::is_none)?;
        let mut rewrite = self.waiting.pop()?;
        let blocks = |count: u32| u64::from(count) * u64::from(unit.block_bytes);
        let most = if is_one_block_repeated(&rewrite, unit) {
            blocks(unit.limits.write_same_blocks)
        } else {
            blocks(unit.limits.transfer_blocks).min(ZEROS_BYTES as u64)
        };
        self.waiting.extend(rewrite.split_off(most));
        let command = self.command(&rewrite, place, unit);
        if let Some(slot) = self.under_way.get_mut(place) {
            *slot = Some(rewrite);
        }
        Some(command)
    }

    fn command(&self, rewrite: &Rewrite, place: usize, unit: &Unit) -> Command {
        let range = unit.blocks(rewrite.offset_bytes, rewrite.len_bytes);
        let bytes = rewrite.bytes.as_ref().unwrap_or(&self.zeros);
        let (cdb, len_bytes) = if is_one_block_repeated(rewrite, unit) {
            // A unit that was freed there does not fill up.
            let space = match unit.limits.write_same_unmaps {
                true => Space::MayBeFreed,
                false => Space::Stays,
            };
            (cdb::write_same(range, space), unit.block_bytes.into())
        } else {
            (cdb::write(range, Durability::Cached), rewrite.len_bytes)
        };
        let len = usize::try_from(len_bytes).expect("a rewrite is short");
        let memory = bytes.get(..len).expect("a rewrite is no longer than its bytes");
        Command {
            cdb,
            transfer: Transfer::Out,
            // Kept until the command has ended.
            segments: vec![segments::only_sent(memory)],
            cookie: REWRITE | place as u64,
        }
    }
}

/// Whether it is zeros, and the unit writes a block of them as often as it is told to.
fn is_one_block_repeated(rewrite: &Rewrite, unit: &Unit) -> bool {
    rewrite.bytes.is_none() && unit.limits.write_same_blocks > 0
}

impl Disk {
    /// Sends rewrites as long as there is room, and serves when all are done.
    pub(super) fn rewrite(&mut self) {
        let (State::Rewriting, Some(rewriting)) = (&self.state, &mut self.rewriting) else {
            return;
        };
        while let Some(command) = rewriting.next_command(&self.unit) {
            self.initiator.start(command);
        }
        if rewriting.is_over() {
            self.rewriting = None;
            self.state = State::Serving;
            if self.unit.cache() == Cache::None {
                // It had one when they were acknowledged.
                self.retained.covered(self.retained.now());
            }
        }
    }

    pub(super) fn rewritten(&mut self, ended: &Ended, io: &mut dyn Submit) {
        let (State::Rewriting, Some(rewriting)) = (&self.state, &mut self.rewriting) else {
            return;
        };
        let place = usize::try_from(ended.command.cookie & !REWRITE).expect("it is a place");
        let rewrite = rewriting.under_way.get_mut(place).and_then(Option::take);
        match verdict(ended.status, ended.sense) {
            Verdict::Good => {}
            // The others that are under way are not answered any more.
            Verdict::Retry(Attention::Reset | Attention::Cleared | Attention::Identity) => {
                return self.doubt("the unit was reset, which forgets what it was doing", io);
            }
            Verdict::Retry(Attention::Parameters) if rewriting.retries < RETRIES_MAX => {
                self.unit.has_other_parameters();
                rewriting.retries += 1;
                rewriting.waiting.extend(rewrite);
            }
            Verdict::Retry(_)
            | Verdict::BusyLater
            | Verdict::CapacityChanged
            | Verdict::ReservationChanged
                if rewriting.retries < RETRIES_MAX =>
            {
                rewriting.retries += 1;
                rewriting.waiting.extend(rewrite);
            }
            // It cannot do what it said, and the same is done in another way.
            Verdict::Failed(Failure::Unsupported) if cdb::is_write_same(&ended.command.cdb) => {
                self.unit.limits.write_same_blocks = 0;
                rewriting.waiting.extend(rewrite);
            }
            // Whatever it is: nothing is served before all that was acknowledged is there.
            _ => return self.doubt("what it had acknowledged cannot be written again", io),
        }
        self.rewrite();
    }
}
