//! An image that goes along with its machine: what is read of it here, and what is made of that elsewhere.

mod duplicate;
mod original;

pub use duplicate::{Duplicate, DuplicateError, Room};
pub use original::{Original, OriginalError, Part};

/// The grain in which zeros are told from data, in bytes: that of the space of a file.
pub const GRAIN_BYTES: usize = 4096;

/// Parts of `bytes` that are zeros, or are not, one after the other with the offset of each.
pub fn grains(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8], Grains)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = bytes.get(at..)?;
        let mut grains = rest.chunks(GRAIN_BYTES);
        let kind = kind_of(grains.next()?);
        let more = grains.take_while(|grain| kind_of(grain) == kind).count();
        let len = ((more + 1) * GRAIN_BYTES).min(rest.len());
        let part = rest.get(..len)?;
        let begun = at;
        at += len;
        Some((begun, part, kind))
    })
}

/// What some bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grains {
    /// Nothing but zeros.
    Zeros,
    /// Something else.
    Data,
}

fn kind_of(bytes: &[u8]) -> Grains {
    let (words, rest) = bytes.as_chunks::<16>();
    let is_zeros = words.iter().all(|word| u128::from_ne_bytes(*word) == 0);
    if is_zeros && rest.iter().all(|byte| *byte == 0) {
        Grains::Zeros
    } else {
        Grains::Data
    }
}

#[cfg(test)]
mod tests;
