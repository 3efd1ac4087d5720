//! The trailer of a memory file: whose memory it is, behind the last byte of it.

use super::MemoryTable;
use super::table::{Kind, MemoryId};

/// Length of the trailer: a page of its own.
pub const TRAILER_BYTES: usize = 4096;

/// What a memory file says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// The memory: that of the table that it belongs to.
    pub id: MemoryId,
    /// Size of the memory before the trailer, in bytes.
    pub size_bytes: u64,
    /// Whether pages of it are in other files: a diff and what it was merged into are one memory, and two files.
    pub is_diff: bool,
}

/// Why a file is not the memory file that it is taken for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum TrailerError {
    #[error("it is no memory file: nothing behind {size_bytes} bytes of memory says that it is one")]
    NoTrailer { size_bytes: u64 },
    #[error("its trailer has version {version}, and this version of Coracle reads {VERSION}")]
    Version { version: u32 },
    #[error("its trailer is damaged")]
    Damaged,
    #[error(
        "it is memory {found}, and the state file belongs to memory {expected}: take the two files of one snapshot"
    )]
    OtherMemory { found: MemoryId, expected: MemoryId },
    #[error("it has {found} bytes of memory, and the state file's table has {expected}")]
    OtherSize { found: u64, expected: u64 },
    #[error(
        "it is the memory of a diff, and the state file belongs to a full snapshot: take the memory that was merged with it"
    )]
    Diff,
    #[error(
        "it is the memory of a full snapshot, and the state file belongs to a diff: take the two files of one snapshot"
    )]
    Full,
}

const MAGIC: [u8; 8] = *b"CORACMEM";
const VERSION: u32 = 1;

/// Where the fields lie: magic, version, id, size, 1 for a diff; zeros; the CRC32C of all that is before it.
const VERSION_AT: usize = 8;
const ID_AT: usize = 16;
const SIZE_AT: usize = 32;
const IS_DIFF_AT: usize = 40;
const CHECKSUM_AT: usize = TRAILER_BYTES - 4;

impl Trailer {
    /// The trailer of the file that `table` belongs to.
    pub fn of(table: &MemoryTable) -> Self {
        Self {
            id: table.id(),
            size_bytes: table.size_bytes(),
            is_diff: table.kind() != Kind::Full,
        }
    }

    /// As it lies in the file.
    pub fn to_bytes(&self) -> [u8; TRAILER_BYTES] {
        let mut bytes = [0; TRAILER_BYTES];
        let mut put = |at: usize, field: &[u8]| {
            let place = bytes.get_mut(at..at + field.len());
            place
                .expect("every field lies within the trailer")
                .copy_from_slice(field);
        };
        put(0, &MAGIC);
        put(VERSION_AT, &VERSION.to_le_bytes());
        put(ID_AT, &self.id.0);
        put(SIZE_AT, &self.size_bytes.to_le_bytes());
        put(IS_DIFF_AT, &u32::from(self.is_diff).to_le_bytes());
        let (summed, sum) = bytes.split_at_mut(CHECKSUM_AT);
        sum.copy_from_slice(&crc32c::crc32c(summed).to_le_bytes());
        bytes
    }

    /// Checks what lies behind the memory of a file that is taken for that of `table`.
    ///
    /// # Errors
    ///
    /// When it is another's, or nothing at all.
    pub fn check(bytes: &[u8; TRAILER_BYTES], table: &MemoryTable) -> Result<(), TrailerError> {
        let found = Self::parse(bytes, table.size_bytes())?;
        if found.id != table.id() {
            return Err(TrailerError::OtherMemory {
                found: found.id,
                expected: table.id(),
            });
        }
        if found.size_bytes != table.size_bytes() {
            return Err(TrailerError::OtherSize {
                found: found.size_bytes,
                expected: table.size_bytes(),
            });
        }
        match (found.is_diff, table.kind()) {
            (true, Kind::Full) => Err(TrailerError::Diff),
            (false, Kind::Diff { .. }) => Err(TrailerError::Full),
            _ => Ok(()),
        }
    }

    /// Reads what lies behind the `size_bytes` of a file.
    ///
    /// # Errors
    ///
    /// When it is no trailer.
    pub fn parse(bytes: &[u8; TRAILER_BYTES], size_bytes: u64) -> Result<Self, TrailerError> {
        if field::<8>(bytes, 0) != MAGIC {
            return Err(TrailerError::NoTrailer { size_bytes });
        }
        let version = u32::from_le_bytes(field(bytes, VERSION_AT));
        if version != VERSION {
            return Err(TrailerError::Version { version });
        }
        let (summed, _) = bytes.split_at(CHECKSUM_AT);
        if crc32c::crc32c(summed) != u32::from_le_bytes(field(bytes, CHECKSUM_AT)) {
            return Err(TrailerError::Damaged);
        }
        Ok(Self {
            id: MemoryId(field(bytes, ID_AT)),
            size_bytes: u64::from_le_bytes(field(bytes, SIZE_AT)),
            is_diff: u32::from_le_bytes(field(bytes, IS_DIFF_AT)) != 0,
        })
    }
}

fn field<const N: usize>(bytes: &[u8; TRAILER_BYTES], at: usize) -> [u8; N] {
    let field = bytes.get(at..at + N).and_then(|field| field.try_into().ok());
    field.expect("every field lies within the trailer")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::memory::seal::{Seal, Sum};
    use crate::snapshot::memory::{Kind, PageSet};

    fn table(id: u8) -> MemoryTable {
        let pages = PageSet::empty(1 << 20);
        MemoryTable::new(
            MemoryId([id; 16]),
            Kind::Full,
            Seal::Crc32c,
            pages,
            &[Sum::default(); 16],
        )
    }

    #[test]
    fn a_trailer_is_that_of_its_own_table_only() {
        let bytes = Trailer::of(&table(1)).to_bytes();
        assert_eq!(Trailer::check(&bytes, &table(1)), Ok(()));
        assert!(matches!(
            Trailer::check(&bytes, &table(2)),
            Err(TrailerError::OtherMemory { .. })
        ));
    }

    #[test]
    fn a_diff_is_not_taken_for_the_memory_that_it_was_merged_into() {
        let merged = table(1);
        let parent = MemoryId([2; 16]);
        let diff = MemoryTable::new(
            merged.id(),
            Kind::Diff { parent },
            Seal::Crc32c,
            PageSet::empty(1 << 20),
            &[Sum::default(); 16],
        );
        let trailer = |table: &MemoryTable| Trailer::of(table).to_bytes();
        assert_eq!(Trailer::check(&trailer(&diff), &diff), Ok(()));
        assert_eq!(Trailer::check(&trailer(&diff), &merged), Err(TrailerError::Diff));
        assert_eq!(Trailer::check(&trailer(&merged), &diff), Err(TrailerError::Full));
    }

    #[test]
    fn every_flipped_bit_is_an_error() {
        let bytes = Trailer::of(&table(1)).to_bytes();
        for bit in 0..TRAILER_BYTES * 8 {
            let mut damaged = bytes;
            if let Some(byte) = damaged.get_mut(bit / 8) {
                *byte ^= 1 << (bit % 8);
            }
            assert!(Trailer::check(&damaged, &table(1)).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_page_of_memory_is_no_trailer() {
        let refused = Trailer::parse(&[0; TRAILER_BYTES], 1 << 20);
        assert_eq!(refused, Err(TrailerError::NoTrailer { size_bytes: 1 << 20 }));
    }
}
