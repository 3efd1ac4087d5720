//! The chunks that a guest asked for first when it was last restored, in a small file beside the memory file.
//!
//! ```text
//!  0  magic          8
//!  8  version        4
//! 12  memory id     16
//! 28  count          4
//! 32  chunk numbers  4 each, ascending
//!     CRC32C of all that   4
//! ```
//!
//! Numbers are little-endian. The file only says what to read first: without it, or with a wrong one, everything comes as well.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use crate::snapshot::memory::MemoryId;

/// How long after the first fault those that come count.
const RECORDED_MS: u64 = 1_000;
/// How many chunks are recorded at most: 4 GiB of memory.
const CHUNKS_MAX: usize = 1 << 16;

const MAGIC: [u8; 8] = *b"CORACLWS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
const SUM_BYTES: usize = 4;
const FILE_BYTES_MAX: u64 = (HEADER_BYTES + CHUNKS_MAX * size_of::<u32>() + SUM_BYTES) as u64;

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
    #[error("its file is none of this version, or damaged")]
    Damaged,
    #[error("its file belongs to another memory")]
    Stranger,
}

/// The working set of the memory in the file `path` of this host; empty if none was recorded.
pub(super) fn read(path: &str, id: MemoryId) -> Result<Vec<usize>, WorkingSetError> {
    let mut options = OpenOptions::new();
    // O_NONBLOCK: opening a FIFO must not wait for its other end.
    let opened = options.read(true).custom_flags(libc::O_NONBLOCK).open(name(path));
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(WorkingSetError::Damaged);
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    parse(&bytes, id)
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

    /// Adds what was touched to what was recorded for the memory in the file `path` of this host.
    pub(super) fn write(&self, path: &str, id: MemoryId) -> io::Result<()> {
        if self.touched.is_empty() {
            return Ok(());
        }
        write(path, id, &[self.touched.as_slice(), &self.before].concat())
    }
}

/// Records `chunks` for the memory in the file `path` of this host, in the place of what was recorded before.
fn write(path: &str, id: MemoryId, chunks: &[usize]) -> io::Result<()> {
    // Another process may record the same memory: each writes a file of its own, and the last name counts.
    let draft = format!("{}.{}", name(path), std::process::id());
    let mut options = OpenOptions::new();
    let written = options
        .write(true)
        .create_new(true)
        .open(&draft)
        .and_then(|mut file: File| file.write_all(&bytes(id, chunks)))
        .and_then(|()| fs::rename(&draft, name(path)));
    if written.is_err() {
        // What cannot be removed either does no harm.
        let _ = fs::remove_file(&draft);
    }
    written
}

fn name(path: &str) -> String {
    format!("{path}.ws")
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
    let count = u32::try_from(chunks.len()).expect("there are few of them");
    let mut bytes = Vec::from(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(id.0);
    bytes.extend(count.to_le_bytes());
    bytes.extend(chunks.iter().flat_map(|chunk| chunk.to_le_bytes()));
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

fn parse(bytes: &[u8], id: MemoryId) -> Result<Vec<usize>, WorkingSetError> {
    let (summed, sum) = bytes.split_last_chunk().ok_or(WorkingSetError::Damaged)?;
    let (header, chunks) = summed
        .split_first_chunk::<HEADER_BYTES>()
        .ok_or(WorkingSetError::Damaged)?;
    let (chunks, rest) = chunks.as_chunks();
    let count = u32::try_from(chunks.len()).ok().filter(|_| rest.is_empty());
    let expected = |count: u32| [&MAGIC[..], &VERSION.to_le_bytes(), &id.0, &count.to_le_bytes()].concat();
    if crc32c::crc32c(summed) != u32::from_le_bytes(*sum) || chunks.len() > CHUNKS_MAX {
        return Err(WorkingSetError::Damaged);
    }
    match count {
        Some(count) if header[..] == expected(count) => {}
        _ if header.starts_with(&MAGIC) => return Err(WorkingSetError::Stranger),
        _ => return Err(WorkingSetError::Damaged),
    }
    let number = |bytes: &[u8; 4]| usize::try_from(u32::from_le_bytes(*bytes)).expect("a 64-bit host");
    Ok(chunks.iter().map(number).collect())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

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
