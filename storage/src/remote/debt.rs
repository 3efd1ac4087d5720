//! What a server owes a procedure, and how long it may.

use std::time::{Duration, Instant};

/// A connection, or an answer, that a server owes. What a session is owed is its own concern.
#[derive(Debug)]
pub(crate) struct Debt {
    since: Option<Instant>,
    /// How long the server may owe it.
    patience: Duration,
    /// How long it has taken at most, since the connection was asked for.
    paid_within: Duration,
}

/// A server that has answered quickly so far is taken for dead after so long.
const PATIENCE_MIN: Duration = Duration::from_secs(3);
const PATIENCE_MAX: Duration = Duration::from_secs(60);

impl Default for Debt {
    fn default() -> Self {
        Self {
            since: None,
            patience: PATIENCE_MIN,
            paid_within: Duration::ZERO,
        }
    }
}

impl Debt {
    /// A connection was asked for. It, and each answer on it, may take as long as `patience`.
    pub(crate) fn begin(&mut self, patience: Duration, now: Instant) {
        *self = Self {
            since: Some(now),
            patience,
            paid_within: Duration::ZERO,
        };
    }

    /// An answer was asked for.
    pub(crate) fn incur(&mut self, now: Instant) {
        self.since = Some(now);
    }

    /// The answer is there.
    pub(crate) fn pay(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.paid_within = self.paid_within.max(now - since);
        }
    }

    /// Nothing is owed any more, or it is nobody's concern.
    pub(crate) fn forgive(&mut self) {
        self.since = None;
    }

    /// When it is overdue.
    pub(crate) fn alarm(&self) -> Option<Instant> {
        self.since.map(|since| since + self.patience)
    }

    /// For how long the server has owed it, if that is too long; said once.
    pub(crate) fn overdue(&mut self, now: Instant) -> Option<Duration> {
        let patience = self.patience;
        let since = self.since.take_if(|since| *since + patience <= now)?;
        Some(now - since)
    }

    /// How long a sign of life may take of a server that has answered as this one has.
    pub(crate) fn patience_with_session(&self) -> Duration {
        (self.paid_within * 4).clamp(PATIENCE_MIN, PATIENCE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debt_is_overdue_once_and_what_was_paid_tells_how_long_to_wait() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut debt = Debt::default();
        assert_eq!((debt.alarm(), debt.overdue(start)), (None, None));
        debt.begin(second, start);
        assert_eq!(debt.alarm(), Some(start + second));
        debt.forgive();
        debt.incur(start);
        debt.pay(start + 2 * second);
        assert_eq!(debt.patience_with_session(), 8 * second);
        debt.incur(start);
        assert_eq!(debt.overdue(start), None);
        assert_eq!(debt.overdue(start + second), Some(second));
        assert_eq!(debt.overdue(start + second), None);
        debt.begin(second, start);
        assert_eq!(debt.patience_with_session(), PATIENCE_MIN);
    }
}
