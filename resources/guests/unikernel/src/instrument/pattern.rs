//! What the disk tests write: sectors that say which sector of which run they are.

use crate::random::mix;

/// Bytes of a sector (virtio 1.2, section 5.2).
pub const SECTOR_BYTES: usize = 512;
/// 64-bit words of a sector.
pub const SECTOR_WORDS: usize = SECTOR_BYTES / 8;

/// The first difference between a sector and what it should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// Some other sector lies here, or this one of a run with another seed: intact, but in the wrong place.
    Misplaced {
        /// The sector that was asked for.
        sector: u64,
        /// The sector that lies here.
        found_sector: u64,
        /// The seed it was written with.
        found_seed: u64,
    },
    /// Something else.
    Corrupt {
        /// The sector that was asked for.
        sector: u64,
        /// Which 64-bit word of it differs first.
        word: usize,
        /// What it should be.
        expected: u64,
        /// What it is.
        found: u64,
    },
}

impl core::fmt::Display for Mismatch {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::Misplaced {
                sector,
                found_sector,
                found_seed,
            } => {
                write!(
                    out,
                    "sector={sector} holds sector={found_sector} of seed={found_seed}"
                )
            }
            Self::Corrupt {
                sector,
                word,
                expected,
                found,
            } => write!(
                out,
                "sector={sector} byte={} expected={expected:#018x} found={found:#018x}",
                word * 8
            ),
        }
    }
}

/// Word `word` of sector `sector` in the run of `seed`: the sector, the seed, then a mix of both.
#[must_use]
pub const fn word_of(seed: u64, sector: u64, word: usize) -> u64 {
    match word {
        0 => sector,
        1 => seed,
        _ => mix(mix(seed ^ mix(sector)).wrapping_add(word as u64)),
    }
}

/// Fills `words` with whole sectors from `sector` on.
pub fn fill(words: &mut [u64], seed: u64, sector: u64) {
    for (chunk, sector) in words.chunks_exact_mut(SECTOR_WORDS).zip(sector..) {
        let base = mix(seed ^ mix(sector));
        for (word, index) in chunk.iter_mut().zip(0u64..) {
            *word = mix(base.wrapping_add(index));
        }
        if let [first, second, ..] = chunk {
            *first = sector;
            *second = seed;
        }
    }
}

/// Whether `words` are the whole sectors from `sector` on.
///
/// # Errors
///
/// The first mismatch.
pub fn verify(words: &[u64], seed: u64, sector: u64) -> Result<(), Mismatch> {
    for (chunk, sector) in words.chunks_exact(SECTOR_WORDS).zip(sector..) {
        if let Some(word) = first_difference(chunk, seed, sector) {
            return Err(explain(chunk, seed, sector, word));
        }
    }
    Ok(())
}

/// The index of the first word of one sector that is not what it should be.
fn first_difference(chunk: &[u64], seed: u64, sector: u64) -> Option<usize> {
    let base = mix(seed ^ mix(sector));
    let tail = chunk
        .iter()
        .zip(0u64..)
        .skip(2)
        .position(|(&word, index)| word != mix(base.wrapping_add(index)));
    match chunk {
        [first, ..] if *first != sector => Some(0),
        [_, second, ..] if *second != seed => Some(1),
        _ => tail.map(|index| index + 2),
    }
}

/// Says what a sector with a wrong word is: an intact one of elsewhere, or damage.
fn explain(chunk: &[u64], seed: u64, sector: u64, word: usize) -> Mismatch {
    if let [found_sector, found_seed, ..] = *chunk
        && first_difference(chunk, found_seed, found_sector).is_none()
    {
        return Mismatch::Misplaced {
            sector,
            found_sector,
            found_seed,
        };
    }
    let found = chunk.get(word).copied().unwrap_or(0);
    Mismatch::Corrupt {
        sector,
        word,
        expected: word_of(seed, sector, word),
        found,
    }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn three_sectors() -> [u64; 3 * SECTOR_WORDS] {
        let mut words = [0; 3 * SECTOR_WORDS];
        fill(&mut words, 42, 1000);
        words
    }

    #[test]
    fn what_was_filled_verifies_sector_by_sector() {
        let words = three_sectors();
        assert_eq!(verify(&words, 42, 1000), Ok(()));
        assert_eq!(verify(&words[SECTOR_WORDS..2 * SECTOR_WORDS], 42, 1001), Ok(()));
        for (index, &word) in words[..SECTOR_WORDS].iter().enumerate() {
            assert_eq!(word, word_of(42, 1000, index));
        }
    }

    #[test]
    fn a_misplaced_sector_is_named() {
        let words = three_sectors();
        let found = verify(&words[SECTOR_WORDS..], 42, 1000);
        assert_eq!(
            found,
            Err(Mismatch::Misplaced {
                sector: 1000,
                found_sector: 1001,
                found_seed: 42
            })
        );
        let found = verify(&words, 43, 1000);
        assert_eq!(
            found,
            Err(Mismatch::Misplaced {
                sector: 1000,
                found_sector: 1000,
                found_seed: 42
            })
        );
    }

    #[test]
    fn one_flipped_bit_anywhere_is_found_where_it_is() {
        for bit in 0..3 * SECTOR_BYTES * 8 {
            let mut words = three_sectors();
            words[bit / 64] ^= 1 << (bit % 64);
            let sector = 1000 + (bit / 64 / SECTOR_WORDS) as u64;
            let word = bit / 64 % SECTOR_WORDS;
            let expected = word_of(42, sector, word);
            let found = expected ^ (1 << (bit % 64));
            assert_eq!(
                verify(&words, 42, 1000),
                Err(Mismatch::Corrupt {
                    sector,
                    word,
                    expected,
                    found
                })
            );
        }
    }

    #[test]
    fn zeroes_are_damage_and_not_another_sector() {
        let found = verify(&[0; SECTOR_WORDS], 42, 7);
        assert_eq!(
            found,
            Err(Mismatch::Corrupt {
                sector: 7,
                word: 0,
                expected: 7,
                found: 0
            })
        );
    }
}
