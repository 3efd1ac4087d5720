//! Persistent reservations: who is registered, and who of them has the unit.

use std::fmt;

/// What a session is registered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReservationKey(pub u64);

impl ReservationKey {
    /// No key: nobody can be registered with it.
    pub const NONE: Self = Self(0);
}

impl fmt::Display for ReservationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
