//! Reads a whole memory file, to know whether it is what was written.

use coracle_storage::backend::Backend;

use super::reader::{ReadError, Reader};
use super::{CHUNK_BYTES, MemoryTable, Progress};

/// Checks every page of the file on `image`, and its trailer, against `table`.
///
/// # Errors
///
/// The first that is not what was written, or what keeps it from being read.
pub fn verify(table: &MemoryTable, image: Box<dyn Backend>, progress: &Progress) -> Result<(), ReadError> {
    progress.begin(table.size_bytes());
    let mut reader = Reader::new(table, image)?;
    let mut done = 0;
    while let Some((chunk, _)) = reader.next()? {
        progress.add(((chunk + 1 - done) * CHUNK_BYTES) as u64);
        done = chunk + 1;
        if progress.is_cancelled() {
            return Err(ReadError::Cancelled);
        }
    }
    progress.add(((table.chunks() - done) * CHUNK_BYTES) as u64);
    Ok(())
}
