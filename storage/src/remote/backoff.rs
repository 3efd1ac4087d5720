//! When the next connection is tried, and how long it may take.

use std::time::{Duration, Instant};

/// What the connections of an image have come to lately.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    /// Connections in a row that came to nothing, or not to much.
    failures: u32,
    /// Since when the image is served.
    served_since: Option<Instant>,
    /// Those of them on which the server was silent.
    silences: u32,
    /// Sessions in a row by which no request has ended.
    in_vain: u32,
    /// Which of the server's addresses is tried next.
    turn: usize,
}

/// Between two attempts. A server that comes back may break off one more attempt on the way, and is to be used within 2 s.
const REST_MIN: Duration = Duration::from_millis(50);
const REST_MAX: Duration = Duration::from_millis(500);
/// A session that lasted so long was a good one.
const SERVED_MIN: Duration = Duration::from_secs(1);
/// How long each answer may take while a session is begun. A server that was silent is given twice as long next time: it
/// may be behind a slow link, and a connection that waits is served as soon as a frozen target goes on.
const PATIENCE_MIN: Duration = Duration::from_secs(1);
const PATIENCE_MAX: Duration = Duration::from_secs(32);

impl Backoff {
    /// How long nothing is tried.
    pub(crate) fn rest(&self) -> Duration {
        // The first session that ends is followed at once.
        match self.failures + self.in_vain.saturating_sub(1) {
            0 => Duration::ZERO,
            failures => (REST_MIN * 2_u32.saturating_pow(failures - 1)).min(REST_MAX),
        }
    }

    /// How long each answer may take.
    pub(crate) fn patience(&self) -> Duration {
        (PATIENCE_MIN * 2_u32.saturating_pow(self.silences.saturating_sub(1))).min(PATIENCE_MAX)
    }

    /// A request has ended well.
    pub(crate) fn request_ended(&mut self) {
        self.in_vain = 0;
    }

    /// Which of `count` addresses is tried next.
    pub(crate) fn turn(&self, count: usize) -> usize {
        self.turn % count.max(1)
    }

    /// A session begins, or a way to one: in vain, until a request ends.
    pub(crate) fn begun(&mut self) {
        self.in_vain = self.in_vain.saturating_add(1);
    }

    /// The image is served.
    pub(crate) fn served(&mut self, now: Instant) {
        self.served_since = Some(now);
        self.silences = 0;
    }

    /// The connection is of no more use. If the image was served for a while, the next one is made at once: what breaks each
    /// connection soon after its login would keep both ends busy otherwise.
    pub(crate) fn ended(&mut self, was_silent: bool, now: Instant) {
        match self.served_since.take() {
            Some(since) if now - since >= SERVED_MIN => self.failures = 0,
            _ => self.failed(was_silent),
        }
    }

    /// A connection has come to nothing.
    pub(crate) fn failed(&mut self, was_silent: bool) {
        self.failures = self.failures.saturating_add(1);
        self.turn = self.turn.wrapping_add(1);
        if was_silent {
            self.silences = self.silences.saturating_add(1);
        }
    }
}
