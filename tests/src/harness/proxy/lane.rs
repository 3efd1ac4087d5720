//! One direction of one connection: the bytes on their way, and when they may pass.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::time::{Duration, Instant};

use super::Fault;

/// Bytes that wait; the first may pass at its time, and the others after it.
#[derive(Debug)]
pub(super) struct Lane {
    pieces: VecDeque<(Instant, Vec<u8>)>,
    /// The source has said that nothing more comes.
    pub(super) has_ended: bool,
    /// The destination was told so.
    pub(super) end_passed: bool,
    /// Nothing passes, whatever the fault is: the connection is stranded.
    pub(super) is_held: bool,
    /// The destination takes nothing at the moment.
    pub(super) lacks_room: bool,
    next_at: Instant,
}

/// What passing bytes on came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passed {
    /// All that may pass now has passed.
    All,
    /// The fault says that the connection is closed here.
    Close,
}

/// More than this is not taken from a source: its sender notices, as it would of a peer that doesn't read.
const QUEUED_BYTES_MAX: usize = 4 << 20;
/// A limited rate passes what is due in such a time at once.
const RATE_PERIODS_PER_SECOND: u64 = 100;

impl Lane {
    pub(super) fn new() -> Self {
        Self {
            pieces: VecDeque::new(),
            has_ended: false,
            end_passed: false,
            is_held: false,
            lacks_room: false,
            next_at: Instant::now(),
        }
    }

    /// How many bytes wait.
    pub(super) fn bytes(&self) -> usize {
        self.pieces.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// Whether its source should be read.
    pub(super) fn is_open(&self) -> bool {
        !self.has_ended && self.bytes() < QUEUED_BYTES_MAX
    }

    pub(super) fn clear(&mut self) {
        self.pieces.clear();
    }

    /// Takes bytes that may pass at this time.
    pub(super) fn push(&mut self, bytes: Vec<u8>, due: Instant) {
        // The order is kept: nothing overtakes.
        let last = self.pieces.back().map_or(due, |(last, _)| *last);
        if !bytes.is_empty() {
            self.pieces.push_back((due.max(last), bytes));
        }
    }

    /// When something may pass next, if time is all that it waits for.
    pub(super) fn due(&self, fault: Fault) -> Option<Instant> {
        let (due, _) = self.pieces.front()?;
        let waits_for_time = !self.is_held && !self.lacks_room && fault != Fault::BlackHole;
        let limited = matches!(fault, Fault::Rate { .. });
        waits_for_time.then(|| if limited { self.next_at.max(*due) } else { *due })
    }

    /// Whether the end of the stream may pass: nothing is before it.
    pub(super) fn end_is_due(&self, fault: Fault) -> bool {
        let may_pass = !self.is_held && fault != Fault::BlackHole;
        self.has_ended && !self.end_passed && may_pass && self.pieces.is_empty()
    }

    /// Writes what may pass now; counts down a fault that counts.
    pub(super) fn pass(&mut self, to: &mut impl Write, fault: &mut Fault) -> io::Result<Passed> {
        self.lacks_room = false;
        let now = Instant::now();
        while self.due(*fault).is_some_and(|due| due <= now) {
            let Some((_, bytes)) = self.pieces.front_mut() else {
                break;
            };
            if let (Fault::Corrupt { bytes: 0 }, Some(first)) = (*fault, bytes.first_mut()) {
                *first ^= 0xff;
                *fault = Fault::None;
            }
            let allowed = match *fault {
                Fault::CloseAfter { bytes: 0 } => return Ok(Passed::Close),
                Fault::CloseAfter { bytes } | Fault::Corrupt { bytes } => bytes,
                Fault::Rate { bytes_per_second } => (bytes_per_second / RATE_PERIODS_PER_SECOND).max(1),
                _ => u64::MAX,
            };
            let count = bytes.len().min(usize::try_from(allowed).unwrap_or(usize::MAX));
            let written = match to.write(bytes.get(..count).unwrap_or_default()) {
                Ok(written) => written,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.lacks_room = true;
                    break;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            bytes.drain(..written);
            if bytes.is_empty() {
                self.pieces.pop_front();
            }
            self.account(fault, u64::try_from(written).unwrap_or(u64::MAX), now);
            if *fault == (Fault::CloseAfter { bytes: 0 }) {
                return Ok(Passed::Close);
            }
        }
        Ok(Passed::All)
    }

    fn account(&mut self, fault: &mut Fault, written: u64, now: Instant) {
        match fault {
            Fault::CloseAfter { bytes } | Fault::Corrupt { bytes } => *bytes -= written,
            Fault::Rate { bytes_per_second } => {
                let micros = written.saturating_mul(1_000_000) / (*bytes_per_second).max(1);
                self.next_at = now + Duration::from_micros(micros);
            }
            Fault::None | Fault::BlackHole | Fault::Delay { .. } => {}
        }
    }
}
