//! One operation between its submission and its end.

use crate::reactor::{KernelOp, Token};
use crate::request::Durability;
use crate::sim::dice::Dice;
use crate::sim::file::Author;
use crate::sim::medium::{Horizon, Medium};
use crate::sim::reactor::memory::Memory;
use crate::sim::reactor::{Faults, Moment};

/// An operation that a simulated host is at work on.
///
/// ```text
///   submitted ──drawn──► some part of its bytes is done, then more … ──► all that it will do is done: it may end
/// ```
pub(super) struct Flight {
    pub(super) token: Token,
    pub(super) submitted: Moment,
    op: KernelOp,
    memory: Memory,
    author: Author,
    /// What had ended when it was submitted.
    horizon: Horizon,
    fate: Option<Fate>,
    done_bytes: u64,
}

/// How an operation will end.
#[derive(Clone, Copy)]
struct Fate {
    result: i32,
    /// How many of its bytes it transfers or changes before that.
    bytes: u64,
}

impl Flight {
    pub(super) fn new(op: KernelOp, token: Token, submitted: Moment, medium: &Medium) -> Self {
        let memory = match op {
            KernelOp::Read {
                segments,
                segment_count,
                ..
            }
            | KernelOp::Write {
                segments,
                segment_count,
                ..
            } => Memory::of(segments, segment_count),
            _ => Memory::none(),
        };
        Self {
            token,
            submitted,
            op,
            memory,
            horizon: medium.horizon(),
            author: medium.begin(),
            fate: None,
            done_bytes: 0,
        }
    }

    pub(super) fn is_sync(&self) -> bool {
        matches!(self.op, KernelOp::SyncData { .. })
    }

    /// Does a part of the work; says whether the operation may end now.
    pub(super) fn carry_on(
        &mut self,
        medium: &Medium,
        files: usize,
        faults: &Faults,
        dice: &mut Dice,
    ) -> bool {
        let Some(fate) = self.fate else {
            self.fate = Some(self.draw_fate(medium, files, faults, dice));
            return false;
        };
        let left_bytes = fate.bytes - self.done_bytes;
        if left_bytes == 0 {
            return true;
        }
        let part_bytes = match dice.below(4) {
            0 => 1 + dice.below(left_bytes),
            1 => left_bytes.min(SECTOR_BYTES),
            _ => left_bytes,
        };
        self.change(part_bytes, medium);
        self.done_bytes += part_bytes;
        false
    }

    /// The operation is over; its result.
    pub(super) fn end(&self, medium: &Medium) -> i32 {
        let fate = self.fate.expect("an operation ends after its fate was drawn");
        self.memory.check();
        match self.op {
            KernelOp::SyncData { file } if fate.result == 0 => medium.sync(file, &self.horizon),
            KernelOp::Write {
                file,
                offset_bytes,
                durability: Durability::Durable,
                ..
            } if fate.result > 0 => {
                let range = offset_bytes..offset_bytes + fate.bytes;
                medium.sync_write(file, &range, self.author, &self.horizon);
            }
            _ => {}
        }
        medium.end(self.author);
        fate.result
    }

    fn draw_fate(&self, medium: &Medium, files: usize, faults: &Faults, dice: &mut Dice) -> Fate {
        let nothing = |errno: i32| Fate {
            result: -errno,
            bytes: 0,
        };
        let file = self.op.file();
        let is_registered = usize::try_from(file.0).is_ok_and(|slot| slot < files);
        if !is_registered || !medium.has(file) {
            return nothing(libc::EBADF);
        }
        if let KernelOp::Allocate { mode, .. } = self.op
            && is_refused(mode, faults)
        {
            return nothing(libc::EOPNOTSUPP);
        }
        if dice.one_in(faults.interrupted_one_in) {
            return nothing(dice.pick(&[libc::EINTR, libc::EAGAIN]));
        }
        let possible_bytes = self.possible_bytes(medium);
        if dice.one_in(faults.failed_one_in) {
            let errno = match self.op {
                KernelOp::Read { .. } => libc::EIO,
                _ => dice.pick(&[libc::EIO, libc::ENOSPC]),
            };
            return Fate {
                result: -errno,
                bytes: dice.below(possible_bytes + 1),
            };
        }
        match self.op {
            KernelOp::Read { .. } | KernelOp::Write { .. } => {
                let is_short = possible_bytes > 1 && dice.one_in(faults.short_one_in);
                let bytes = match (is_short, dice.below(2)) {
                    (false, _) => possible_bytes,
                    (true, 0) => 1 + dice.below(possible_bytes - 1),
                    (true, _) => (1 + dice.below(possible_bytes - 1)).next_multiple_of(SECTOR_BYTES),
                };
                let bytes = bytes.min(possible_bytes);
                Fate {
                    result: i32::try_from(bytes).expect("a simulated transfer is small"),
                    bytes,
                }
            }
            KernelOp::SyncData { .. } | KernelOp::Allocate { .. } => Fate {
                result: 0,
                bytes: possible_bytes,
            },
            KernelOp::Socket { .. } => unreachable!("{NO_FLIGHT}"),
        }
    }

    /// How many bytes the operation transfers or changes if nothing goes wrong.
    fn possible_bytes(&self, medium: &Medium) -> u64 {
        let asked_bytes = self.op.transfer_bytes();
        match self.op {
            KernelOp::Read {
                file, offset_bytes, ..
            } => asked_bytes.min(medium.len_bytes(file).saturating_sub(offset_bytes)),
            KernelOp::Write { .. } => asked_bytes,
            KernelOp::SyncData { .. } => 0,
            KernelOp::Allocate { len_bytes, .. } => len_bytes,
            KernelOp::Socket { .. } => unreachable!("{NO_FLIGHT}"),
        }
    }

    /// Does the next `part_bytes` of the operation.
    fn change(&self, part_bytes: u64, medium: &Medium) {
        self.memory.check();
        match self.op {
            KernelOp::Read {
                file, offset_bytes, ..
            } => {
                let from = offset_bytes + self.done_bytes;
                self.memory
                    .scatter(index(self.done_bytes), &medium.read(file, from, part_bytes));
            }
            KernelOp::Write {
                file, offset_bytes, ..
            } => {
                let bytes = self.memory.gather(index(self.done_bytes), index(part_bytes));
                medium.change(file, |file| {
                    file.write(offset_bytes + self.done_bytes, &bytes, self.author);
                });
            }
            KernelOp::SyncData { .. } => {}
            KernelOp::Socket { .. } => unreachable!("{NO_FLIGHT}"),
            KernelOp::Allocate {
                file,
                mode,
                offset_bytes,
                len_bytes,
            } => {
                let from = offset_bytes + self.done_bytes;
                let is_last = self.done_bytes + part_bytes == len_bytes;
                medium.change(file, |file| {
                    // A file system makes a file longer once it has the blocks.
                    if is_last && mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
                        file.reach(offset_bytes + len_bytes, self.author);
                    }
                    if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
                        file.zero(from, part_bytes, self.author);
                    }
                });
            }
        }
    }
}

const NO_FLIGHT: &str = "operations on sockets are talks";

/// The unit in which most transfers are cut, in bytes.
const SECTOR_BYTES: u64 = 512;

fn is_refused(mode: i32, faults: &Faults) -> bool {
    (faults.refuses_holes && mode & libc::FALLOC_FL_PUNCH_HOLE != 0)
        || (faults.refuses_zeroing && mode & libc::FALLOC_FL_ZERO_RANGE != 0)
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}
