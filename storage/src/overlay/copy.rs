//! An overlay as a file of its own: written from one that stands still, and taken up by another machine.
//!
//! What a file adds up to does not depend on where it has holes: only blocks that are not zeros count, each with its place.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Weak};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::file::{FileError, OverlayFile};
use super::format::{BITMAP_OFFSET_BYTES, DATA_OFFSET_BYTES, Header};
use super::words::Words;
use crate::open::ImageId;

/// What counts as zeros or not, in bytes.
const BLOCK_BYTES: usize = 4096;
/// What is read at a time, in bytes.
const PIECE_BYTES: usize = 1 << 20;

/// What an overlay file adds up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// How long it is.
    pub length_bytes: u64,
    /// CRC32C of its blocks of 4 KiB that are not zeros, each after its place as a little-endian number of 64 bits.
    pub crc32c: u32,
}

impl Digest {
    fn of_zeros(length_bytes: u64) -> Self {
        Self {
            length_bytes,
            crc32c: 0,
        }
    }

    /// Takes in what lies at `offset_bytes`, which follows on what was taken in before.
    fn add(&mut self, offset_bytes: u64, bytes: &[u8]) {
        for (block, at) in bytes
            .chunks(BLOCK_BYTES)
            .zip((offset_bytes..).step_by(BLOCK_BYTES))
        {
            if !is_zeros(block) {
                let crc = crc32c::crc32c_append(self.crc32c, &at.to_le_bytes());
                self.crc32c = crc32c::crc32c_append(crc, block);
            }
        }
    }
}

/// An overlay of a machine, as whoever copies it sees it while nobody writes.
#[derive(Clone, Debug)]
pub struct View {
    /// The lease of the file ends with its last user, and this is none.
    file: Weak<File>,
    words: Arc<Words>,
}

/// Why an overlay is not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// It is gone.
    #[error("the overlay is not in use any more")]
    Gone,
    /// It is none.
    #[error(transparent)]
    File(#[from] FileError),
    /// The host says no.
    #[error("cannot copy the overlay")]
    Host(#[from] io::Error),
    /// Somebody wanted it no more.
    #[error("the copy was cancelled")]
    Cancelled,
}

impl View {
    pub(super) fn new(file: &Arc<File>, words: Arc<Words>) -> Self {
        Self {
            file: Arc::downgrade(file),
            words,
        }
    }

    /// How much there may be to copy, in bytes: what the file takes of its medium.
    pub fn allocated_bytes(&self) -> u64 {
        let metadata = self.file.upgrade().and_then(|file| file.metadata().ok());
        metadata.map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// The file by a descriptor of its own, for whoever reads it while it is written: `path` names it. A jail has no /proc by
    /// which it could be opened without a name.
    ///
    /// # Errors
    ///
    /// When it is gone, cannot be opened, or `path` names another by now.
    pub(crate) fn reader(&self, path: &str) -> io::Result<File> {
        let file = self.file.upgrade().ok_or(io::ErrorKind::NotFound)?;
        ImageId::of(&file.metadata()?).reader(path)
    }

    /// Writes into `to`, an empty file, what the overlay has, and tells what that adds up to. It is not on the medium yet. Nobody
    /// writes the overlay meanwhile; `is_wanted` is told of every so many bytes that were copied.
    ///
    /// # Errors
    ///
    /// [`CopyError`]; what is in `to` is of no use then.
    pub fn write_to(&self, to: &File, mut is_wanted: impl FnMut(u64) -> bool) -> Result<Digest, CopyError> {
        let file = self.file.upgrade().ok_or(CopyError::Gone)?;
        let overlay = OverlayFile::of(file.try_clone()?, "of the machine")?;
        drop(file);
        let header = Header {
            sequence: 0,
            ..overlay.header().clone()
        };
        let length_bytes = DATA_OFFSET_BYTES + header.size_bytes;
        to.set_len(length_bytes)?;
        let mut digest = Digest::of_zeros(length_bytes);
        let mut put = |offset_bytes: u64, bytes: &[u8]| {
            digest.add(offset_bytes, bytes);
            to.write_all_at(bytes, offset_bytes)
        };
        put(
            0,
            &header.encode().expect("a header that was read can be written"),
        )?;
        // The file's own bits may be behind, or, of a temporary overlay, were never written. Whole blocks, as they are read.
        let words = header.shape().cluster_count().div_ceil(64);
        let words = usize::try_from(words).expect("the format has a limit");
        let words = words.next_multiple_of(BLOCK_BYTES / size_of::<u64>());
        put(BITMAP_OFFSET_BYTES, &self.words.bytes(words))?;
        each_run(
            overlay.file(),
            DATA_OFFSET_BYTES..length_bytes,
            |offset_bytes, run| {
                put(offset_bytes, run)?;
                if is_wanted(run.len() as u64) {
                    Ok(())
                } else {
                    Err(CopyError::Cancelled)
                }
            },
        )?;
        Ok(digest)
    }
}

/// Makes `to`, an empty file, the same as `from`: they share their blocks where the file system can do that, and else what is not
/// zeros is copied. Tells what `to` adds up to, which whoever changes `from` meanwhile cannot make wrong.
///
/// # Errors
///
/// What the host says.
pub(super) fn copy(from: &File, to: &File) -> io::Result<Digest> {
    let is_shared = rustix::fs::ioctl_ficlone(to, from).is_ok();
    let source = if is_shared { to } else { from };
    let length_bytes = source.metadata()?.len();
    if !is_shared {
        to.set_len(length_bytes)?;
    }
    let mut digest = Digest::of_zeros(length_bytes);
    each_run(source, 0..length_bytes, |offset_bytes, run| {
        digest.add(offset_bytes, run);
        if is_shared {
            return Ok(());
        }
        to.write_all_at(run, offset_bytes)
    })?;
    Ok(digest)
}

/// What the overlay file `file` adds up to.
///
/// # Errors
///
/// What the host says.
pub fn digest(file: &File) -> io::Result<Digest> {
    let length_bytes = file.metadata()?.len();
    let mut digest = Digest::of_zeros(length_bytes);
    each_run(file, 0..length_bytes, |offset_bytes, run| {
        digest.add(offset_bytes, run);
        io::Result::Ok(())
    })?;
    Ok(digest)
}

/// Hands out what `file` has in `range`, which begins with a block: runs of blocks that are not zeros, in their order.
fn each_run<E: From<io::Error>>(
    file: &File,
    range: Range<u64>,
    mut run: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = range.start;
    while let Some(data) = next_data(file, at)?.filter(|data| *data < range.end) {
        // Data may begin within a block.
        let start = data.max(at) / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        let len = (range.end - start).min(PIECE_BYTES as u64);
        let len = usize::try_from(len).expect("a piece is no longer than that");
        let bytes = piece.get_mut(..len).expect("a piece is no longer than that");
        file.read_exact_at(bytes, start)?;
        each_nonzero(bytes, |offset, bytes| run(start + offset, bytes))?;
        at = start + len as u64;
    }
    Ok(())
}

fn each_nonzero<E>(bytes: &[u8], mut run: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
    let mut offset = 0;
    let blocks: Vec<&[u8]> = bytes.chunks(BLOCK_BYTES).collect();
    for alike in blocks.chunk_by(|a, b| is_zeros(a) == is_zeros(b)) {
        let len: usize = alike.iter().map(|block| block.len()).sum();
        let part = bytes.get(offset..offset + len).expect("blocks are parts of it");
        if !is_zeros(part) {
            run(offset as u64, part)?;
        }
        offset += len;
    }
    Ok(())
}

fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn is_zeros(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}
