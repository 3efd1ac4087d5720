//! The chunks that a guest asked for first when it was last restored, in a small file beside the memory file, here or on its
//! server.
//!
//! ```text
//!  0  magic          8
//!  8  version        4
//! 12  memory id     16
//! 28  count          4
//! 32  chunk numbers  4 each, ascending
//!     zeros, up to whole sectors of 512: a server's file is opened as a disk is
//! -4  CRC32C of all that   4
//! ```
//!
//! Numbers are little-endian. The file only says what to read first: without it, or with a wrong one, everything comes as well.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use coracle_storage::backend::Access;
use coracle_storage::blocking::Blocking;
use coracle_storage::draft::{Draft, DraftError};
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::{self, OpenError};
use coracle_storage::request::Failure;

use crate::snapshot::memory::MemoryId;
use crate::snapshot::write_whole;

/// How long after the first fault those that come count.
const RECORDED_MS: u64 = 1_000;
/// How many chunks are recorded at most: 4 GiB of memory.
const CHUNKS_MAX: usize = 1 << 16;

const MAGIC: [u8; 8] = *b"CORACLWS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
const SUM_BYTES: usize = 4;
const SECTOR_BYTES: usize = 512;
const FILE_BYTES_MAX: u64 = file_bytes(CHUNKS_MAX) as u64;

/// Takes down what a guest asks for at first.
pub(super) struct Recorder {
    /// That of the last time: as it was read first, the guest waits for nothing of it now.
    before: Vec<usize>,
    touched: Vec<usize>,
    /// Until when; set by the first fault.
    until: Option<Instant>,
}

/// Why there is no working set to be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkingSetError {
    #[error("its file cannot be read")]
    Read(#[from] io::Error),
    #[error("its file cannot be opened")]
    Open(#[from] OpenError),
    #[error("its file cannot be read")]
    Storage(#[source] Failure),
    #[error("its file is none of this version, or damaged")]
    Damaged,
    #[error("its file belongs to another memory")]
    Stranger,
}

/// Why none is recorded.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecordError {
    #[error(transparent)]
    Draft(#[from] DraftError),
    #[error("its file cannot be written")]
    Write(#[source] Failure),
}

/// The working set of the memory in the file `path`; empty if none was recorded, or an error, too, where a server has it. Waits
/// for the server.
pub(super) fn read(path: &str, id: MemoryId, owner: &Owner) -> Result<Vec<usize>, WorkingSetError> {
    let bytes = if open::is_remote(path) {
        read_from_server(&name(path), owner)?
    } else {
        match read_here(&name(path)) {
            Err(WorkingSetError::Read(error)) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Vec::new());
            }
            read => read?,
        }
    };
    parse(&bytes, id)
}

fn read_here(name: &str) -> Result<Vec<u8>, WorkingSetError> {
    let mut options = OpenOptions::new();
    // O_NONBLOCK: opening a FIFO must not wait for its other end.
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(name)?;
    if !file.metadata()?.is_file() {
        return Err(WorkingSetError::Damaged);
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn read_from_server(url: &str, owner: &Owner) -> Result<Vec<u8>, WorkingSetError> {
    let terms = Terms::new(Lock::None, owner);
    let image = open::open(url, Access::ReadOnly, &terms)?.backend;
    let size_bytes = image.geometry().size_bytes;
    if size_bytes > FILE_BYTES_MAX {
        return Err(WorkingSetError::Damaged);
    }
    let mut bytes = vec![0; usize::try_from(size_bytes).expect("a 64-bit host")];
    let mut image = Blocking::new(image)?;
    image.read_at(0, &mut bytes).map_err(WorkingSetError::Storage)?;
    Ok(bytes)
}

impl Recorder {
    /// One that has seen nothing; `before` is what was recorded the last time.
    pub(super) fn new(before: Vec<usize>) -> Self {
        Self {
            before,
            touched: Vec::new(),
            until: None,
        }
    }

    /// Takes in that somebody touched `chunk` and has to wait for it.
    pub(super) fn add(&mut self, chunk: usize) {
        let now = Instant::now();
        let until = self.until.get_or_insert(now + Duration::from_millis(RECORDED_MS));
        if now < *until && self.touched.len() < CHUNKS_MAX {
            self.touched.push(chunk);
        }
    }

    /// Adds what was touched to what was recorded for the memory in the file `path`.
    pub(super) fn write(&self, path: &str, id: MemoryId) -> Result<(), RecordError> {
        if self.touched.is_empty() {
            return Ok(());
        }
        write(path, id, &[self.touched.as_slice(), &self.before].concat())
    }
}

/// Records `chunks` for the memory in the file `path`, in the place of what was recorded before. Another process may record the
/// same memory: the last one counts.
fn write(path: &str, id: MemoryId, chunks: &[usize]) -> Result<(), RecordError> {
    let bytes = bytes(id, chunks);
    let draft = Draft::create(&name(path), bytes.len() as u64)?;
    write_whole(draft.image()?, &bytes).map_err(RecordError::Write)?;
    Ok(draft.publish()?)
}

/// Of a URL its path gets longer, not its options.
fn name(path: &str) -> String {
    let options_at = path.find('?').filter(|_| open::is_remote(path));
    let (path, options) = path.split_at(options_at.unwrap_or(path.len()));
    format!("{path}.ws{options}")
}

fn bytes(id: MemoryId, chunks: &[usize]) -> Vec<u8> {
    // Beyond 2^32 chunks lies no guest's memory.
    let mut chunks: Vec<u32> = chunks
        .iter()
        .filter_map(|chunk| u32::try_from(*chunk).ok())
        .collect();
    chunks.sort_unstable();
    chunks.dedup();
    chunks.truncate(CHUNKS_MAX);
    let mut bytes = header(id, chunks.len());
    bytes.extend(chunks.iter().flat_map(|chunk| chunk.to_le_bytes()));
    bytes.resize(file_bytes(chunks.len()) - SUM_BYTES, 0);
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

fn header(id: MemoryId, count: usize) -> Vec<u8> {
    let count = u32::try_from(count).expect("there are few of them");
    let mut bytes = Vec::from(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(id.0);
    bytes.extend(count.to_le_bytes());
    bytes
}

/// The length of a file with so many chunks.
const fn file_bytes(count: usize) -> usize {
    (HEADER_BYTES + count * size_of::<u32>() + SUM_BYTES).next_multiple_of(SECTOR_BYTES)
}

fn parse(bytes: &[u8], id: MemoryId) -> Result<Vec<usize>, WorkingSetError> {
    let (summed, sum) = bytes.split_last_chunk().ok_or(WorkingSetError::Damaged)?;
    if crc32c::crc32c(summed) != u32::from_le_bytes(*sum) {
        return Err(WorkingSetError::Damaged);
    }
    let (found, rest) = summed
        .split_first_chunk::<HEADER_BYTES>()
        .ok_or(WorkingSetError::Damaged)?;
    let (_, count) = found
        .split_last_chunk()
        .expect("a header is longer than its last field");
    let count = usize::try_from(u32::from_le_bytes(*count)).expect("a 64-bit host");
    if !found.starts_with(&MAGIC) || count > CHUNKS_MAX || bytes.len() != file_bytes(count) {
        return Err(WorkingSetError::Damaged);
    }
    if found[..] != header(id, count) {
        return Err(WorkingSetError::Stranger);
    }
    let (chunks, _) = rest.as_chunks();
    let number = |bytes: &[u8; 4]| usize::try_from(u32::from_le_bytes(*bytes)).expect("a 64-bit host");
    Ok(chunks.iter().take(count).map(number).collect())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::fs;

    use super::*;
    use crate::memory::testing::owner;

    fn read(path: &str, id: MemoryId) -> Result<Vec<usize>, WorkingSetError> {
        super::read(path, id, &owner())
    }

    const ID: MemoryId = MemoryId([3; 16]);

    #[test]
    fn what_was_recorded_is_read_in_the_order_of_addresses_and_replaces_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory").to_str().unwrap().to_owned();
        assert!(read(&path, ID).unwrap().is_empty());
        for (chunks, expected) in [(vec![9, 2, 2, 7], vec![2, 7, 9]), (vec![1], vec![1])] {
            write(&path, ID, &chunks).unwrap();
            assert_eq!(read(&path, ID).unwrap(), expected);
        }
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "nothing else is left"
        );
        let stranger = read(&path, MemoryId([4; 16]));
        assert!(matches!(stranger, Err(WorkingSetError::Stranger)), "{stranger:?}");
    }

    #[test]
    fn the_file_lies_beside_that_of_the_memory() {
        assert_eq!(name("/a/m?x"), "/a/m?x.ws");
        assert_eq!(
            name("nfs://host/export/m?nfsvers=3"),
            "nfs://host/export/m.ws?nfsvers=3"
        );
        assert_eq!(name("nfs://host/export/m"), "nfs://host/export/m.ws");
    }

    #[test]
    fn what_is_touched_is_added_to_what_was_recorded_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory").to_str().unwrap().to_owned();
        let mut recorder = Recorder::new(vec![4, 8]);
        recorder.write(&path, ID).unwrap();
        assert!(read(&path, ID).unwrap().is_empty(), "there is nothing new");
        recorder.add(6);
        recorder.add(4);
        // The first second is over.
        recorder.until = Some(Instant::now());
        recorder.add(5);
        recorder.write(&path, ID).unwrap();
        assert_eq!(read(&path, ID).unwrap(), [4, 6, 8]);
    }

    #[test]
    fn every_flipped_bit_and_every_other_length_is_refused() {
        let whole = bytes(ID, &(0..20).collect::<Vec<_>>());
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged
                .get_mut(bit / 8)
                .map(|byte| *byte ^= 1 << (bit % 8))
                .unwrap();
            assert!(parse(&damaged, ID).is_err(), "bit {bit}");
        }
        for len in 0..whole.len() {
            assert!(parse(whole.get(..len).unwrap(), ID).is_err(), "{len} bytes");
        }
        assert!(parse(&[whole, vec![0]].concat(), ID).is_err());
    }

    #[test]
    fn no_more_is_recorded_than_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory").to_str().unwrap().to_owned();
        write(&path, ID, &(0..100_000).collect::<Vec<_>>()).unwrap();
        assert_eq!(read(&path, ID).unwrap().len(), CHUNKS_MAX);
        fs::write(name(&path), vec![0; 1 << 20]).unwrap();
        assert!(matches!(read(&path, ID), Err(WorkingSetError::Damaged)));
    }

    #[test]
    fn a_folder_that_cannot_be_written_keeps_nothing_half_done() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory").to_str().unwrap().to_owned();
        fs::create_dir(name(&path)).unwrap();
        write(&path, ID, &[1]).unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(read(&path, ID).is_err());
    }
}
