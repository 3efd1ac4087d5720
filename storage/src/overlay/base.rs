//! What tells one base from another.

use super::format::BaseIdentity;
use crate::blocking::Blocking;
use crate::request::Failure;

/// What is read of the start and of the end of a base: partition tables, superblocks, and their copies.
const ENDS_BYTES: u64 = 64 << 10;

/// Samples between them, evenly spaced.
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 4096;

/// Who `base` is, which was opened as `path`.
///
/// # Errors
///
/// When it cannot be read.
pub fn identify(path: &str, base: &mut Blocking) -> Result<BaseIdentity, Failure> {
    Ok(BaseIdentity {
        path: path.to_owned(),
        size_bytes: base.geometry().size_bytes,
        fingerprint: fingerprint(base)?,
    })
}

/// CRC32C of at most 192 KiB of `base`: its first and last 64 KiB, and 16 samples of 4 KiB between them.
fn fingerprint(base: &mut Blocking) -> Result<u32, Failure> {
    let size_bytes = base.geometry().size_bytes;
    let ends_bytes = ENDS_BYTES.min(size_bytes);
    let mut crc = 0;
    let mut sample = |offset_bytes: u64, len_bytes: u64| {
        let mut buffer = vec![0; usize::try_from(len_bytes).expect("samples are small")];
        base.read_at(offset_bytes, &mut buffer)?;
        crc = crc32c::crc32c_append(crc, &buffer);
        Ok(())
    };
    sample(0, ends_bytes)?;
    for number in 1..=SAMPLES {
        let offset_bytes = size_bytes / (SAMPLES + 1) * number / SAMPLE_BYTES * SAMPLE_BYTES;
        sample(offset_bytes, SAMPLE_BYTES.min(size_bytes - offset_bytes))?;
    }
    sample(size_bytes - ends_bytes, ends_bytes)?;
    Ok(crc)
}
