//! Guest memory that is all there before anybody sees it.

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};

use coracle_storage::pipeline::PipelineError;

use super::reading::{CheckedChunk, ChunkError, ChunkReader, Read, guest_address, saved_chunks};
use crate::snapshot::memory::MemoryTable;

/// Why memory could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A piece of it is not to be had.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// Nor is any other.
    #[error("cannot read the memory file any further")]
    Reading(#[from] PipelineError),
    /// The table is that of another memory.
    #[error("the saved memory does not fit that of the machine")]
    Memory(#[from] GuestMemoryError),
}

/// Loads all that `table` has into `memory`, which is zeros and has the same size.
///
/// # Errors
///
/// [`LoadError`]; the memory is then of no use.
pub(super) fn load(
    mut reader: ChunkReader,
    table: &MemoryTable,
    memory: &GuestMemoryMmap,
) -> Result<(), LoadError> {
    let mut chunks = saved_chunks(table);
    let mut next = chunks.next();
    while next.is_some() || reader.in_flight() > 0 {
        while let Some(chunk) = next.filter(|_| reader.has_room()) {
            reader.start(chunk);
            next = chunks.next();
        }
        match reader.next(None)? {
            Read::Chunk(chunk) => {
                let ranges = memory.iter().map(|region| (region.start_addr(), region.len()));
                put(&chunk, guest_address(ranges, chunk.chunk), memory)?;
                reader.recycle(chunk);
            }
            Read::Lost(_, error) => return Err(error.into()),
            Read::Signalled | Read::TimedOut => {}
        }
    }
    Ok(())
}

fn put(chunk: &CheckedChunk, at: GuestAddress, memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    chunk
        .runs()
        .try_for_each(|(offset, bytes)| memory.write_slice(bytes, GuestAddress(at.0 + offset as u64)))
}
