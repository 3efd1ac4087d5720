//! Decides by what is on an image whether its leases were kept: nobody wrote who did not hold it, and nothing that was
//! acknowledged is gone.
//!
//! ```text
//! refused ─────────────────────────────► no stamp of this writer, ever
//! granted ──► acknowledged… ──► gone ──► what he wrote stays, and nothing new of his comes
//!    └─ of the next one: the one before is gone
//! ```
//!
//! The oracle has no clock. What it is told and shown is in one order, so whoever tells it looks at the image
//! at once after a lease has changed hands: a stamp that is new since the last look was written between the two.

use std::collections::BTreeMap;

use instrument::pattern::{SECTOR_BYTES, SECTOR_WORDS};
use instrument::stamp::{Content, Stamp, block_of};

use crate::Outcome;

/// Sectors of a block, which the guest writes by one request.
pub const BLOCK_SECTORS: u64 = 8;
/// A sector that is still no stamp after so many looks is none.
const REREADS_MAX: u32 = 50;

/// What was told about one image, and what was seen on it last.
#[derive(Clone, Debug)]
pub struct Oracle {
    blocks: u64,
    writers: BTreeMap<u64, Tenure>,
    grants: u64,
    /// The moment of the last look.
    looked: u64,
    /// Counts what is told and shown.
    now: u64,
    /// For each block, the newest write that was acknowledged.
    acknowledged: BTreeMap<u64, Rank>,
    /// For each sector, what was seen last.
    seen: Vec<Option<Rank>>,
}

/// The order of all writes that may be on an image: by the lease, then by the writer's own count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    grant: u64,
    sequence: u64,
    writer: u64,
}

/// One writer's lease.
#[derive(Clone, Copy, Debug)]
struct Tenure {
    grant: u64,
    until: Option<u64>,
    acknowledged: u64,
}

/// What is wrong with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A writer without a lease got through.
    #[error("sector {sector} holds write {sequence} of writer {writer}, who did not hold the lease then")]
    Foreign {
        /// Where.
        sector: u64,
        /// Who.
        writer: u64,
        /// Which of his writes.
        sequence: u64,
    },
    /// What a flush had covered is not there.
    #[error(
        "sector {sector} lost write {sequence} of writer {writer}, which was acknowledged; it holds {found:?}"
    )]
    Lost {
        /// Where.
        sector: u64,
        /// Whose write it was.
        writer: u64,
        /// Which of his writes.
        sequence: u64,
        /// What is there instead.
        found: Content,
    },
    /// An older write has replaced a newer one.
    #[error("sector {sector} went back to write {sequence} of writer {writer}, which had been overwritten")]
    WentBack {
        /// Where.
        sector: u64,
        /// Who wrote what is there.
        writer: u64,
        /// Which of his writes.
        sequence: u64,
    },
    /// A stamp lies where its writer never put it.
    #[error("sector {sector} holds a stamp that writer {writer} wrote elsewhere, as write {sequence}")]
    Misplaced {
        /// Where.
        sector: u64,
        /// Who wrote it.
        writer: u64,
        /// Which of his writes.
        sequence: u64,
    },
    /// What is there is no whole stamp.
    #[error("sector {sector} is damaged")]
    Damaged {
        /// Where.
        sector: u64,
    },
    /// The image ends before its blocks do.
    #[error("the image has {sectors} sectors, fewer than its blocks need")]
    Short {
        /// How many it has.
        sectors: usize,
    },
    /// Two writers were given the lease at a time.
    #[error("writer {second} was given the lease while writer {first} held it")]
    Shared {
        /// Who held it.
        first: u64,
        /// Who was given it too.
        second: u64,
    },
}

impl Oracle {
    /// For an image of so many blocks that is blank, or that was blank when the first writer came.
    pub fn new(blocks: u64) -> Self {
        let sectors = usize::try_from(blocks * BLOCK_SECTORS).unwrap_or(usize::MAX);
        Self {
            blocks,
            writers: BTreeMap::new(),
            grants: 0,
            looked: 0,
            now: 0,
            acknowledged: BTreeMap::new(),
            seen: vec![None; sectors],
        }
    }

    /// A writer has the lease now, and nobody else.
    ///
    /// # Errors
    ///
    /// [`Violation::Shared`] where another one still has it: a storage that takes it away from him says so by
    /// [`Oracle::gone`] first.
    pub fn granted(&mut self, writer: u64) -> Result<(), Violation> {
        self.now += 1;
        if let Some(first) = self.holder() {
            return Err(Violation::Shared {
                first,
                second: writer,
            });
        }
        self.grants += 1;
        let tenure = Tenure {
            grant: self.grants,
            until: None,
            acknowledged: 0,
        };
        self.writers.insert(writer, tenure);
        Ok(())
    }

    /// A writer has the lease no longer: he is dead, or the storage has given it to another.
    pub fn gone(&mut self, writer: u64) {
        self.now += 1;
        if let Some(tenure) = self.writers.get_mut(&writer) {
            tenure.until.get_or_insert(self.now);
        }
    }

    /// Who has the lease.
    pub fn holder(&self) -> Option<u64> {
        self.writers
            .iter()
            .find(|(_, tenure)| tenure.until.is_none())
            .map(|(writer, _)| *writer)
    }

    /// All writes of a writer up to this one were flushed. Tell it before the look that must find them.
    pub fn acknowledged(&mut self, writer: u64, sequence: u64) {
        let Some(tenure) = self.writers.get_mut(&writer) else {
            return;
        };
        for flushed in tenure.acknowledged + 1..=sequence {
            let rank = Rank {
                grant: tenure.grant,
                sequence: flushed,
                writer,
            };
            let newest = self
                .acknowledged
                .entry(block_of(writer, flushed, self.blocks))
                .or_insert(rank);
            *newest = rank.max(*newest);
        }
        tenure.acknowledged = tenure.acknowledged.max(sequence);
    }

    /// Compares an image, as it was after all that was told so far, with what it may hold.
    ///
    /// # Errors
    ///
    /// The first violation; the oracle has then no more to say.
    pub fn look(&mut self, image: &[u8]) -> Result<(), Violation> {
        self.now += 1;
        let sectors = sectors(image);
        if sectors.len() < self.seen.len() {
            return Err(Violation::Short {
                sectors: sectors.len(),
            });
        }
        for (sector, content) in (0..self.blocks * BLOCK_SECTORS).zip(sectors) {
            let found = self.judge(sector, content)?;
            if let Some(seen) = usize::try_from(sector).ok().and_then(|at| self.seen.get_mut(at)) {
                *seen = found;
            }
        }
        self.looked = self.now;
        Ok(())
    }

    /// What a sector holds, if it may.
    fn judge(&self, sector: u64, content: Content) -> Result<Option<Rank>, Violation> {
        let must = self.acknowledged.get(&(sector / BLOCK_SECTORS));
        let found = match content {
            Content::Blank => None,
            Content::Damaged => return Err(Violation::Damaged { sector }),
            Content::Whole(stamp) => Some(self.rank(sector, stamp)?),
        };
        let seen = usize::try_from(sector).ok().and_then(|at| *self.seen.get(at)?);
        if let Some(must) = must.filter(|must| found < Some(**must)) {
            return Err(Violation::Lost {
                sector,
                writer: must.writer,
                sequence: must.sequence,
                found: content,
            });
        }
        match found {
            Some(Rank { writer, sequence, .. }) if found < seen => Err(Violation::WentBack {
                sector,
                writer,
                sequence,
            }),
            _ => Ok(found),
        }
    }

    /// The place of a stamp in the order of all writes, if its writer may have written it here and then.
    fn rank(&self, sector: u64, stamp: Stamp) -> Result<Rank, Violation> {
        let Stamp { writer, sequence, .. } = stamp;
        let block = block_of(writer, sequence, self.blocks);
        if stamp.sector != sector || sector / BLOCK_SECTORS != block {
            return Err(Violation::Misplaced {
                sector,
                writer,
                sequence,
            });
        }
        let foreign = Violation::Foreign {
            sector,
            writer,
            sequence,
        };
        let tenure = self.writers.get(&writer).ok_or(foreign)?;
        let rank = Rank {
            grant: tenure.grant,
            sequence,
            writer,
        };
        let was_there = usize::try_from(sector)
            .ok()
            .and_then(|at| self.seen.get(at))
            .is_some_and(|seen| *seen == Some(rank));
        if !was_there && tenure.until.is_some_and(|until| until < self.looked) {
            return Err(foreign);
        }
        Ok(rank)
    }
}

/// What each sector of an image holds.
pub fn sectors(image: &[u8]) -> Vec<Content> {
    let words = |sector: &[u8]| -> Vec<u64> {
        let mut words = vec![0; SECTOR_WORDS];
        for (word, bytes) in words.iter_mut().zip(sector.chunks_exact(8)) {
            *word = bytes.try_into().map_or(0, u64::from_le_bytes);
        }
        words
    };
    image
        .chunks_exact(SECTOR_BYTES)
        .map(|sector| Stamp::read(&words(sector)))
        .collect()
}

/// An image that is being written: sectors that were caught half-written are read again, and are whole then unless they
/// are damaged.
///
/// # Errors
///
/// When it cannot be read.
pub fn reread_damaged(read: impl Fn() -> Outcome<Vec<u8>>) -> Outcome<Vec<u8>> {
    let mut image = read()?;
    for _ in 0..REREADS_MAX {
        let damaged: Vec<usize> = (0..)
            .zip(sectors(&image))
            .filter(|(_, content)| *content == Content::Damaged)
            .map(|(sector, _)| sector * SECTOR_BYTES)
            .collect();
        if damaged.is_empty() {
            break;
        }
        let again = read()?;
        for range in damaged.into_iter().map(|start| start..start + SECTOR_BYTES) {
            if let (Some(old), Some(new)) = (image.get_mut(range.clone()), again.get(range)) {
                old.copy_from_slice(new);
            }
        }
    }
    Ok(image)
}

/// Writes one block with the stamp of a writer into an image: what the guest's `stamp` does to its disk.
pub fn stamp(image: &mut [u8], writer: u64, sequence: u64, blocks: u64) {
    let first = block_of(writer, sequence, blocks) * BLOCK_SECTORS;
    let sectors = image.chunks_exact_mut(SECTOR_BYTES).zip(0..);
    for (bytes, sector) in sectors.filter(|(_, sector)| (first..first + BLOCK_SECTORS).contains(sector)) {
        let mut words = [0; SECTOR_WORDS];
        let stamp = Stamp {
            writer,
            sequence,
            sector,
        };
        stamp.fill(&mut words);
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
