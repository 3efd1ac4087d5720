//! Token buckets with the meaning of Firecracker's rate limiter, on a clock that the caller brings.
//!
//! A bucket holds `size` tokens and refills at `size` per `refill_time`. It starts full. A
//! `one_time_burst` is spent before anything else and never comes back. A request that is larger
//! than the whole bucket is admitted and leaves a debt, which later requests wait for.
//!
//! There are two ways to ask. [`RateLimiter::admit`] takes tokens when they are there, or none. A
//! [`RateLimiter::reserve`] takes them in any case, and says when they will be there: several who
//! reserve are served in the order in which they asked.

mod shared;

use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use shared::SharedLimiter;

/// Limits of a device on bytes and on operations; each is optional and independent of the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Token bucket with bytes as tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Token bucket with operations as tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

/// One token bucket; a `size` or a `refill_time` of zero means no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// The total number of tokens this bucket can hold.
    pub size: u64,
    /// Extra tokens for the start, which do not come back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// The number of milliseconds it takes for the bucket to refill.
    pub refill_time: u64,
}

/// Limits bytes and operations together: a request passes when both buckets have its tokens.
#[derive(Clone, Debug, Default)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// A limiter whose buckets are full at `now`.
    pub fn new(config: &RateLimiterConfig, now: Instant) -> Self {
        let bucket = |config: &TokenBucketConfig| TokenBucket::new(config, now);
        Self {
            bandwidth: config.bandwidth.as_ref().and_then(bucket),
            ops: config.ops.as_ref().and_then(bucket),
        }
    }

    /// Replaces the buckets that `config` names by new, full ones; the others stay as they are.
    pub fn update(&mut self, config: &RateLimiterConfig, now: Instant) {
        if let Some(bandwidth) = &config.bandwidth {
            self.bandwidth = TokenBucket::new(bandwidth, now);
        }
        if let Some(ops) = &config.ops {
            self.ops = TokenBucket::new(ops, now);
        }
    }

    /// Whether there is any limit: if not, the caller need not look at a clock.
    pub fn is_limiting(&self) -> bool {
        self.bandwidth.is_some() || self.ops.is_some()
    }

    /// Takes the tokens of one operation of `bytes` bytes, from both buckets or from none.
    ///
    /// # Errors
    ///
    /// The time from which on the same request will pass, if nothing else is admitted before.
    pub fn admit(&mut self, bytes: u64, now: Instant) -> Result<(), Instant> {
        let ready_at = self.ready_at(bytes, now);
        if ready_at > now {
            return Err(ready_at);
        }
        self.take(bytes);
        Ok(())
    }

    /// Takes the tokens of one operation of `bytes` bytes from both buckets, and says from when on it
    /// may start: not before `now`.
    pub fn reserve(&mut self, bytes: u64, now: Instant) -> Instant {
        let ready_at = self.ready_at(bytes, now);
        self.take(bytes);
        ready_at
    }

    /// Gives back what [`Self::reserve`] took at the time `reserved` for an operation that does not start after all. A
    /// bucket that has replaced the one that was paid takes nothing: others have paid it by now.
    pub fn refund(&mut self, bytes: u64, reserved: Instant) {
        let paid = |bucket: &&mut TokenBucket| bucket.made <= reserved;
        if let Some(bucket) = self.bandwidth.as_mut().filter(paid) {
            bucket.give_back(bytes);
        }
        if let Some(bucket) = self.ops.as_mut().filter(paid) {
            bucket.give_back(1);
        }
    }

    /// From when on one operation of `bytes` bytes would pass, if nothing else did before; takes nothing.
    pub fn ready_at(&mut self, bytes: u64, now: Instant) -> Instant {
        let bandwidth_at = self
            .bandwidth
            .as_mut()
            .map_or(now, |bucket| bucket.ready_at(bytes, now));
        let ops_at = self.ops.as_mut().map_or(now, |bucket| bucket.ready_at(1, now));
        bandwidth_at.max(ops_at)
    }

    fn take(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.take(1);
        }
    }
}

/// One bucket. Its level is kept in units of one token per refill time in nanoseconds, so that a
/// nanosecond adds exactly `size` units and nothing is ever rounded away.
#[derive(Clone, Debug)]
struct TokenBucket {
    size: u64,
    refill_ns: u64,
    burst: u64,
    level_units: i128,
    made: Instant,
    updated: Instant,
}

/// Largest bucket, in tokens, and longest refill time, in nanoseconds (146 years): their product
/// stays within an `i128`, and debts saturate.
const TOKENS_MAX: u64 = 1 << 62;
const REFILL_NS_MAX: u64 = 1 << 62;

impl TokenBucket {
    /// A full bucket; `None` if `config` sets no limit.
    fn new(config: &TokenBucketConfig, now: Instant) -> Option<Self> {
        if config.size == 0 || config.refill_time == 0 {
            return None;
        }
        let size = config.size.min(TOKENS_MAX);
        let refill_ns = config.refill_time.saturating_mul(1_000_000).min(REFILL_NS_MAX);
        Some(Self {
            size,
            refill_ns,
            burst: config.one_time_burst.unwrap_or(0),
            level_units: i128::from(size) * i128::from(refill_ns),
            made: now,
            updated: now,
        })
    }

    /// Refills up to `now` and says from when on `tokens` may be taken; `now` if at once.
    fn ready_at(&mut self, tokens: u64, now: Instant) -> Instant {
        self.refill(now);
        // A request beyond the size of the bucket can never be paid in advance: it waits only for
        // old debts, and leaves its own.
        let wanted = self.beyond_burst(tokens);
        let in_advance = if wanted > self.size { 0 } else { wanted };
        let missing_units = self.units(in_advance).saturating_sub(self.level_units);
        if missing_units <= 0 {
            return now;
        }
        let wait_ns = missing_units.unsigned_abs().div_ceil(u128::from(self.size));
        let wait = Duration::from_nanos(u64::try_from(wait_ns).unwrap_or(u64::MAX));
        now.checked_add(wait).unwrap_or(now + FOREVER)
    }

    /// Takes `tokens`; what is not there becomes a debt.
    fn take(&mut self, tokens: u64) {
        let from_level = self.beyond_burst(tokens);
        self.burst -= tokens.min(TOKENS_MAX) - from_level;
        self.level_units = self.level_units.saturating_sub(self.units(from_level));
    }

    /// Takes a [`Self::take`] back, except that a burst stays spent.
    fn give_back(&mut self, tokens: u64) {
        let full = self.units(self.size);
        let given = self.units(tokens.min(TOKENS_MAX));
        self.level_units = self.level_units.saturating_add(given).min(full);
    }

    fn beyond_burst(&self, tokens: u64) -> u64 {
        tokens.min(TOKENS_MAX).saturating_sub(self.burst)
    }

    fn units(&self, tokens: u64) -> i128 {
        i128::from(tokens) * i128::from(self.refill_ns)
    }

    fn refill(&mut self, now: Instant) {
        let elapsed_ns = now.saturating_duration_since(self.updated).as_nanos();
        let elapsed_ns = u64::try_from(elapsed_ns).unwrap_or(u64::MAX);
        let gained = i128::from(elapsed_ns) * i128::from(self.size);
        self.level_units = self.level_units.saturating_add(gained).min(self.units(self.size));
        self.updated = self.updated.max(now);
    }
}

/// A wait that no machine outlives; an `Instant` has room for it.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use proptest::prelude::*;

    use super::*;

    fn bucket(size: u64, one_time_burst: u64, refill_time: u64) -> TokenBucketConfig {
        TokenBucketConfig {
            size,
            one_time_burst: Some(one_time_burst),
            refill_time,
        }
    }

    fn bandwidth(config: TokenBucketConfig) -> RateLimiterConfig {
        RateLimiterConfig {
            bandwidth: Some(config),
            ops: None,
        }
    }

    /// Offers requests of `bytes` as fast as the limiter lets them pass, sleeping exactly as told.
    fn bytes_admitted(limiter: &mut RateLimiter, bytes: u64, start: Instant, run: Duration) -> u64 {
        let mut now = start;
        let mut admitted = 0;
        while now < start + run {
            match limiter.admit(bytes, now) {
                Ok(()) => admitted += bytes,
                Err(ready_at) => {
                    assert!(ready_at > now, "a refusal names a later time");
                    now = ready_at;
                }
            }
        }
        admitted
    }

    #[test]
    fn a_burst_is_spent_once_and_the_bucket_again_and_again() {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(&bandwidth(bucket(100, 50, 10)), start);
        assert_eq!(limiter.admit(150, start), Ok(()));
        assert_eq!(limiter.admit(100, start), Err(start + Duration::from_millis(10)));
        assert_eq!(limiter.admit(100, start + Duration::from_millis(10)), Ok(()));
        assert_eq!(limiter.admit(100, start + Duration::from_millis(30)), Ok(()));
        assert!(limiter.admit(1, start + Duration::from_millis(30)).is_err());
    }

    #[test]
    fn a_refused_request_takes_tokens_from_neither_bucket() {
        let start = Instant::now();
        let config = RateLimiterConfig {
            bandwidth: Some(bucket(1000, 0, 10)),
            ops: Some(bucket(1, 0, 10)),
        };
        let mut limiter = RateLimiter::new(&config, start);
        assert_eq!(limiter.admit(10, start), Ok(()));
        assert!(limiter.admit(10, start).is_err());
        let mut without_ops = limiter.clone();
        without_ops.update(
            &RateLimiterConfig {
                bandwidth: None,
                ops: Some(bucket(0, 0, 0)),
            },
            start,
        );
        assert_eq!(without_ops.admit(990, start), Ok(()));
    }

    #[test]
    fn a_request_larger_than_the_bucket_passes_and_is_paid_for_afterwards() {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(&bandwidth(bucket(100, 0, 10)), start);
        assert_eq!(limiter.admit(300, start), Ok(()));
        let next = limiter.admit(100, start).unwrap_err();
        assert_eq!(next, start + Duration::from_millis(30));
    }

    #[test]
    fn a_size_or_a_refill_time_of_zero_sets_no_limit() {
        let start = Instant::now();
        for config in [bucket(0, 5, 10), bucket(10, 5, 0)] {
            assert!(!RateLimiter::new(&bandwidth(config), start).is_limiting());
        }
    }

    #[test]
    fn an_update_replaces_only_the_buckets_it_names() {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(&bandwidth(bucket(10, 0, 10)), start);
        limiter.update(
            &RateLimiterConfig {
                bandwidth: None,
                ops: Some(bucket(1, 0, 10)),
            },
            start,
        );
        assert!(limiter.bandwidth.is_some() && limiter.ops.is_some());
        limiter.update(&bandwidth(bucket(0, 0, 0)), start);
        assert!(limiter.bandwidth.is_none() && limiter.ops.is_some());
    }

    proptest! {
        #[test]
        fn the_rate_is_met_within_one_percent_at_any_request_size(
            size in 4_096_u64..10_000_000,
            request in 512_u64..1_048_576,
        ) {
            let start = Instant::now();
            let refill_ms = 10;
            let run = Duration::from_secs(5);
            let mut limiter = RateLimiter::new(&bandwidth(bucket(size, 0, refill_ms)), start);
            let admitted = bytes_admitted(&mut limiter, request, start, run);
            // The bucket starts full, and the last request may reach beyond the end.
            let refilled = size * 5_000 / refill_ms;
            let expected = refilled + size;
            let error = admitted.abs_diff(expected).saturating_sub(request);
            prop_assert!(error * 100 < expected, "admitted {admitted}, expected {expected}");
        }

        #[test]
        fn no_configuration_overflows_or_refuses_for_ever(
            size: u64, burst: u64, refill_time: u64, tokens: [u64; 4], step_ns: u64,
        ) {
            let mut now = Instant::now();
            let mut limiter = RateLimiter::new(&bandwidth(bucket(size, burst, refill_time)), now);
            for tokens in tokens {
                if let Err(ready_at) = limiter.admit(tokens, now) {
                    prop_assert!(ready_at > now);
                }
                now += Duration::from_nanos(step_ns / 8);
            }
        }
    }
}
