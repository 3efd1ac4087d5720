//! PERSISTENT RESERVE IN parameter data (SPC-4, 6.15): who is registered, and who of them has the unit.

use std::fmt;

use super::parameter::{Parameter, ParameterError, len};

/// As many keys as are read.
pub const KEYS_MAX: usize = 1024;

/// Room for [`KEYS_MAX`] keys.
pub const KEYS_BYTES: u16 = 8 + 8 * 1024;

/// The length of what READ RESERVATION sends.
pub const RESERVATION_BYTES: u16 = 24;

/// The length of what REPORT CAPABILITIES sends.
pub const CAPABILITIES_BYTES: u16 = 8;

/// What a session is registered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

/// What READ KEYS says (SPC-4, 6.15.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    /// Counts registrations and preemptions (PRGENERATION).
    pub generation: u32,
    /// One for each session that is registered; several may have the same.
    pub keys: Vec<ReservationKey>,
    /// Whether these are all.
    pub is_complete: bool,
}

impl Keys {
    /// Reads the data.
    ///
    /// # Errors
    ///
    /// When not even the header is there.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParameterError> {
        let data = Parameter::new("reservation keys", bytes);
        let (generation, list_bytes) = (data.u32(0)?, len(data.u32(4)?));
        let list = data.cut(list_bytes.saturating_add(8)).rest(8);
        let (keys, _) = list.as_chunks();
        Ok(Self {
            generation,
            keys: keys
                .iter()
                .take(KEYS_MAX)
                .map(|key| ReservationKey(u64::from_be_bytes(*key)))
                .collect(),
            is_complete: list.len() == list_bytes && keys.len() <= KEYS_MAX,
        })
    }
}

/// What READ RESERVATION says (SPC-4, 6.15.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Counts registrations and preemptions (PRGENERATION).
    pub generation: u32,
    /// Who has the unit, if anybody.
    pub holder: Option<Holder>,
}

/// Who has the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The key that it is registered with; none if all who are registered have the unit together.
    pub key: ReservationKey,
    /// What the others may do.
    pub kind: ReservationType,
}

/// The type of a reservation (SPC-4, 6.15.3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservationType(pub u8);

impl ReservationType {
    /// All may read and the holder alone may write.
    pub const WRITE_EXCLUSIVE: Self = Self(0x1);
}

impl fmt::Display for ReservationType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0x1 => "Write Exclusive",
            0x3 => "Exclusive Access",
            0x5 => "Write Exclusive - Registrants Only",
            0x6 => "Exclusive Access - Registrants Only",
            0x7 => "Write Exclusive - All Registrants",
            0x8 => "Exclusive Access - All Registrants",
            other => return write!(f, "type {other:#x}"),
        })
    }
}

impl Reservation {
    /// Reads the data.
    ///
    /// # Errors
    ///
    /// When they are cut off: then nothing is said about who has the unit.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParameterError> {
        let data = Parameter::new("reservation data", bytes);
        let (generation, holder_bytes) = (data.u32(0)?, len(data.u32(4)?));
        let data = data.cut(holder_bytes.saturating_add(8));
        let holder = if holder_bytes == 0 {
            None
        } else {
            Some(Holder {
                key: ReservationKey(data.u64(8)?),
                kind: ReservationType(data.u8(21)? & 0x0f),
            })
        };
        Ok(Self { generation, holder })
    }
}

/// What REPORT CAPABILITIES says (SPC-4, 6.15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Whether reservations can outlive a loss of power (PTPL_C).
    pub can_persist: bool,
    /// Whether they do now (PTPL_A).
    pub persists: bool,
    /// Whether there is Write Exclusive; `None` if the unit does not list its types.
    pub write_exclusive: Option<bool>,
}

impl Capabilities {
    /// Reads the data.
    ///
    /// # Errors
    ///
    /// When they are cut off.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParameterError> {
        const PTPL_C: u8 = 0x01;
        const TMV: u8 = 0x80;
        const PTPL_A: u8 = 0x01;
        const WR_EX: u8 = 0x02;
        let data = Parameter::new("reservation capabilities", bytes);
        let (can, does, types) = (data.u8(2)?, data.u8(3)?, data.u8(4)?);
        Ok(Self {
            can_persist: can & PTPL_C != 0,
            persists: does & PTPL_A != 0,
            write_exclusive: (does & TMV != 0).then_some(types & WR_EX != 0),
        })
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::super::bytes_of;
    use super::*;

    #[test]
    fn what_tgtd_says_of_a_free_unit_is_read() {
        let nothing = bytes_of("0000000000000000");
        assert_eq!(Keys::parse(&nothing).unwrap().keys, []);
        assert_eq!(Reservation::parse(&nothing).unwrap().holder, None);
        assert_eq!(
            Capabilities::parse(&bytes_of("00080080ea010000")).unwrap(),
            Capabilities {
                can_persist: false,
                persists: false,
                write_exclusive: Some(true),
            }
        );
    }

    #[test]
    fn what_tgtd_says_of_a_reserved_unit_is_read() {
        let keys = Keys::parse(&bytes_of("0000000100000008 00000000000000a1")).unwrap();
        assert_eq!((keys.generation, keys.is_complete), (1, true));
        assert_eq!(keys.keys, [ReservationKey(0xa1)]);
        let held = bytes_of("0000000100000010 00000000000000a1 00000000 00010000");
        let holder = Reservation::parse(&held).unwrap().holder.unwrap();
        assert_eq!(holder.key, ReservationKey(0xa1));
        assert_eq!(holder.kind, ReservationType::WRITE_EXCLUSIVE);
        assert_eq!(holder.kind.to_string(), "Write Exclusive");
    }

    #[test]
    fn a_holder_that_was_cut_off_is_an_error_and_not_nobody() {
        let held = bytes_of("0000000100000010 00000000000000a1 00000000 00010000");
        for len in 0..22 {
            assert!(Reservation::parse(held.split_at(len).0).is_err(), "{len}");
        }
        assert!(
            Reservation::parse(&bytes_of("0000000100000008 00000000000000a1 00000000 00010000")).is_err()
        );
    }

    #[test]
    fn more_keys_than_fit_are_not_taken_for_all() {
        let cut = Keys::parse(&bytes_of("0000000700000010 00000000000000a1 000000")).unwrap();
        assert_eq!((cut.keys.len(), cut.is_complete), (1, false));
        let huge = Keys::parse(&bytes_of("00000007ffffffff")).unwrap();
        assert_eq!((huge.keys.len(), huge.is_complete), (0, false));
        let mut many = bytes_of("0000000700002008");
        many.resize(8 + 0x2008, 1);
        let many = Keys::parse(&many).unwrap();
        assert_eq!((many.keys.len(), many.is_complete), (KEYS_MAX, false));
    }
}
