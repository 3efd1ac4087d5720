//! What tells one image from another without reading all of it.

use crate::blocking::Blocking;
use crate::request::Failure;

/// What an image looks like from outside. Two that differ here are two images; two that do not may still be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Likeness {
    /// How long it is.
    pub size_bytes: u64,
    /// CRC32C of at most 192 KiB of it: its first and last 64 KiB, and 16 samples of 4 KiB between them.
    pub fingerprint: u32,
}

/// What is read of the start and of the end of an image: partition tables, superblocks, and their copies.
const ENDS_BYTES: u64 = 64 << 10;

/// Samples between them, evenly spaced.
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 4096;

impl Likeness {
    /// That of `image`.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn of(image: &mut Blocking) -> Result<Self, Failure> {
        let size_bytes = image.geometry().size_bytes;
        let ends_bytes = ENDS_BYTES.min(size_bytes);
        let mut fingerprint = 0;
        let mut sample = |offset_bytes: u64, len_bytes: u64| {
            let mut buffer = vec![0; usize::try_from(len_bytes).expect("samples are small")];
            image.read_at(offset_bytes, &mut buffer)?;
            fingerprint = crc32c::crc32c_append(fingerprint, &buffer);
            Ok(())
        };
        sample(0, ends_bytes)?;
        for number in 1..=SAMPLES {
            let offset_bytes = size_bytes / (SAMPLES + 1) * number / SAMPLE_BYTES * SAMPLE_BYTES;
            sample(offset_bytes, SAMPLE_BYTES.min(size_bytes - offset_bytes))?;
        }
        sample(size_bytes - ends_bytes, ends_bytes)?;
        Ok(Self {
            size_bytes,
            fingerprint,
        })
    }
}
