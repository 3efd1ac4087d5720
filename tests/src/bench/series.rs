//! The same figure of several runs: its median, and how far the runs are apart.

use serde_json::{Value, json};

/// One figure, an entry for each run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series(Vec<f64>);

impl Series {
    /// Adds a run.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The middle run, the upper one of two; not a number when there was none.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// The value that so many percent of the runs do not exceed; not a number when there was none.
    pub fn percentile(&self, percent: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let share = (1..=sorted.len()).zip(&sorted);
        let is_reached = |(rank, _): &(usize, &f64)| *rank as f64 * 100.0 >= percent * self.0.len() as f64;
        share
            .into_iter()
            .find(is_reached)
            .map_or(f64::NAN, |(_, value)| *value)
    }

    /// The largest value; not a number when there was none.
    pub fn highest(&self) -> f64 {
        self.percentile(100.0)
    }

    /// The noise: half the distance between the extremes, in percent of the median.
    pub fn spread_percent(&self) -> f64 {
        let highest = self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lowest = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let median = self.median();
        if median == 0.0 {
            return 0.0;
        }
        50.0 * (highest - lowest) / median
    }

    /// Median, noise and every run, rounded to thousandths.
    pub fn report(&self) -> Value {
        let runs: Vec<f64> = self.0.iter().copied().map(thousandths).collect();
        json!({
            "median": thousandths(self.median()),
            "spread_percent": thousandths(self.spread_percent()),
            "runs": runs,
        })
    }
}

fn thousandths(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_run_and_the_spread_half_the_distance_of_the_extremes() {
        let mut series = Series::default();
        for value in [110.0, 90.0, 100.0] {
            series.push(value);
        }
        assert_eq!((series.median(), series.spread_percent()), (100.0, 10.0));
    }

    #[test]
    fn a_percentile_is_the_least_value_that_so_many_do_not_exceed() {
        let mut series = Series::default();
        assert!(series.highest().is_nan());
        (1..=200).rev().for_each(|value| series.push(f64::from(value)));
        assert_eq!(series.percentile(99.0), 198.0);
        assert_eq!(series.percentile(0.1), 1.0);
        assert_eq!(series.highest(), 200.0);
    }
}
