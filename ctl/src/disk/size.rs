//! `--size`: how large a disk is to be.

use std::str::FromStr;

use thiserror::Error;

use crate::binary;

/// A size that a disk can have, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SizeBytes(pub(super) u64);

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "the size of a disk is a number of bytes, or of K, M, G or T (64M, 64MB and 64MiB are the same), and a multiple of 512"
)]
pub(crate) struct SizeError;

/// The unit in which virtio counts.
const SECTOR_BYTES: u64 = 512;
/// No file is longer.
const SIZE_BYTES_MAX: u64 = i64::MAX as u64;

impl FromStr for SizeBytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let (number, shift) = binary::number(text).ok_or(SizeError)?;
        match number.checked_mul(1 << shift.unwrap_or(0)) {
            Some(bytes) if (1..=SIZE_BYTES_MAX).contains(&bytes) && bytes.is_multiple_of(SECTOR_BYTES) => {
                Ok(Self(bytes))
            }
            _ => Err(SizeError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_a_unit() {
        for (text, bytes) in [
            ("512", 512),
            ("1024B", 1024),
            ("4k", 4096),
            ("64M", 64 << 20),
            ("64MiB", 64 << 20),
            ("2GB", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(SizeBytes(bytes)), "{text}");
        }
    }

    #[test]
    fn what_no_disk_has_is_refused() {
        for text in [
            "",
            "0",
            "0M",
            "513",
            "M",
            "64X",
            "-512",
            "64 M",
            "8388608T",
            "99999999999999999999",
        ] {
            assert_eq!(text.parse::<SizeBytes>(), Err(SizeError), "{text}");
        }
    }
}
