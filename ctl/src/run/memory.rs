//! `--memory`: a size in MiB, GiB or TiB.

use std::str::FromStr;

use thiserror::Error;

use crate::binary;

/// A size of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryMib(pub(super) u64);

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a memory size is a whole number of MiB (512, 128M, 128MB, 128MiB) or of GiB (2G, 2GB, 2GiB)")]
pub(crate) struct MemoryError;

/// A MiB is two to this power, in bytes.
const MIB_SHIFT: u32 = 20;

impl FromStr for MemoryMib {
    type Err = MemoryError;

    fn from_str(text: &str) -> Result<Self, MemoryError> {
        let (number, shift) = binary::number(text).ok_or(MemoryError)?;
        let mib_shift = shift.unwrap_or(MIB_SHIFT).checked_sub(MIB_SHIFT);
        match number.checked_mul(1 << mib_shift.ok_or(MemoryError)?) {
            Some(mib) if mib > 0 => Ok(Self(mib)),
            _ => Err(MemoryError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_a_unit() {
        for (text, mib) in [
            ("128", 128),
            ("128M", 128),
            ("64mib", 64),
            ("128MB", 128),
            ("2GB", 2048),
            ("2G", 2048),
            ("1GiB", 1024),
        ] {
            assert_eq!(text.parse(), Ok(MemoryMib(mib)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in [
            "",
            "0",
            "0G",
            "G",
            "-1",
            "+1",
            "1.5G",
            "1 G",
            "1K",
            "1KB",
            "1MBi",
            "1é",
            "18446744073709551615G",
        ] {
            assert_eq!(text.parse::<MemoryMib>(), Err(MemoryError), "{text}");
        }
    }
}
