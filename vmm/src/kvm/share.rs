//! How much of the time the vCPUs of a machine may run.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A share in thousandths, which all vCPUs of a machine look at when they are nudged.
#[derive(Debug)]
pub struct Share(AtomicU32);

/// All of the time.
pub const FULL: u32 = 1000;
/// A guest that never ran would notice nothing, and get nowhere.
pub const LEAST: u32 = 20;

/// A nudge that is later than that was not meant for the time before it.
const LATE_PERIODS_MAX: u32 = 4;

impl Default for Share {
    fn default() -> Self {
        Self(AtomicU32::new(FULL))
    }
}

impl Share {
    /// Has the vCPUs run for so many thousandths of the time.
    pub fn set(&self, permille: u32) {
        self.0.store(permille.clamp(LEAST, FULL), Ordering::Relaxed);
    }

    /// How often vCPUs are to be nudged so that they keep to it, if they do not run all of the time.
    pub fn period(&self) -> Option<Duration> {
        let permille = self.0.load(Ordering::Relaxed);
        let period = Duration::from_micros(10 * u64::from(permille)).max(Duration::from_millis(1));
        (permille < FULL).then_some(period)
    }

    /// How long a vCPU has to rest that has run since the last nudge, for so long as it `ran`. What it ran before there was one
    /// does not count.
    pub fn rest_after(&self, ran: Duration) -> Duration {
        let Some(period) = self.period() else {
            return Duration::ZERO;
        };
        let permille = self.0.load(Ordering::Relaxed);
        ran.min(period * LATE_PERIODS_MAX) * (FULL - permille) / permille
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_kept_to_by_rests() {
        let share = Share::default();
        assert_eq!(share.period(), None);
        assert_eq!(share.rest_after(Duration::from_secs(1)), Duration::ZERO);
        for permille in [900, 500, 100, 20, 0] {
            share.set(permille);
            let ran = share.period().unwrap_or_default();
            let rest = share.rest_after(ran);
            let runs = ran.as_secs_f64() / (ran + rest).as_secs_f64();
            let wanted = f64::from(permille.max(LEAST)) / 1000.0;
            assert!((runs - wanted).abs() < 0.001, "{permille}: {runs}");
        }
        share.set(FULL);
        assert_eq!(share.period(), None);
    }

    #[test]
    fn a_vcpu_that_ran_freely_for_long_is_not_made_to_stand_still_for_it() {
        let share = Share::default();
        share.set(100);
        assert!(share.rest_after(Duration::from_secs(100)) < Duration::from_millis(50));
    }
}
