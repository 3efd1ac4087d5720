//! Reads a whole memory file, to know whether it is what was written.

use coracle_storage::backend::Backend;

use super::reader::{Extent, ReadError, Reader};
use super::{CHUNK_BYTES, MemoryTable, Progress};

/// Checks every page of the file on `image`, and its trailer, against `table`; and that there is nothing where it has no page.
///
/// # Errors
///
/// The first that is not what was written, or what keeps it from being read; if everything that was saved is right, where
/// something else is.
pub fn verify(table: &MemoryTable, image: Box<dyn Backend>, progress: &Progress) -> Result<(), ReadError> {
    progress.begin(table.size_bytes());
    let mut reader = Reader::new(table, image, Extent::Whole)?;
    while reader.next()?.is_some() {
        progress.add(CHUNK_BYTES as u64);
        if progress.is_cancelled() {
            return Err(ReadError::Cancelled);
        }
    }
    reader.end()
}
