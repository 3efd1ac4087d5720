//! What a disk may hold: says of each answer, and of what is left after a crash, whether it may be so.

mod sector;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use self::sector::{Sector, Value, Version};
use crate::request::Durability;
use crate::sim::dice::mixed;

/// The unit of an oracle, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// Knows for each sector of a disk the values that it may have.
///
/// A value that was written is permitted from the beginning of its write on. A write that ends well
/// hides every value whose own write had ended before it began; two that overlap in time leave both. A
/// hidden value is not read any more, but a crash may bring it back: until a flush that began after
/// it was hidden has ended well, or the write that hid it was durable. A write that failed may have happened, or a part of it.
#[derive(Debug)]
pub struct Oracle {
    sectors: Vec<Sector>,
    /// The sectors that may have more than one value.
    unsettled: BTreeSet<usize>,
    /// Counts beginnings and ends.
    moment: u64,
    begun: BTreeMap<u64, Begun>,
    sizes: Sizes,
}

/// Names a request that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// What a request does to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    Read,
    /// Fills its range with the bytes of its own ([`Oracle::bytes_of`]).
    Write,
    /// Fills its range with zeros.
    Zero,
    /// Fills any sectors of its range with zeros, or none.
    Discard,
    /// Makes last what had ended before.
    Flush,
    /// Makes the disk as long as the end of its range.
    Grow,
}

#[derive(Debug)]
struct Begun {
    effect: Effect,
    sectors: Range<usize>,
}

/// How long the disk is and may be, in sectors.
#[derive(Debug)]
struct Sizes {
    /// A crash leaves no less.
    settled: usize,
    now: usize,
    /// The moment at which it became so.
    grown: u64,
    /// Growth that failed may have happened.
    asked: usize,
}

/// What a disk may not do.
#[derive(Debug, thiserror::Error)]
pub enum Violation {
    /// A sector has a value that it cannot have.
    #[error("sector {sector} {after}: {found}; permitted: {permitted}")]
    Value {
        /// Its number.
        sector: usize,
        /// When it was looked at, in words.
        after: &'static str,
        /// How it begins.
        found: String,
        /// The values that it may have.
        permitted: String,
    },
    /// The disk has a length that it cannot have.
    #[error("the disk has {found} sectors after a crash; permitted: {least} to {most}")]
    Size {
        /// The sectors found.
        found: usize,
        /// The fewest that there may be.
        least: usize,
        /// The most.
        most: usize,
    },
}

impl Oracle {
    /// The oracle of a disk that holds `content` and has nothing unflushed.
    pub fn new(content: &[u8]) -> Self {
        let sectors: Vec<Sector> = content
            .chunks(index(SECTOR_BYTES))
            .map(|bytes| Sector::settled(Value::of(bytes)))
            .collect();
        let sizes = Sizes {
            settled: sectors.len(),
            now: sectors.len(),
            grown: 0,
            asked: sectors.len(),
        };
        Self {
            sectors,
            unsettled: BTreeSet::new(),
            moment: 0,
            begun: BTreeMap::new(),
            sizes,
        }
    }

    /// How long the disk is, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.sizes.now as u64 * SECTOR_BYTES
    }

    /// A request begins, on whole sectors of the disk.
    pub fn begin(&mut self, effect: Effect, offset_bytes: u64, len_bytes: u64) -> Ticket {
        self.moment += 1;
        let by = self.moment;
        let sectors = index(offset_bytes / SECTOR_BYTES)..index((offset_bytes + len_bytes) / SECTOR_BYTES);
        let value = match effect {
            Effect::Write => Some(Value::Pattern(by)),
            Effect::Zero | Effect::Discard => Some(Value::Zeros),
            Effect::Read | Effect::Flush => None,
            Effect::Grow => {
                self.sizes.asked = self.sizes.asked.max(sectors.end);
                None
            }
        };
        if let Some(value) = value {
            for number in sectors.clone() {
                self.unsettled.insert(number);
                if let Some(sector) = self.sectors.get_mut(number) {
                    sector.versions.push(Version::begun(value.clone(), by));
                }
            }
        }
        self.begun.insert(by, Begun { effect, sectors });
        Ticket(by)
    }

    /// The bytes that the write `ticket` puts at `offset_bytes`, a multiple of the sector.
    pub fn bytes_of(ticket: Ticket, offset_bytes: u64, len_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes];
        for (sector, place) in (offset_bytes / SECTOR_BYTES..).zip(bytes.chunks_mut(index(SECTOR_BYTES))) {
            sector::fill(ticket.0, sector, place);
        }
        bytes
    }

    /// A read ended well, with these bytes.
    ///
    /// # Errors
    ///
    /// The first sector that has a value which it never had while the read was under way.
    pub fn has_read(&mut self, ticket: Ticket, bytes: &[u8]) -> Result<(), Violation> {
        let begun = self.take(ticket);
        for (number, found) in begun.sectors.clone().zip(bytes.chunks(index(SECTOR_BYTES))) {
            let Some(sector) = self.sectors.get(number) else {
                continue;
            };
            let permitted = |version: &&Version| version.hidden.is_none_or(|hidden| hidden > ticket.0);
            sector.check(number, found, "as it was read", permitted)?;
        }
        self.prune(begun.sectors);
        Ok(())
    }

    /// A request that is no read ended well.
    pub fn has_succeeded(&mut self, ticket: Ticket, durability: Durability) {
        let begun = self.take(ticket);
        match begun.effect {
            Effect::Read => {}
            Effect::Write | Effect::Zero => {
                for sector in self.sectors.get_mut(begun.sectors.clone()).unwrap_or_default() {
                    sector.settle(ticket.0, self.moment, durability);
                }
                self.prune(begun.sectors);
            }
            Effect::Discard => self.end_versions(ticket, begun.sectors),
            Effect::Flush => self.flush(ticket),
            Effect::Grow => self.grow(begun.sectors.end),
        }
    }

    /// A request failed, having done any part of its work.
    pub fn has_failed(&mut self, ticket: Ticket) {
        let begun = self.take(ticket);
        self.end_versions(ticket, begun.sectors);
    }

    /// The host crashed while whatever had begun was under way; this is what is left.
    ///
    /// # Errors
    ///
    /// What cannot be left.
    pub fn has_crashed(&mut self, content: &[u8]) -> Result<(), Violation> {
        let found = content.len() / index(SECTOR_BYTES);
        let (least, most) = (self.sizes.settled, self.sizes.asked);
        if !(least..=most).contains(&found) {
            return Err(Violation::Size { found, least, most });
        }
        self.begun.clear();
        self.sectors.resize_with(found, || Sector::settled(Value::Zeros));
        for (number, bytes) in content.chunks(index(SECTOR_BYTES)).enumerate() {
            if let Some(sector) = self.sectors.get_mut(number) {
                sector.check(number, bytes, "after a crash", |version| !version.forgotten)?;
                if self.unsettled.contains(&number) {
                    *sector = sector.as_found(number, bytes);
                }
            }
        }
        self.unsettled.clear();
        self.sizes = Sizes {
            settled: found,
            now: found,
            grown: 0,
            asked: found,
        };
        Ok(())
    }

    fn take(&mut self, ticket: Ticket) -> Begun {
        self.moment += 1;
        let begun = self.begun.remove(&ticket.0);
        begun.expect("a request ends once, after it has begun")
    }

    fn end_versions(&mut self, ticket: Ticket, sectors: Range<usize>) {
        for sector in self.sectors.get_mut(sectors).unwrap_or_default() {
            sector.end(ticket.0, self.moment);
        }
    }

    fn flush(&mut self, ticket: Ticket) {
        for number in &self.unsettled {
            if let Some(sector) = self.sectors.get_mut(*number) {
                sector.flush(ticket.0);
            }
        }
        if self.sizes.grown < ticket.0 {
            self.sizes.settled = self.sizes.now;
        }
        self.prune(0..self.sectors.len());
    }

    fn grow(&mut self, size: usize) {
        self.sectors.resize_with(size, || Sector::settled(Value::Zeros));
        self.sizes.now = size;
        self.sizes.grown = self.moment;
    }

    /// Drops the values that no read under way and no crash can bring back.
    fn prune(&mut self, within: Range<usize>) {
        let oldest = self.begun.keys().next().copied().unwrap_or(self.moment);
        let mut settled = Vec::new();
        for number in self.unsettled.range(within) {
            if let Some(sector) = self.sectors.get_mut(*number) {
                let is_gone = |version: &Version| {
                    version.forgotten && version.hidden.is_some_and(|hidden| hidden < oldest)
                };
                sector.versions.retain(|version| !is_gone(version));
                if sector.versions.len() == 1 {
                    settled.push(*number);
                }
            }
        }
        for number in settled {
            self.unsettled.remove(&number);
        }
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}

/// The word `at` of what write `by` puts into `sector`.
fn word(by: u64, sector: u64, at: u64) -> [u8; 8] {
    mixed(mixed(by << 32 ^ sector) ^ at).to_le_bytes()
}
