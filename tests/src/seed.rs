//! Seeded choices: the same seed makes the same choices, on every machine.

use std::time::{SystemTime, UNIX_EPOCH};

/// A stream of numbers from one seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Seed(u64);

impl From<u64> for Seed {
    fn from(number: u64) -> Self {
        Self(number)
    }
}

impl Seed {
    /// The seed in the variable `SEED`, or one from the clock.
    pub fn from_environment() -> Self {
        let given = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| u64::from(d.subsec_nanos()))
        };
        Self(given.unwrap_or_else(clock))
    }

    /// The number to give as `SEED` to get the same stream.
    pub fn number(&self) -> u64 {
        self.0
    }

    /// The stream of one user of the seed: it does not depend on what other users drew.
    pub fn stream(&self, user: &str) -> Self {
        Self(
            user.bytes()
                .fold(self.0, |state, byte| Self(state ^ u64::from(byte)).draw()),
        )
    }

    /// The next number of the stream.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound
    }

    /// One of the items, of which there is at least one.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        let count = u64::try_from(items.len()).ok().filter(|count| *count > 0)?;
        items.get(usize::try_from(self.below(count)).ok()?)
    }

    /// Up to `count` different items in random order.
    pub fn sample<'a, T>(&mut self, items: &'a [T], count: usize) -> Vec<&'a T> {
        let mut keyed: Vec<(u64, &T)> = items.iter().map(|item| (self.draw(), item)).collect();
        keyed.sort_by_key(|(key, _)| *key);
        keyed.into_iter().take(count).map(|(_, item)| item).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_the_same_choices_again() {
        let all: Vec<u32> = (0..100).collect();
        let sample = |seed| {
            Seed(seed)
                .stream("a user")
                .sample(&all, 10)
                .into_iter()
                .copied()
                .collect::<Vec<_>>()
        };
        assert_eq!(sample(7), sample(7));
        assert_ne!(sample(7), sample(8));
    }
}
