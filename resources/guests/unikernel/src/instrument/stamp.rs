//! What the ownership tests write: sectors that say who wrote them, and when in his life.
//!
//! The guest writes them, and whoever judges an image reads them: this is the one place that knows their form.

use crate::pattern::SECTOR_WORDS;
use crate::random::mix;

/// Whose sector it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The writer's incarnation: another one at each start.
    pub writer: u64,
    /// How many blocks he had written then, this one included.
    pub sequence: u64,
    /// Where he meant it to be.
    pub sector: u64,
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeroes.
    Blank,
    /// A whole stamp, of this sector or of another.
    Whole(Stamp),
    /// Something else: no stamp, or not all of one.
    Damaged,
}

/// "stamped\n" in memory.
const MAGIC: u64 = u64::from_le_bytes(*b"stamped\n");

impl Stamp {
    /// Fills one sector. The words behind the first four are a mix of all that the stamp says: its checksum, and the
    /// proof that the sector is whole.
    pub fn fill(&self, sector: &mut [u64]) {
        for (word, index) in sector.iter_mut().zip(0..) {
            *word = self.word(index);
        }
    }

    /// What one sector holds.
    #[must_use]
    pub fn read(sector: &[u64]) -> Content {
        if sector.iter().all(|word| *word == 0) {
            return Content::Blank;
        }
        let [_, writer, number, place, ..] = *sector else {
            return Content::Damaged;
        };
        let stamp = Self {
            writer,
            sequence: number,
            sector: place,
        };
        let is_whole = sector.len() == SECTOR_WORDS
            && sector
                .iter()
                .zip(0..)
                .all(|(word, index)| *word == stamp.word(index));
        if is_whole {
            Content::Whole(stamp)
        } else {
            Content::Damaged
        }
    }

    const fn word(&self, index: u64) -> u64 {
        match index {
            0 => MAGIC,
            1 => self.writer,
            2 => self.sequence,
            3 => self.sector,
            _ => {
                let base = mix(self.writer ^ mix(self.sequence ^ mix(self.sector)));
                mix(base.wrapping_add(index))
            }
        }
    }
}

/// Which of `blocks` blocks a writer writes as his `sequence`th: all know it without being told.
#[must_use]
pub const fn block_of(writer: u64, sequence: u64, blocks: u64) -> u64 {
    if blocks == 0 {
        return 0;
    }
    mix(writer ^ mix(sequence)) % blocks
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        writer: 3,
        sequence: 17,
        sector: 40,
    };

    #[test]
    fn a_stamp_is_read_as_it_was_written() {
        let mut sector = [0; SECTOR_WORDS];
        assert_eq!(Stamp::read(&sector), Content::Blank);
        STAMP.fill(&mut sector);
        assert_eq!(Stamp::read(&sector), Content::Whole(STAMP));
        assert_eq!(Stamp::read(&sector[1..]), Content::Damaged);
    }

    #[test]
    fn one_flipped_bit_anywhere_is_damage() {
        for bit in 0..SECTOR_WORDS * 64 {
            let mut sector = [0; SECTOR_WORDS];
            STAMP.fill(&mut sector);
            sector[bit / 64] ^= 1 << (bit % 64);
            assert_eq!(Stamp::read(&sector), Content::Damaged, "bit {bit}");
        }
    }

    #[test]
    fn every_block_gets_its_turn() {
        let mut turns = [0u32; 16];
        for sequence in 1..=1000 {
            let block = usize::try_from(block_of(9, sequence, 16)).expect("below 16");
            turns[block] += 1;
        }
        assert!(turns.iter().all(|count| *count > 20), "{turns:?}");
        assert_eq!(block_of(9, 1, 0), 0);
    }
}
