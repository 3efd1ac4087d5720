//! Numbers that come round: `CmdSN` and `StatSN` are compared as RFC 1982 says (RFC 7143, 4.2.2).

use std::fmt;

/// A serial number of 32 bits. It has no order (`Ord` would lie), but of two that are less than 2^31 apart one is
/// before the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Serial(pub u32);

impl Serial {
    /// The one after it.
    #[must_use]
    pub const fn next(self) -> Self {
        self.plus(1)
    }

    /// The one `steps` after it.
    #[must_use]
    pub const fn plus(self, steps: u32) -> Self {
        Self(self.0.wrapping_add(steps))
    }

    /// Whether it comes before `other`. Of two that are 2^31 apart neither does.
    pub const fn is_before(self, other: Self) -> bool {
        let steps = other.0.wrapping_sub(self.0);
        steps != 0 && steps < 1 << 31
    }

    /// How many steps lead from `earlier` to it; `None` if it comes before that.
    pub const fn since(self, earlier: Self) -> Option<u32> {
        let steps = self.0.wrapping_sub(earlier.0);
        if steps < 1 << 31 { Some(steps) } else { None }
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_serial_numbers_goes_on_where_they_come_round() {
        let last = Serial(u32::MAX);
        assert_eq!(last.next(), Serial(0));
        assert!(last.is_before(Serial(0)));
        assert!(!Serial(0).is_before(last));
        assert!(!last.is_before(last));
        assert_eq!(Serial(3).since(last), Some(4));
        assert_eq!(last.since(Serial(3)), None);
        assert_eq!(last.since(last), Some(0));
    }

    #[test]
    fn of_two_numbers_half_the_way_round_apart_neither_is_before_the_other() {
        let (one, other) = (Serial(5), Serial(5 + (1 << 31)));
        assert!(!one.is_before(other) && !other.is_before(one));
        assert_eq!(one.since(other), None);
        assert!(one.is_before(Serial(other.0 - 1)));
    }
}
