//! The memory table: what a memory file has, and what it adds up to.

use std::io;

use serde::{Deserialize, Serialize};

use super::pages::{PageSet, chunks_of, runs};
use super::seal::{Broken, Part, Seal, SealKind, Sum};
use super::{CHUNK_BYTES, PAGE_BYTES};
use crate::keys::{PublicKey, SnapshotCipher};

/// Names one memory file's content: that of no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MemoryId(pub [u8; 16]);

impl MemoryId {
    /// A new one.
    ///
    /// # Errors
    ///
    /// When the host has no random bytes.
    pub fn random() -> io::Result<Self> {
        let mut id = [0; 16];
        coracle_devices::random::fill(&mut id)?;
        Ok(Self(id))
    }
}

impl std::fmt::Display for MemoryId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What an absent page of a memory file means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// It is zeros.
    Full,
    /// It is as in the parent.
    Diff {
        /// The memory that this one goes on from.
        parent: MemoryId,
    },
}

/// The table as it is saved: a section of the state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryTableState {
    /// The memory file that it belongs to.
    pub id: MemoryId,
    /// Size of the memory, in bytes.
    pub size_bytes: u64,
    /// What an absent page means.
    pub kind: Kind,
    /// How its chunks are protected.
    pub seal: SealKind,
    /// One bit per page, the lowest of the first byte first: the file has it.
    #[serde(with = "serde_bytes")]
    pub pages: Vec<u8>,
    /// The sum of each chunk of which the file has a page, over those pages in order.
    #[serde(with = "serde_bytes")]
    pub sums: Vec<u8>,
}

/// The table as it was saved when there were checksums only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryTableStateV1 {
    id: MemoryId,
    size_bytes: u64,
    kind: Kind,
    #[serde(with = "serde_bytes")]
    pages: Vec<u8>,
    #[serde(with = "serde_bytes")]
    checksums: Vec<u8>,
}

impl From<MemoryTableStateV1> for MemoryTableState {
    fn from(first: MemoryTableStateV1) -> Self {
        Self {
            id: first.id,
            size_bytes: first.size_bytes,
            kind: first.kind,
            seal: SealKind::Crc32c,
            pages: first.pages,
            sums: first.checksums,
        }
    }
}

/// What a memory file has.
#[derive(Clone)]
pub struct MemoryTable {
    id: MemoryId,
    kind: Kind,
    seal: Seal,
    pages: PageSet,
    /// One for each chunk, one behind the other; zeros where the file has no page.
    sums: Vec<u8>,
}

/// Why a saved table is none of this machine's memory.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum TableError {
    #[error(
        "the snapshot has {saved_bytes} bytes of memory, and the machine that it describes has {size_bytes}"
    )]
    Size { saved_bytes: u64, size_bytes: u64 },
    #[error(
        "the memory table is damaged: {found} bytes of page bits where {size_bytes} bytes of memory have {expected}"
    )]
    Pages {
        size_bytes: u64,
        found: u64,
        expected: u64,
    },
    #[error(
        "the memory table is damaged: {found} bytes of checksums where the chunks that it has take {expected}"
    )]
    Sums { found: u64, expected: u64 },
    #[error(
        "the memory's parts are protected by {found}, and those of a state like this one by {expected}: it is another's table"
    )]
    Seal { found: SealKind, expected: SealKind },
}

/// A chunk that is not what was written.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the memory file is damaged: the {CHUNK_BYTES} bytes at {offset_bytes} are not those that were saved"
)]
pub struct Damage {
    /// Where the chunk starts in the file.
    pub offset_bytes: u64,
}

const PAGES_OF_BYTE: u64 = 8;

impl MemoryTable {
    /// A table of what was written; `sums` has one for each chunk.
    ///
    /// # Panics
    ///
    /// When there are not as many sums as chunks.
    pub(super) fn new(id: MemoryId, kind: Kind, seal: Seal, pages: PageSet, sums: &[Sum]) -> Self {
        assert!(
            pages.masks().len() == sums.len(),
            "whoever has summed a chunk up has both"
        );
        let len = seal.kind().sum_bytes();
        Self {
            id,
            kind,
            seal,
            pages,
            sums: sums.iter().flat_map(|sum| sum.bytes(len)).copied().collect(),
        }
    }

    /// The table for the state file.
    pub fn save(&self) -> MemoryTableState {
        let masks = self.pages.masks();
        let seal = self.seal.kind();
        let sums = self.sums.chunks_exact(seal.sum_bytes());
        let present = masks.iter().zip(sums).filter(|(mask, _)| **mask != 0);
        MemoryTableState {
            id: self.id,
            size_bytes: self.size_bytes(),
            kind: self.kind,
            seal,
            pages: masks.iter().flat_map(|mask| mask.to_le_bytes()).collect(),
            sums: present.flat_map(|(_, sum)| sum).copied().collect(),
        }
    }

    /// The table of `saved`, which may be anything, for a machine with `size_bytes` of memory; its state was signed by `signer`,
    /// if by anybody, and encrypted with `cipher`, if at all.
    ///
    /// # Errors
    ///
    /// When it is not one of such a memory. Nothing is allocated that is larger than the memory has chunks.
    ///
    /// # Panics
    ///
    /// When no machine has that much memory.
    pub fn restore(
        saved: &MemoryTableState,
        size_bytes: u64,
        signer: Option<PublicKey>,
        cipher: Option<&SnapshotCipher>,
    ) -> Result<Self, TableError> {
        if saved.size_bytes != size_bytes {
            return Err(TableError::Size {
                saved_bytes: saved.size_bytes,
                size_bytes,
            });
        }
        let seal = Seal::of_saved(saved.id, signer, cipher);
        if saved.seal != seal.kind() {
            return Err(TableError::Seal {
                found: saved.seal,
                expected: seal.kind(),
            });
        }
        let chunks = chunks_of(size_bytes);
        let expected = size_bytes / PAGE_BYTES as u64 / PAGES_OF_BYTE;
        let (masks, rest) = saved.pages.as_chunks();
        if masks.len() != chunks || !rest.is_empty() {
            let found = saved.pages.len() as u64;
            return Err(TableError::Pages {
                size_bytes,
                found,
                expected,
            });
        }
        let masks: Vec<u16> = masks.iter().map(|mask| u16::from_le_bytes(*mask)).collect();
        let present = masks.iter().filter(|mask| **mask != 0).count();
        let len = saved.seal.sum_bytes();
        if saved.sums.len() != present * len {
            return Err(TableError::Sums {
                found: saved.sums.len() as u64,
                expected: (present * len) as u64,
            });
        }
        let mut sums = vec![0; chunks * len];
        let places = sums.chunks_exact_mut(len).zip(&masks);
        let places = places.filter(|(_, mask)| **mask != 0);
        for ((place, _), sum) in places.zip(saved.sums.chunks_exact(len)) {
            place.copy_from_slice(sum);
        }
        Ok(Self {
            id: saved.id,
            kind: saved.kind,
            seal,
            pages: PageSet::of_masks(masks),
            sums,
        })
    }

    /// How its chunks are protected.
    pub fn seal(&self) -> &Seal {
        &self.seal
    }

    /// The memory file that it belongs to.
    pub fn id(&self) -> MemoryId {
        self.id
    }

    /// What an absent page means.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Size of the memory, in bytes; the file has a trailer behind it.
    pub fn size_bytes(&self) -> u64 {
        self.pages.size_bytes()
    }

    /// The pages that the file has.
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// How many chunks there are, of which the file has all, some or no pages.
    pub fn chunks(&self) -> usize {
        self.pages.masks().len()
    }

    /// Which pages of `chunk` the file has: one bit for each, the lowest first. None of a chunk that there is not.
    pub fn mask(&self, chunk: usize) -> u16 {
        self.pages.mask(chunk)
    }

    /// Checks what was read of the file at `chunk`, whole, and makes of it what the memory had. Afterwards the pages of `bytes`
    /// that the file does not have are zeros, whatever they were in the file.
    ///
    /// # Errors
    ///
    /// When the others are not what was written: none of it may be used.
    ///
    /// # Panics
    ///
    /// When `bytes` are no chunk.
    pub fn check(&self, chunk: usize, bytes: &mut [u8]) -> Result<(), Damage> {
        assert!(bytes.len() == CHUNK_BYTES, "a chunk is checked whole");
        let mask = self.mask(chunk);
        if mask != 0 {
            let damage = Damage {
                offset_bytes: (chunk * CHUNK_BYTES) as u64,
            };
            let part = Part { chunk, mask };
            let opened = self.seal.open(part, bytes, self.sum(chunk));
            opened.map_err(|Broken| damage)?;
        }
        for absent in runs(&[!mask]) {
            if let Some(absent) = bytes.get_mut(absent.start * PAGE_BYTES..absent.end * PAGE_BYTES) {
                absent.fill(0);
            }
        }
        Ok(())
    }

    /// Where in the file the first byte lies that is no zero, in a page of `chunk` that the file does not have; `bytes` were read
    /// of it, whole.
    pub fn stray(&self, chunk: usize, bytes: &[u8]) -> Option<u64> {
        let pages = bytes.as_chunks::<PAGE_BYTES>().0.iter().enumerate();
        let mut absent = pages.filter(|(page, _)| self.mask(chunk) & 1 << page == 0);
        let (page, bytes) = absent.find(|(_, bytes)| **bytes != [0; PAGE_BYTES])?;
        let byte = bytes.iter().position(|byte| *byte != 0)?;
        Some((chunk * CHUNK_BYTES + page * PAGE_BYTES + byte) as u64)
    }
}

impl MemoryTable {
    fn sum(&self, chunk: usize) -> &[u8] {
        let mut sums = self.sums.chunks_exact(self.seal.kind().sum_bytes());
        sums.nth(chunk).unwrap_or_default()
    }
}

impl std::fmt::Debug for MemoryTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryTable")
            .field("id", &format_args!("{}", self.id))
            .field("kind", &self.kind)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
