//! REPORT LUNS parameter data (SPC-4, 6.33; SAM-5, 4.7): which units a target has.

use std::fmt;

use super::parameter::{Parameter, ParameterError, len};

/// As much as is asked for: room for 511 units.
pub const LUNS_BYTES: u32 = 4096;

/// The number of a unit, in the eight bytes in which it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lun(pub [u8; 8]);

impl Lun {
    /// The unit `number`: a single level, peripheral addressing below 256 and flat space addressing from there on
    /// (SAM-5, 4.7); `None` from 16384 on.
    pub fn new(number: u16) -> Option<Self> {
        const FLAT_SPACE: u8 = 0b01 << 6;
        let [high, low] = number.to_be_bytes();
        let method = match high {
            0 => 0,
            1..0x40 => FLAT_SPACE,
            _ => return None,
        };
        Some(Self([method | high, low, 0, 0, 0, 0, 0, 0]))
    }

    /// Its number; `None` for a unit that has none: of another bus, of more levels, a well known one.
    pub fn number(self) -> Option<u16> {
        let [high, low, rest @ ..] = self.0;
        let number = u16::from_be_bytes([high & 0x3f, low]);
        let is_one = rest == [0; 6];
        match high >> 6 {
            0b00 if is_one && number < 256 => Some(number),
            0b01 if is_one => Some(number),
            _ => None,
        }
    }
}

impl fmt::Display for Lun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number() {
            Some(number) => write!(f, "{number}"),
            None => write!(f, "{:016x}", u64::from_be_bytes(self.0)),
        }
    }
}

/// The units of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LunList {
    /// As many as were sent.
    pub luns: Vec<Lun>,
    /// Whether these are all.
    pub is_complete: bool,
}

impl LunList {
    /// Reads the data.
    ///
    /// # Errors
    ///
    /// When not even the header is there.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParameterError> {
        let data = Parameter::new("REPORT LUNS data", bytes);
        let list_bytes = len(data.u32(0)?);
        data.slice(0, 8)?;
        let list = data.cut(list_bytes.saturating_add(8)).rest(8);
        let (luns, _) = list.as_chunks();
        Ok(Self {
            luns: luns.iter().copied().map(Lun).collect(),
            is_complete: list.len() == list_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::super::bytes_of;
    use super::*;

    #[test]
    fn the_units_of_tgtd_are_read() {
        let bytes = bytes_of("0000001800000000 0000000000000000 0001000000000000 0002000000000000");
        let list = LunList::parse(&bytes).unwrap();
        let numbers: Vec<_> = list.luns.iter().map(|lun| lun.number()).collect();
        assert_eq!(numbers, [Some(0), Some(1), Some(2)]);
        assert!(list.is_complete);
    }

    #[test]
    fn a_list_that_was_cut_off_says_so() {
        let list = LunList::parse(&bytes_of("ffffffff00000000 0001000000000000 0002")).unwrap();
        assert_eq!((list.luns.len(), list.is_complete), (1, false));
        assert!(LunList::parse(&bytes_of("00000000000000")).is_err());
    }

    #[test]
    fn a_number_is_the_same_there_and_back() {
        for number in [0, 1, 255, 256, 0x3fff] {
            assert_eq!(Lun::new(number).unwrap().number(), Some(number));
        }
        assert_eq!(Lun::new(0x4000), None);
        assert_eq!(Lun::new(0x123).unwrap().0, [0x41, 0x23, 0, 0, 0, 0, 0, 0]);
        let well_known = Lun([0xc1, 0x01, 0, 0, 0, 0, 0, 0]);
        assert_eq!(well_known.to_string(), "c101000000000000");
    }
}
