//! TSC ticks and the time that they stand for.

/// A TSC of a known frequency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    khz: u64,
}

/// Frequencies outside are taken for a mistake: 100 MHz to 10 GHz.
pub const KHZ_MIN: u64 = 100_000;
/// See [`KHZ_MIN`].
pub const KHZ_MAX: u64 = 10_000_000;

impl Clock {
    /// A clock of `khz` kHz, if that is a frequency a TSC can have.
    #[must_use]
    pub const fn new(khz: u64) -> Option<Self> {
        if khz < KHZ_MIN || khz > KHZ_MAX {
            None
        } else {
            Some(Self { khz })
        }
    }

    /// The frequency in kHz.
    #[must_use]
    pub const fn khz(self) -> u64 {
        self.khz
    }

    /// How many nanoseconds `ticks` take, rounded down.
    #[must_use]
    pub fn nanoseconds(self, ticks: u64) -> u64 {
        let nanoseconds = u128::from(ticks) * 1_000_000 / u128::from(self.khz);
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    }

    /// How many ticks `milliseconds` take; saturates, so that "for ever" can be a number.
    #[must_use]
    pub const fn ticks(self, milliseconds: u64) -> u64 {
        milliseconds.saturating_mul(self.khz)
    }
}

/// Nanoseconds that print as microseconds with one decimal.
#[derive(Clone, Copy, Debug)]
pub struct Microseconds(pub u64);

impl core::fmt::Display for Microseconds {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(out, "{}.{}", self.0 / 1000, self.0 % 1000 / 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_and_nanoseconds_agree() {
        let clock = Clock::new(2_596_138).expect("a frequency in range");
        assert_eq!(clock.nanoseconds(clock.ticks(1000)), 1_000_000_000);
        assert_eq!(clock.nanoseconds(u64::MAX), 7_105_455_901_693_034_659);
        assert_eq!(clock.ticks(u64::MAX), u64::MAX);
    }

    #[test]
    fn a_frequency_in_hertz_is_refused() {
        assert_eq!(Clock::new(2_596_138_000), None);
        assert_eq!(Clock::new(0), None);
    }

    #[test]
    fn microseconds_have_one_decimal() {
        assert_eq!(Microseconds(12_399).to_string(), "12.3");
        assert_eq!(Microseconds(99).to_string(), "0.0");
    }
}
