//! How many answers of a server are worth waiting for together.
//!
//! A server that is asked for many things at a time answers one by one, and to be woken for each costs more than to take it in.

use std::time::{Duration, Instant};

use super::connection::ANYTHING_BYTES;

/// The answers of a session, as long as they follow each other closely.
#[derive(Debug)]
pub(crate) struct Streak {
    /// When answers were taken in last.
    last: Option<Instant>,
    /// How many have come since.
    answers: u32,
    /// One of them was not what was asked for.
    is_broken: bool,
    /// How long each takes after the one before it; nothing is expected without that.
    pace: Option<Duration>,
    /// How many answers of the least length are expected.
    expected: usize,
}

/// So soon an answer has to follow the last for the next to be waited for in one piece, or with others. And so long something
/// else that comes instead, an error, waits unseen at most.
pub(crate) const TRUST_MAX: Duration = Duration::from_millis(1);

/// So long an answer waits for those that come with it, as things go.
const WAIT: Duration = Duration::from_micros(250);
/// Of those under way, one in so many is waited for: the server is to have enough left to do.
const SHARE: usize = 3;
const BATCH_MAX: usize = 8;
/// An answer that is shorter comes in one piece.
const PIECE_BYTES: usize = 16 << 10;

impl Default for Streak {
    fn default() -> Self {
        Self {
            last: None,
            answers: 0,
            is_broken: false,
            pace: None,
            expected: 1,
        }
    }
}

impl Streak {
    /// An answer has come, with all that was asked for or not.
    pub(crate) fn answered(&mut self, is_whole: bool) {
        self.answers += 1;
        self.is_broken |= !is_whole;
    }

    /// All that has come is taken in.
    pub(crate) fn taken_in(&mut self, now: Instant) {
        if self.answers == 0 {
            return;
        }
        let since = self.last.replace(now).map(|last| now - last);
        let pace = since.map(|since| since / self.answers);
        self.pace = match (pace, self.pace) {
            _ if self.is_broken => None,
            (Some(now), Some(before)) => Some((before * 3 + now) / 4),
            (now, _) => now,
        };
        self.pace = self
            .pace
            .filter(|pace| *pace <= TRUST_MAX && since <= Some(TRUST_MAX));
        (self.answers, self.is_broken) = (0, false);
    }

    /// The next did not come as expected.
    pub(crate) fn broke_off(&mut self) {
        self.pace = None;
    }

    /// Whether the next is expected to follow.
    pub(crate) fn goes_on(&self) -> bool {
        self.pace.is_some()
    }

    /// How much comes at least, and soon: `under_way` answers are, and the shortest of them has `least_bytes`. Counted from the
    /// beginning of the one that comes.
    pub(crate) fn expects(&mut self, under_way: usize, least_bytes: usize) -> usize {
        let batch = self.batch(under_way);
        // The one that comes has begun to, perhaps: then as many follow behind it, and the mark stays where it is.
        self.expected = if batch > 1 { batch + 1 } else { 1 };
        if self.goes_on() {
            self.expects_at_most(least_bytes)
        } else {
            ANYTHING_BYTES
        }
    }

    /// The same when an answer more is under way, of so many bytes: no more than that comes.
    pub(crate) fn expects_at_most(&self, answer_bytes: usize) -> usize {
        if self.expected > 1 || answer_bytes >= PIECE_BYTES {
            self.expected * answer_bytes
        } else {
            ANYTHING_BYTES
        }
    }

    /// How many answers are waited for. A power of two, so that it seldom changes.
    fn batch(&self, under_way: usize) -> usize {
        let Some(pace) = self.pace else { return 0 };
        let soon = WAIT.as_nanos() / pace.as_nanos().max(1);
        let soon = usize::try_from(soon).unwrap_or(usize::MAX);
        let most = (under_way / SHARE).min(soon).min(BATCH_MAX);
        most.checked_ilog2().map_or(1, |log| 1 << log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: usize = 128 << 10;
    const SHORT: usize = 4 << 10;

    /// A streak in which an answer took `pace` after the other.
    fn at(pace: Duration) -> Streak {
        let mut streak = Streak::default();
        let mut now = Instant::now();
        for _ in 0..3 {
            streak.answered(true);
            streak.taken_in(now);
            now += pace;
        }
        streak
    }

    #[test]
    fn only_what_follows_soon_and_whole_is_a_streak() {
        let start = Instant::now();
        let mut streak = Streak::default();
        let mut goes_on = |is_whole, after| {
            streak.answered(is_whole);
            streak.taken_in(start + after);
            streak.goes_on()
        };
        assert!(!goes_on(true, Duration::ZERO));
        assert!(goes_on(true, TRUST_MAX));
        assert!(!goes_on(false, TRUST_MAX));
        assert!(goes_on(true, TRUST_MAX));
        assert!(!goes_on(true, TRUST_MAX * 3));
        streak.broke_off();
        assert!(!streak.goes_on());
    }

    #[test]
    fn one_answer_is_waited_for_if_it_is_long_and_more_if_they_come_soon() {
        let mut streak = at(Duration::from_micros(20));
        assert_eq!(streak.expects(1, SHORT), ANYTHING_BYTES);
        assert_eq!(streak.expects(1, LONG), LONG);
        assert_eq!(streak.expects(5, LONG), LONG);
        assert_eq!(streak.expects(6, LONG), 3 * LONG);
        assert_eq!(streak.expects(24, SHORT), 9 * SHORT);
        assert_eq!(streak.expects_at_most(100), 900);
        assert_eq!(streak.expects(200, SHORT), 9 * SHORT);
        // A slow server has each answer taken in as it comes.
        let mut streak = at(Duration::from_micros(200));
        assert_eq!(streak.expects(24, SHORT), ANYTHING_BYTES);
        assert_eq!(streak.expects(24, LONG), LONG);
        assert_eq!(streak.expects_at_most(SHORT), ANYTHING_BYTES);
        assert_eq!(Streak::default().expects(24, LONG), ANYTHING_BYTES);
    }
}
