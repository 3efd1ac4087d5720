//! A histogram of ticks with a bounded relative error, in fixed memory.

use crate::width::size;

/// Buckets per power of two: a percentile is at most 1/32 too high.
const SLICES: usize = 32;
const SLICE_BITS: u32 = SLICES.trailing_zeros();
/// Values below `SLICES` have a bucket each; every power of two above has `SLICES`.
const BUCKETS: usize = SLICES * (64 - SLICE_BITS as usize + 1);

/// Counts of values, by size.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    max: u64,
    min: u64,
}

impl Histogram {
    /// A histogram of nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            buckets: [0; BUCKETS],
            count: 0,
            max: 0,
            min: u64::MAX,
        }
    }

    /// Counts one value.
    pub fn record(&mut self, value: u64) {
        if let Some(bucket) = self.buckets.get_mut(bucket_of(value)) {
            *bucket += 1;
        }
        self.count += 1;
        self.max = self.max.max(value);
        self.min = self.min.min(value);
    }

    /// Counts what `other` counted.
    pub fn add(&mut self, other: &Self) {
        for (bucket, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *bucket += more;
        }
        self.count += other.count;
        self.max = self.max.max(other.max);
        self.min = self.min.min(other.min);
    }

    /// How many values were counted.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The largest value; 0 when there is none.
    #[must_use]
    pub const fn max(&self) -> u64 {
        self.max
    }

    /// The smallest value; 0 when there is none.
    #[must_use]
    pub const fn min(&self) -> u64 {
        if self.count == 0 { 0 } else { self.min }
    }

    /// The value that `per_mille` of all values do not exceed: exact below 32, at most 1/32 too high above.
    #[must_use]
    pub fn percentile(&self, per_mille: u64) -> u64 {
        let wanted = (u128::from(self.count) * u128::from(per_mille)).div_ceil(1000);
        let mut seen = 0u128;
        for (index, &bucket) in self.buckets.iter().enumerate() {
            seen += u128::from(bucket);
            if bucket > 0 && seen >= wanted {
                return upper_bound(index).min(self.max);
            }
        }
        self.max
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

/// The bucket of `value`.
fn bucket_of(value: u64) -> usize {
    let exponent = u64::BITS - 1 - (value | 1).leading_zeros();
    if exponent < SLICE_BITS {
        return size(value);
    }
    let shift = exponent - SLICE_BITS;
    let slice = size(value >> shift) - SLICES;
    (shift as usize + 1) * SLICES + slice
}

/// The largest value of a bucket.
fn upper_bound(index: usize) -> u64 {
    if index < SLICES {
        return index as u64;
    }
    let shift = index / SLICES - 1;
    let slice = (index % SLICES + SLICES) as u64;
    (slice << shift) + ((1u64 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn every_value_lies_in_a_bucket_whose_bound_is_less_than_a_thirty_second_above() {
        let mut random = Random::new(3);
        for _ in 0..100_000 {
            let bits = u32::try_from(random.below(64)).expect("below 64");
            let value = random.next() >> bits;
            let index = bucket_of(value);
            assert!(index < BUCKETS, "{value} has no bucket");
            let bound = upper_bound(index);
            assert!(
                bound >= value && bound - value <= value / 32,
                "{value} has the bound {bound}"
            );
        }
        assert_eq!(upper_bound(bucket_of(u64::MAX)), u64::MAX);
    }

    #[test]
    fn percentiles_of_a_straight_line_are_where_they_should_be() {
        let mut histogram = Histogram::new();
        for value in 1..=100_000u64 {
            histogram.record(value);
        }
        for (per_mille, exact) in [(500, 50_000u64), (900, 90_000), (990, 99_000), (999, 99_900)] {
            let found = histogram.percentile(per_mille);
            assert!(
                found >= exact && found <= exact + exact / 32,
                "{per_mille}: {found}"
            );
        }
        assert_eq!(histogram.percentile(1000), 100_000);
        assert_eq!(
            (histogram.min(), histogram.max(), histogram.count()),
            (1, 100_000, 100_000)
        );
    }

    #[test]
    fn nothing_counted_is_zero_everywhere() {
        let histogram = Histogram::new();
        assert_eq!(
            (histogram.min(), histogram.max(), histogram.percentile(500)),
            (0, 0, 0)
        );
    }

    #[test]
    fn two_histograms_add_up() {
        let (mut one, mut two) = (Histogram::new(), Histogram::new());
        one.record(10);
        two.record(1_000_000);
        one.add(&two);
        assert_eq!((one.count(), one.min(), one.max()), (2, 10, 1_000_000));
        assert_eq!(one.percentile(500), 10);
    }
}
