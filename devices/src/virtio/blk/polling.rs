//! For how long a worker looks at its rings by itself before it sleeps and asks for a kick.
//!
//! A kick costs the guest an exit, and the worker a wake-up; a look costs neither. So a worker whose next request came
//! soon after the last one looks longer the next time, and one that was idle for long looks shorter: an idle or
//! a slow guest soon costs nothing.
//!
//! ```text
//!   looking ──nothing for `window`──► asleep ──woken──► looking
//!      └── work: the window begins anew       idle less than WINDOW_MAX: window grows; more: it shrinks
//! ```

use std::time::{Duration, Instant};

/// The longest look: about what a kick and a wake-up cost. A guest that needs longer to its next request gains
/// little by it, and one that waits for interrupts always does.
const WINDOW_MAX: Duration = Duration::from_micros(20);
/// The shortest that is worth it.
const WINDOW_MIN: Duration = Duration::from_micros(5);

/// The window of one worker.
#[derive(Debug, Default)]
pub(super) struct Polling {
    window: Duration,
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
    is_asleep: bool,
}

impl Polling {
    /// There was work: the next look has its whole window.
    pub(super) fn worked(&mut self) {
        self.idle_since = None;
    }

    /// There is nothing to do at `now`: whether to look again instead of going to sleep.
    pub(super) fn looks_on(&mut self, now: Instant) -> bool {
        let since = *self.idle_since.get_or_insert(now);
        now.saturating_duration_since(since) < self.window
    }

    /// The worker falls asleep.
    pub(super) fn sleeps(&mut self, now: Instant) {
        self.idle_since.get_or_insert(now);
        self.is_asleep = true;
    }

    /// The worker may have been asleep; it is not at `now`.
    pub(super) fn woke(&mut self, now: Instant) {
        if !std::mem::take(&mut self.is_asleep) {
            return;
        }
        let Some(since) = self.idle_since.take() else {
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

    /// Is idle for `idle`, looking and then asleep, and says how long the next look is, in steps of a microsecond.
    fn window_after(polling: &mut Polling, now: &mut Instant, idle: Duration) -> Duration {
        polling.sleeps(*now);
        *now += idle;
        polling.woke(*now);
        polling.worked();
        let begun = *now;
        while polling.looks_on(*now) {
            *now += Duration::from_micros(1);
        }
        let window = *now - begun;
        polling.worked();
        window
    }

    #[test]
    fn short_pauses_make_looks_longer_up_to_a_limit() {
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
            window_after(&mut polling, &mut now, Duration::from_micros(60));
        }
        let window = window_after(&mut polling, &mut now, Duration::from_micros(60));
        assert_eq!(window, Duration::ZERO);
    }

    #[test]
    fn the_time_spent_looking_counts_as_idle() {
        let (mut polling, start) = (Polling::default(), Instant::now());
        polling.window = WINDOW_MAX;
        assert!(polling.looks_on(start));
        polling.sleeps(start + WINDOW_MAX);
        polling.woke(start + WINDOW_MAX + Duration::from_micros(1));
        assert_eq!(polling.window, WINDOW_MAX / 2);
    }
}
