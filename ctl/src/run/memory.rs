//! `--memory`: a size in MiB, GiB or TiB.

use std::str::FromStr;

use thiserror::Error;

/// A size of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryMib(pub(super) u64);

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a memory size is a whole number of MiB (512, 128M, 128MB, 128MiB) or of GiB (2G, 2GB, 2GiB)")]
pub(crate) struct MemoryError;

impl FromStr for MemoryMib {
    type Err = MemoryError;

    fn from_str(text: &str) -> Result<Self, MemoryError> {
        let digits_bytes = text.bytes().take_while(u8::is_ascii_digit).count();
        let (digits, unit) = text.split_at(digits_bytes);
        let number: u64 = digits.parse().map_err(|_| MemoryError)?;
        let unit_mib = match unit.to_ascii_uppercase().as_str() {
            "" | "M" | "MB" | "MIB" => 1,
            "G" | "GB" | "GIB" => 1024,
            "T" | "TB" | "TIB" => 1024 * 1024,
            _ => return Err(MemoryError),
        };
        match number.checked_mul(unit_mib) {
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
