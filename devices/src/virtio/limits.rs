//! New limits on their way from whoever answers the API to the thread that keeps them.

use std::sync::{Mutex, PoisonError};

use coracle_storage::limit::RateLimiterConfig;

/// Limits that wait for a worker to take them up: one for each of its `N` limiters.
#[derive(Debug)]
pub(super) struct NewLimits<const N: usize>(Mutex<Option<[RateLimiterConfig; N]>>);

impl<const N: usize> Default for NewLimits<N> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<const N: usize> NewLimits<N> {
    /// Leaves limits; those that are there already are changed by them, bucket by bucket.
    pub(super) fn leave(&self, new: [RateLimiterConfig; N]) {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = left.unwrap_or([RateLimiterConfig::default(); N]);
        for (old, new) in all.iter_mut().zip(new) {
            old.bandwidth = new.bandwidth.or(old.bandwidth);
            old.ops = new.ops.or(old.ops);
        }
        *left = Some(all);
    }

    /// What was left since the last time.
    pub(super) fn take(&self) -> Option<[RateLimiterConfig; N]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
