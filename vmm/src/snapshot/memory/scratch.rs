//! Memories and files for tests.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use coracle_storage::backend::{Access, Backend, Discard, Geometry};
use coracle_storage::raw::Raw;
use rustix::fs::{SeekFrom, seek};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::keys::{EncryptionKey, Protection, SigningKey, SnapshotCipher};
use crate::memory::{Backing, PageSize, allocate};

pub(super) const MIB: u64 = 1 << 20;

/// A new memory file of `mib` MiB.
pub(super) struct Scratch {
    pub(super) file: File,
    pub(super) size_bytes: u64,
}

impl Scratch {
    pub(super) fn new(mib: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        let size_bytes = mib * MIB;
        file.set_len(file_bytes(size_bytes)).unwrap();
        Self { file, size_bytes }
    }

    pub(super) fn image(&self) -> Box<dyn Backend> {
        image_on(self.file.try_clone().unwrap(), file_bytes(self.size_bytes))
    }

    /// What an eager restore would put into memory: the pages that the file has, and zeros.
    pub(super) fn content(&self) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(self.size_bytes).unwrap()];
        self.file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    /// Flips the lowest bit of a byte.
    pub(super) fn flip(&self, at: u64) {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, at).unwrap();
        self.file
            .write_all_at(&byte.map(|byte: u8| byte ^ 1), at)
            .unwrap();
    }

    /// How much of the file is no hole.
    pub(super) fn data_bytes(&self) -> u64 {
        let mut bytes = 0;
        let mut at = 0;
        while let Ok(data) = seek(&self.file, SeekFrom::Data(at)) {
            at = seek(&self.file, SeekFrom::Hole(data)).unwrap();
            bytes += at - data;
        }
        bytes
    }
}

pub(super) fn image_on(file: File, size_bytes: u64) -> Box<dyn Backend> {
    let geometry = Geometry {
        size_bytes,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access: Access::ReadWrite,
        discard: Discard::Supported,
    };
    Box::new(Raw::new(file, geometry))
}

pub(super) fn memory(mib: u64) -> Arc<GuestMemoryMmap> {
    allocate(mib, Backing::Anonymous, PageSize::Base).unwrap()
}

/// Fills a page with what depends on its number and on `seed`, and is no zeros.
pub(super) fn fill_page(memory: &GuestMemoryMmap, page: u64, seed: u64) {
    let word = |at: u64| (page << 20 | at << 8 | seed | 1 << 60).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bytes: Vec<u8> = (0..512).flat_map(|at| word(at).to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(page * 4096)).unwrap();
}

pub(super) fn zero_page(memory: &GuestMemoryMmap, page: u64) {
    memory
        .write_slice(&[0; PAGE_BYTES], GuestAddress(page * 4096))
        .unwrap();
}

/// All of a memory that has no gap.
pub(super) fn bytes_of(memory: &GuestMemoryMmap, mib: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(mib * MIB).unwrap()];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

pub(super) fn id(number: u8) -> MemoryId {
    MemoryId([number; 16])
}

pub(super) fn write_full(memory: &GuestMemoryMmap, number: u8, scratch: &Scratch) -> MemoryTable {
    let content = Content::Full(Untouched::Zeros);
    write(memory, plain(number), content, scratch.image(), &Progress::new()).unwrap()
}

/// A memory whose chunks have checksums.
pub(super) fn plain(number: u8) -> (MemoryId, Seal) {
    (id(number), Seal::Crc32c)
}

/// What a snapshot may be protected by: each kind once.
pub(super) fn protections() -> [Protection; 4] {
    let signing = || Some(SigningKey::of(1));
    let cipher = || Some(SnapshotCipher::new(EncryptionKey::of(2)).unwrap());
    [
        (None, None),
        (signing(), None),
        (None, cipher()),
        (signing(), cipher()),
    ]
    .map(|(signing, cipher)| Protection { signing, cipher })
}

/// A memory that `protection` is for.
pub(super) fn protected(number: u8, protection: &Protection) -> (MemoryId, Seal) {
    (id(number), Seal::new(id(number), protection))
}

/// All that was saved, checked and decrypted.
pub(super) fn opened(table: &MemoryTable, scratch: &Scratch) -> Result<Vec<u8>, ReadError> {
    let mut content = vec![0; usize::try_from(scratch.size_bytes).unwrap()];
    let mut reader = reader::Reader::new(table, scratch.image(), reader::Extent::Saved)?;
    while let Some((chunk, bytes)) = reader.next()? {
        let at = chunk * CHUNK_BYTES;
        content
            .get_mut(at..at + CHUNK_BYTES)
            .unwrap()
            .copy_from_slice(bytes);
    }
    Ok(content)
}

pub(super) fn set(size_bytes: u64, pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::empty(size_bytes);
    pages.into_iter().for_each(|page| set.insert(page, page + 1));
    set
}
