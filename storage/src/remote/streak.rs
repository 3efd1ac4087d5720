//! Whether long reads follow each other so closely that their data are worth waiting for in one piece.

use std::time::{Duration, Instant};

/// The long reads of a session, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Streak {
    /// When the last of them ended.
    last: Option<Instant>,
    /// It followed the one before it so soon that the next is expected to.
    goes_on: bool,
}

/// So soon a long read has to follow the last for its data to be waited for in one piece. And so long something else that
/// comes instead, an error, waits unseen at most.
pub(crate) const TRUST_MAX: Duration = Duration::from_millis(1);

impl Streak {
    /// A long read has ended, with all that it asked for or not.
    pub(crate) fn ended(&mut self, is_whole: bool, now: Instant) {
        let last = self.last.replace(now);
        let follows = last.is_some_and(|last| now - last <= TRUST_MAX);
        self.goes_on = follows && is_whole;
    }

    /// The next did not come as expected.
    pub(crate) fn broke_off(&mut self) {
        self.goes_on = false;
    }

    /// Whether the next is expected to follow.
    pub(crate) fn goes_on(&self) -> bool {
        self.goes_on
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_follows_soon_and_whole_is_a_streak() {
        let start = Instant::now();
        let mut streak = Streak::default();
        streak.ended(true, start);
        assert!(!streak.goes_on());
        streak.ended(true, start + TRUST_MAX);
        assert!(streak.goes_on());
        streak.ended(false, start + TRUST_MAX);
        assert!(!streak.goes_on());
        streak.ended(true, start + TRUST_MAX);
        assert!(streak.goes_on());
        streak.ended(true, start + TRUST_MAX * 3);
        assert!(!streak.goes_on());
    }
}
