//! What the block device counts, with the names of Firecracker's block metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_storage::metrics::Counter;

/// Counts of one worker since its disk was made; each is written by one thread, and read by anybody.
#[derive(Debug, Default)]
pub struct BlkMetrics {
    /// Bytes read by completed reads.
    pub read_bytes: Counter,
    /// Bytes written by completed writes.
    pub write_bytes: Counter,
    /// Completed reads.
    pub read_count: Counter,
    /// Completed writes.
    pub write_count: Counter,
    /// Completed flushes.
    pub flush_count: Counter,
    /// Completed discards and write-zeroes.
    pub discard_count: Counter,
    /// Requests answered with an error.
    pub invalid_reqs_count: Counter,
    /// Chains that are no request: given back without an answer.
    pub execute_fails: Counter,
    /// Rings that were given up because they make no sense.
    pub event_fails: Counter,
    /// Kicks of the guest that woke the worker.
    pub queue_event_count: Counter,
    /// Requests that had to wait for the rate limiter.
    pub rate_limiter_throttled_events: Counter,
    /// Times that the rate limiter's timer let requests go on.
    pub rate_limiter_event_count: Counter,
    /// Requests that had to wait for room in the reactor.
    pub io_engine_throttled_events: Counter,
    /// Images that were replaced.
    pub update_count: Counter,
    /// Images that could not be replaced.
    pub update_fails: Counter,
    /// How long completed reads took.
    pub read_agg: LatencyAggregate,
    /// How long completed writes took.
    pub write_agg: LatencyAggregate,
}

/// The shortest, the longest and the sum of many durations, in microseconds.
#[derive(Debug)]
pub struct LatencyAggregate {
    min_us: AtomicU64,
    max_us: AtomicU64,
    sum_us: Counter,
}

impl Default for LatencyAggregate {
    fn default() -> Self {
        Self {
            min_us: AtomicU64::new(u64::MAX),
            max_us: AtomicU64::new(0),
            sum_us: Counter::default(),
        }
    }
}

impl LatencyAggregate {
    /// Takes one duration in.
    pub fn record(&self, took: Duration) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if took_us < self.min_us.load(Ordering::Relaxed) {
            self.min_us.store(took_us, Ordering::Relaxed);
        }
        if took_us > self.max_us.load(Ordering::Relaxed) {
            self.max_us.store(took_us, Ordering::Relaxed);
        }
        self.sum_us.add(took_us);
    }

    /// The shortest, once there was one.
    pub fn min_us(&self) -> Option<u64> {
        match self.min_us.load(Ordering::Relaxed) {
            u64::MAX => None,
            min_us => Some(min_us),
        }
    }

    /// The longest.
    pub fn max_us(&self) -> u64 {
        self.max_us.load(Ordering::Relaxed)
    }

    /// The sum.
    pub fn sum_us(&self) -> u64 {
        self.sum_us.count()
    }
}
