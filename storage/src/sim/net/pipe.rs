//! One direction of a simulated connection.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Pieces on their way, in order.
#[derive(Debug)]
pub(super) struct Pipe {
    flying: VecDeque<(Instant, Piece)>,
    capacity_bytes: usize,
    /// Nothing arrives before.
    held_until: Option<Instant>,
    /// Nothing arrives at all.
    is_stuck: bool,
    /// The last piece was sent: nothing follows.
    is_ended: bool,
}

/// What arrives at once.
#[derive(Debug)]
pub(super) enum Piece {
    Bytes(Vec<u8>),
    /// The sender closed its end.
    End,
    /// The connection is no more.
    Reset,
}

impl Pipe {
    /// A pipe that takes so many bytes before somebody receives them.
    pub(super) fn new(capacity_bytes: usize) -> Self {
        Self {
            flying: VecDeque::new(),
            capacity_bytes,
            held_until: None,
            is_stuck: false,
            is_ended: false,
        }
    }

    /// How many bytes it takes before somebody receives them.
    pub(super) fn capacity_bytes(&self) -> usize {
        self.capacity_bytes
    }

    /// How many bytes may be sent, of which `unread_bytes` lie at the receiver's end.
    pub(super) fn room_bytes(&self, unread_bytes: usize) -> usize {
        let flying = self.flying.iter().map(|(_, piece)| match piece {
            Piece::Bytes(bytes) => bytes.len(),
            Piece::End | Piece::Reset => 0,
        });
        let taken_bytes = flying.sum::<usize>() + unread_bytes;
        self.capacity_bytes.saturating_sub(taken_bytes)
    }

    /// Sends a piece that arrives at `at`, or when everything before it has; in vain, if the last piece was sent.
    pub(super) fn push(&mut self, at: Instant, piece: Piece) {
        if self.is_ended {
            return;
        }
        self.is_ended = matches!(piece, Piece::End | Piece::Reset);
        let earliest = self.flying.back().map(|(at, _)| *at).max(self.held_until);
        self.flying
            .push_back((earliest.map_or(at, |earliest| at.max(earliest)), piece));
    }

    /// When the next piece arrives.
    pub(super) fn next(&self) -> Option<Instant> {
        let (at, _) = self.flying.front().filter(|_| !self.is_stuck)?;
        Some(*at)
    }

    /// The next piece, if it has arrived by `now`.
    pub(super) fn arrive(&mut self, now: Instant) -> Option<Piece> {
        self.next().filter(|at| *at <= now)?;
        let (_, piece) = self.flying.pop_front()?;
        Some(piece)
    }

    /// How many pieces are on their way.
    pub(super) fn len(&self) -> usize {
        self.flying.len()
    }

    pub(super) fn is_ended(&self) -> bool {
        self.is_ended
    }

    /// Loses all pieces but the first `kept`; others may be sent.
    pub(super) fn cut(&mut self, kept: usize) {
        self.flying.truncate(kept);
        self.is_ended = false;
    }

    /// Something follows on the end of what was sent.
    pub(super) fn reopen(&mut self) {
        self.is_ended = false;
    }

    /// Lets everything that is on its way arrive later.
    pub(super) fn delay(&mut self, time: Duration) {
        for (at, _) in &mut self.flying {
            *at += time;
        }
    }

    /// Holds everything back until then.
    pub(super) fn hold(&mut self, until: Instant) {
        self.held_until = self.held_until.max(Some(until));
        for (at, _) in &mut self.flying {
            *at = (*at).max(until);
        }
    }

    /// Nothing arrives any more.
    pub(super) fn stick(&mut self) {
        self.is_stuck = true;
    }

    /// What was sent is lost, but what is sent from now on arrives.
    pub(super) fn lose(&mut self) {
        self.is_stuck = false;
        self.held_until = None;
        self.cut(0);
    }
}
