//! A limiter that several threads draw from: the queues of one disk, or the disks of one group.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{RateLimiter, RateLimiterConfig};

/// One limiter for many. Whoever reserves first goes first, so a disk with small requests cannot starve one with
/// large ones. Without a limit nobody takes the lock.
#[derive(Debug)]
pub struct SharedLimiter {
    is_limiting: AtomicBool,
    limiter: Mutex<RateLimiter>,
}

impl SharedLimiter {
    /// A limiter whose buckets are full at `now`.
    pub fn new(config: &RateLimiterConfig, now: Instant) -> Self {
        let limiter = RateLimiter::new(config, now);
        Self {
            is_limiting: AtomicBool::new(limiter.is_limiting()),
            limiter: Mutex::new(limiter),
        }
    }

    /// Takes the tokens of one operation of `bytes` bytes, and says from when on it may start: not before `now`.
    #[inline]
    pub fn reserve(&self, bytes: u64, now: Instant) -> Instant {
        // A change of the limits is seen soon, which is all that is promised.
        if !self.is_limiting() {
            return now;
        }
        self.locked().reserve(bytes, now)
    }

    /// Whether there is any limit: if not, the caller need not look at a clock.
    #[inline]
    pub fn is_limiting(&self) -> bool {
        self.is_limiting.load(Ordering::Relaxed)
    }

    /// As [`RateLimiter::admit`], for callers that wait with nothing taken: whoever asks first when there are tokens goes first.
    ///
    /// # Errors
    ///
    /// The time from which on the same request will pass, if nothing else is admitted before.
    #[inline]
    pub fn admit(&self, bytes: u64, now: Instant) -> Result<(), Instant> {
        if !self.is_limiting() {
            return Ok(());
        }
        self.locked().admit(bytes, now)
    }

    /// From when on one operation of `bytes` bytes would pass, if nothing else did before; takes nothing.
    pub fn ready_at(&self, bytes: u64, now: Instant) -> Instant {
        self.locked().ready_at(bytes, now)
    }

    /// Gives back what [`Self::reserve`] took at the time `reserved` for an operation that does not start after all.
    pub fn refund(&self, bytes: u64, reserved: Instant) {
        self.locked().refund(bytes, reserved);
    }

    /// Replaces the buckets that `config` names by new, full ones. What waits is for the caller to wake.
    pub fn update(&self, config: &RateLimiterConfig, now: Instant) {
        let mut limiter = self.locked();
        limiter.update(config, now);
        self.is_limiting.store(limiter.is_limiting(), Ordering::Relaxed);
    }

    /// A bucket is changed in steps that cannot panic, so one that a panic elsewhere left behind is whole.
    fn locked(&self) -> MutexGuard<'_, RateLimiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::limit::TokenBucketConfig;

    fn ops(size: u64, refill_time: u64) -> RateLimiterConfig {
        let ops = TokenBucketConfig {
            size,
            one_time_burst: None,
            refill_time,
        };
        RateLimiterConfig {
            bandwidth: None,
            ops: Some(ops),
        }
    }

    fn bandwidth(size: u64, refill_time: u64) -> RateLimiterConfig {
        RateLimiterConfig {
            bandwidth: ops(size, refill_time).ops,
            ops: None,
        }
    }

    #[test]
    fn whoever_reserves_first_goes_first() {
        let now = Instant::now();
        let limiter = SharedLimiter::new(&ops(1, 10), now);
        let starts: Vec<Instant> = (0..4).map(|_| limiter.reserve(1, now)).collect();
        let expected: Vec<Instant> = (0..4)
            .map(|turn| now + Duration::from_millis(10 * turn))
            .collect();
        assert_eq!(starts, expected);
    }

    #[test]
    fn small_requests_do_not_starve_a_large_one() {
        let now = Instant::now();
        let limiter = SharedLimiter::new(&bandwidth(1000, 10), now);
        limiter.reserve(1000, now);
        let large = limiter.reserve(1000, now);
        let small = limiter.reserve(1, now);
        assert_eq!(large, now + Duration::from_millis(10));
        assert!(small > large);
    }

    #[test]
    fn a_refund_lets_the_next_go_at_once() {
        let now = Instant::now();
        let limiter = SharedLimiter::new(&ops(1, 10), now);
        limiter.reserve(1, now);
        assert!(limiter.reserve(1, now) > now);
        limiter.refund(1, now);
        limiter.refund(1, now);
        assert_eq!(limiter.reserve(1, now), now);
    }

    #[test]
    fn who_is_not_admitted_has_taken_nothing() {
        let now = Instant::now();
        let limiter = SharedLimiter::new(&ops(1, 10), now);
        assert_eq!(limiter.admit(1, now), Ok(()));
        let soon = now + Duration::from_millis(10);
        for _ in 0..2 {
            assert_eq!(limiter.admit(1, now), Err(soon));
            assert_eq!(limiter.ready_at(1, now), soon);
        }
        assert_eq!(limiter.admit(1, soon), Ok(()));
        limiter.update(&ops(0, 0), soon);
        assert_eq!(limiter.admit(1, soon), Ok(()));
    }

    #[test]
    fn a_bucket_that_is_new_is_not_refunded_for_what_another_was_paid() {
        let paid = Instant::now();
        let limiter = SharedLimiter::new(&ops(1, 10), paid);
        for _ in 0..3 {
            limiter.reserve(1, paid);
        }
        let now = paid + Duration::from_millis(1);
        limiter.update(&ops(1, 100), now);
        // Each of three who wait asks again: the first is served at once, and the others in their turn.
        let starts = [0, 100, 200].map(|turn_ms| now + Duration::from_millis(turn_ms));
        for start in starts {
            limiter.refund(1, paid);
            assert_eq!(limiter.reserve(1, now), start);
        }
    }

    #[test]
    fn a_limit_can_be_set_and_lifted() {
        let now = Instant::now();
        let limiter = SharedLimiter::new(&RateLimiterConfig::default(), now);
        assert_eq!((limiter.reserve(1, now), limiter.reserve(1, now)), (now, now));
        limiter.update(&ops(1, 10), now);
        assert!(limiter.reserve(1, now).max(limiter.reserve(1, now)) > now);
        limiter.update(&ops(0, 0), now);
        assert_eq!(limiter.reserve(1, now), now);
    }
}
