//! For how long a worker looks at its rings by itself before it sleeps and asks for a kick.
//!
//! A kick costs the guest an exit, and the worker a wake-up; a look costs neither. So a worker that was woken soon
//! after it fell asleep looks longer the next time, and one that slept long looks shorter: an idle or
//! a slow guest soon costs nothing.
//!
//! ```text
//!   looking ──nothing for `window`──► asleep ──woken──► looking
//!      └── work: the window begins anew       slept less than WINDOW_MAX: window grows; more: it shrinks
//! ```

use std::time::{Duration, Instant};

/// The longest look: what a wake-up and a kick cost, a few times over. A guest that needs longer to its next
/// request than this does not notice the wake-up.
const WINDOW_MAX: Duration = Duration::from_micros(50);
/// The shortest that is worth it.
const WINDOW_MIN: Duration = Duration::from_micros(5);

/// The window of one worker.
#[derive(Debug, Default)]
pub(super) struct Polling {
    window: Duration,
    /// When the current look ends; `None` until there is nothing to do.
    until: Option<Instant>,
    asleep_since: Option<Instant>,
}

impl Polling {
    /// There was work: the next look has its whole window.
    pub(super) fn worked(&mut self) {
        self.until = None;
    }

    /// There is nothing to do at `now`: whether to look again instead of going to sleep.
    pub(super) fn looks_on(&mut self, now: Instant) -> bool {
        let until = *self.until.get_or_insert(now + self.window);
        now < until
    }

    /// The worker falls asleep.
    pub(super) fn sleeps(&mut self, now: Instant) {
        self.until = None;
        self.asleep_since = Some(now);
    }

    /// The worker may have been asleep; it is not at `now`.
    pub(super) fn woke(&mut self, now: Instant) {
        let Some(since) = self.asleep_since.take() else {
            return;
        };
        self.window = if now.saturating_duration_since(since) < WINDOW_MAX {
            (self.window * 2).clamp(WINDOW_MIN, WINDOW_MAX)
        } else if self.window > WINDOW_MIN {
            self.window / 2
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sleeps for `slept` and says how long the next look is, in steps of a microsecond.
    fn window_after(polling: &mut Polling, now: &mut Instant, slept: Duration) -> Duration {
        polling.sleeps(*now);
        *now += slept;
        polling.woke(*now);
        polling.worked();
        let begun = *now;
        while polling.looks_on(*now) {
            *now += Duration::from_micros(1);
        }
        *now - begun
    }

    #[test]
    fn short_sleeps_make_looks_longer_up_to_a_limit() {
        let (mut polling, mut now) = (Polling::default(), Instant::now());
        let mut last = Duration::ZERO;
        for _ in 0..10 {
            let window = window_after(&mut polling, &mut now, Duration::from_micros(10));
            assert!(window >= last && window <= WINDOW_MAX);
            last = window;
        }
        assert_eq!(last, WINDOW_MAX);
    }

    #[test]
    fn a_guest_that_is_idle_or_slow_soon_costs_nothing() {
        let (mut polling, mut now) = (Polling::default(), Instant::now());
        for _ in 0..10 {
            window_after(&mut polling, &mut now, Duration::from_micros(10));
        }
        for _ in 0..6 {
            window_after(&mut polling, &mut now, Duration::from_millis(1));
        }
        let window = window_after(&mut polling, &mut now, Duration::from_millis(1));
        assert_eq!(window, Duration::ZERO);
    }
}
