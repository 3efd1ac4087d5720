//! Memory files for tests.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use coracle_storage::backend::{Access, Backend, Discard, Geometry};
use coracle_storage::lease::Owner;
use coracle_storage::raw::Raw;
use tempfile::{NamedTempFile, TempDir};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::chunk::Pages;
use super::reading::saved_chunks;
use super::restore::{SavedMemory, Verify};
use super::{MIB, PageSize};
use crate::snapshot::memory::{
    CHUNK_BYTES, Kind, MemoryId, MemoryTable, MemoryTableState, PAGE_BYTES, SealKind, Trailer, file_bytes,
};

/// A memory file, and what it has.
pub(super) struct Snapshot {
    pub(super) file: NamedTempFile,
    /// Where it lies, and what is recorded beside it.
    _folder: TempDir,
    pub(super) path: String,
    pub(super) table: Arc<MemoryTable>,
    /// The memory that was saved.
    pub(super) bytes: Vec<u8>,
}

/// Whose memory it is.
pub(super) fn owner() -> Owner {
    Owner::of_this_process("test")
}

impl Snapshot {
    /// Of `mib` MiB that depend on `seed`: chunks of every kind, those without a page among them.
    pub(super) fn new(mib: u64, seed: u64) -> Self {
        let mut dice = Dice(seed);
        let mut bytes = vec![0; usize::try_from(mib * MIB).unwrap()];
        let (mut pages, mut sums) = (Vec::new(), Vec::new());
        for chunk in bytes.chunks_mut(CHUNK_BYTES) {
            let mask = match dice.next() % 4 {
                0 => 0,
                1 => u16::MAX,
                _ => u16::try_from(dice.next() & 0xffff).unwrap(),
            };
            let mut sum = 0;
            for run in Pages(mask).runs() {
                let run = &mut chunk[run];
                run.fill_with(|| u8::try_from(dice.next() & 0xff).unwrap());
                sum = crc32c::crc32c_append(sum, run);
            }
            pages.extend(mask.to_le_bytes());
            if mask != 0 {
                sums.extend(sum.to_le_bytes());
            }
        }
        let size_bytes = bytes.len() as u64;
        let (id, kind) = (MemoryId([0xab; 16]), Kind::Full);
        let saved = MemoryTableState {
            id,
            size_bytes,
            kind,
            seal: SealKind::Crc32c,
            pages,
            sums,
        };
        let table = MemoryTable::restore(&saved, size_bytes, None, None).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut file = NamedTempFile::new_in(&folder).unwrap();
        file.write_all(&bytes).unwrap();
        file.write_all(&Trailer::of(&table).to_bytes()).unwrap();
        Self {
            path: file.path().to_str().unwrap().to_owned(),
            file,
            _folder: folder,
            table: Arc::new(table),
            bytes,
        }
    }

    /// The same memory in another file, into which `write` writes it as this id.
    pub(super) fn written_anew(&self, write: impl FnOnce(MemoryId, Box<dyn Backend>) -> MemoryTable) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = NamedTempFile::new_in(&folder).unwrap();
        let size_bytes = file_bytes(self.bytes.len() as u64);
        file.as_file().set_len(size_bytes).unwrap();
        let geometry = Geometry {
            size_bytes,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            access: Access::ReadWrite,
            discard: Discard::Supported,
        };
        let image = Raw::new(file.reopen().unwrap(), geometry);
        let table = write(MemoryId([0xcd; 16]), Box::new(image));
        Self {
            path: file.path().to_str().unwrap().to_owned(),
            file,
            _folder: folder,
            table: Arc::new(table),
            bytes: self.bytes.clone(),
        }
    }

    /// The chunks of which anything was saved.
    pub(super) fn saved_chunks(&self) -> Vec<usize> {
        saved_chunks(&self.table).collect()
    }

    /// The first byte that was saved of `chunk`.
    pub(super) fn first_byte(&self, chunk: usize) -> usize {
        chunk * CHUNK_BYTES + Pages(self.table.mask(chunk)).span().start
    }

    /// What is asked for to have it back.
    pub(super) fn saved<'a>(&'a self, verify: Verify, owner: &'a Owner) -> SavedMemory<'a> {
        SavedMemory {
            path: &self.path,
            table: Arc::clone(&self.table),
            hotplug: None,
            verify,
            pages: PageSize::Base,
            owner,
        }
    }
}

/// Numbers that look random.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    /// The next one, by SplitMix64.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// One below `end`.
    pub(super) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }
}

/// Reads a byte of guest memory on a thread of its own, which may have to wait for it.
pub(crate) fn touch(memory: &Arc<GuestMemoryMmap>, offset_bytes: usize) -> Receiver<u8> {
    let (outbox, inbox) = channel();
    let memory = Arc::clone(memory);
    let address = vm_memory::GuestAddress(offset_bytes as u64);
    std::thread::spawn(move || outbox.send(memory.read_obj(address).unwrap()));
    inbox
}

/// Whether whoever touches memory still waits after a time in which it would have come.
pub(crate) fn waits(touched: &Receiver<u8>) -> bool {
    touched.recv_timeout(Duration::from_millis(200)) == Err(RecvTimeoutError::Timeout)
}

/// How many pages from `address` on, as far as `pages`, have a page frame.
pub(super) fn resident(address: u64, pages: usize) -> usize {
    use std::os::unix::fs::FileExt;
    const PRESENT: u64 = 1 << 63;
    let mut entries = vec![0; pages * 8];
    let map = File::open("/proc/self/pagemap").unwrap();
    map.read_exact_at(&mut entries, address / PAGE_BYTES as u64 * 8)
        .unwrap();
    let entries = entries.as_chunks().0.iter();
    entries
        .filter(|entry| u64::from_le_bytes(**entry) & PRESENT != 0)
        .count()
}
