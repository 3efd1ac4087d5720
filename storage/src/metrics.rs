//! What is counted where storage is used, to be read by anybody at any time.

use std::array;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows. One thread adds to it.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        // No other thread writes, so nothing is lost, and an ordinary store is many times cheaper than a
        // locked addition.
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(amount),
            Ordering::Relaxed,
        );
    }

    /// The count now.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that is as it is now. One thread sets it.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets the number.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The number now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How many kinds of durations a histogram tells apart.
pub const LATENCY_BUCKETS: usize = 24;
/// The shortest kind is below 2 to this power of microseconds; each of the others reaches twice as far, but for the last.
const FIRST_BOUND_SHIFT: usize = 4;

/// How many durations there were of each kind, by powers of two. One thread records.
#[derive(Debug, Default)]
pub struct LatencyHistogram {
    buckets: [Counter; LATENCY_BUCKETS],
    sum_us: Counter,
}

impl LatencyHistogram {
    /// Takes one duration in.
    pub fn record(&self, took: Duration) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bits = usize::try_from(u64::BITS - took_us.leading_zeros()).expect("there are 64");
        let at = bits.saturating_sub(FIRST_BOUND_SHIFT).min(LATENCY_BUCKETS - 1);
        if let Some(bucket) = self.buckets.get(at) {
            bucket.add(1);
        }
        self.sum_us.add(took_us);
    }

    /// How many there were of each kind: below [`Self::bound_us`], and not below that of the kind before.
    pub fn counts(&self) -> [u64; LATENCY_BUCKETS] {
        array::from_fn(|at| self.buckets.get(at).map_or(0, Counter::count))
    }

    /// All together, in microseconds.
    pub fn sum_us(&self) -> u64 {
        self.sum_us.count()
    }

    /// What durations of kind `at` are shorter than, in microseconds; `None` for the last kind, which is everything else.
    pub fn bound_us(at: usize) -> Option<u64> {
        (at < LATENCY_BUCKETS - 1).then(|| 1 << (FIRST_BOUND_SHIFT + at))
    }
}

/// How it stands with the lease of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum LeaseState {
    /// There is none: nothing is locked, or the image is only read.
    #[default]
    None = 0,
    /// It is being taken, or taken again after a connection was lost.
    Pending = 1,
    /// It is ours.
    Held = 2,
    /// It has become another's.
    Lost = 3,
}

/// What one session with a server counts. One thread, that of the disk, writes.
#[derive(Debug, Default)]
pub struct SessionMetrics {
    /// Connections that were made after the first.
    pub reconnects: Counter,
    /// Commands that were sent once more: after a lost connection, or because the server was busy.
    pub retries: Counter,
    /// Commands that the server has and has not answered.
    pub outstanding: Gauge,
    /// How long requests took, from the first time that they were sent to their end.
    pub latency: LatencyHistogram,
    /// How often the lease was taken, by whomever: the generation of its record.
    pub lease_epoch: Gauge,
    lease_state: AtomicU8,
}

impl SessionMetrics {
    /// Says how it stands with the lease.
    pub fn set_lease_state(&self, state: LeaseState) {
        self.lease_state.store(state as u8, Ordering::Relaxed);
    }

    /// How it stands with the lease: the number of a [`LeaseState`].
    pub fn lease_state(&self) -> u8 {
        self.lease_state.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_counted_by_the_power_of_two_that_it_lies_below() {
        let histogram = LatencyHistogram::default();
        for (us, at) in [
            (0, 0),
            (15, 0),
            (16, 1),
            (31, 1),
            (32, 2),
            (1 << 25, 22),
            (1 << 26, 23),
            (u64::MAX, 23),
        ] {
            let before = histogram.counts();
            histogram.record(Duration::from_micros(us));
            let after = histogram.counts();
            assert_eq!(after[at], before[at] + 1, "{us} us");
            assert!(LatencyHistogram::bound_us(at).is_none_or(|bound| us < bound));
            assert!(at == 0 || LatencyHistogram::bound_us(at - 1).is_some_and(|bound| us >= bound));
        }
        assert_eq!(histogram.counts().iter().sum::<u64>(), 8);
    }

    #[test]
    fn the_state_of_a_lease_is_told_by_its_number() {
        let session = SessionMetrics::default();
        assert_eq!(session.lease_state(), LeaseState::None as u8);
        session.set_lease_state(LeaseState::Lost);
        assert_eq!(session.lease_state(), 3);
    }
}
