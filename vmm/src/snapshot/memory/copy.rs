//! Copies a whole memory file, and only what is what was written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use coracle_storage::backend::Backend;

use super::pages::runs;
use super::reader::{Extent, ReadError, Reader};
use super::trailer::Trailer;
use super::{CHUNK_BYTES, MemoryTable, PAGE_BYTES, Progress};

/// Why a memory file is not copied.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum CopyError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("cannot write the copy of the snapshot's memory")]
    Write(#[source] io::Error),
}

/// Copies the memory file of `table` on `image` to `to`, which is as long and all holes: every page is checked before it is
/// written, and what the file does not have stays a hole.
///
/// # Errors
///
/// The first page that is not what was written, or what keeps it from being read or written; the copy is then of no use.
pub fn copy(
    table: &MemoryTable,
    image: Box<dyn Backend>,
    to: &File,
    progress: &Progress,
) -> Result<(), CopyError> {
    progress.begin(table.size_bytes());
    let mut reader = Reader::new(table, image, Extent::Saved)?;
    let mut done = 0;
    while let Some((chunk, bytes)) = reader.next()? {
        let start = (chunk * CHUNK_BYTES) as u64;
        for run in runs(&[table.mask(chunk)]) {
            let run = run.start * PAGE_BYTES..run.end * PAGE_BYTES;
            let at = start + run.start as u64;
            let run = bytes.get(run).expect("a chunk's pages lie within it");
            to.write_all_at(run, at).map_err(CopyError::Write)?;
        }
        progress.add(((chunk + 1 - done) * CHUNK_BYTES) as u64);
        done = chunk + 1;
        if progress.is_cancelled() {
            return Err(ReadError::Cancelled.into());
        }
    }
    progress.add(((table.chunks() - done) * CHUNK_BYTES) as u64);
    let trailer = Trailer::of(table).to_bytes();
    to.write_all_at(&trailer, table.size_bytes())
        .map_err(CopyError::Write)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::super::Damage;
    use super::super::scratch::{Scratch, bytes_of, fill_page, memory, write_full};
    use super::*;

    fn saved() -> (Scratch, MemoryTable, Vec<u8>) {
        let (memory, scratch) = (memory(4), Scratch::new(4));
        [0, 3, 4, 500, 1023]
            .into_iter()
            .for_each(|page| fill_page(&memory, page, 7));
        let table = write_full(&memory, 1, &scratch);
        (scratch, table, bytes_of(&memory, 4))
    }

    #[test]
    fn a_copy_has_the_same_pages_the_same_holes_and_belongs_to_the_same_state() {
        let (scratch, table, bytes) = saved();
        let to = Scratch::new(4);
        copy(&table, scratch.image(), &to.file, &Progress::new()).unwrap();
        assert_eq!(to.content(), bytes);
        assert_eq!(
            to.data_bytes(),
            6 * PAGE_BYTES as u64,
            "five pages and the trailer"
        );
        super::super::verify(&table, to.image(), &Progress::new()).unwrap();
    }

    #[test]
    fn what_is_not_as_it_was_written_is_not_copied() {
        let (scratch, table, _) = saved();
        scratch.flip(500 * 4096 + 17);
        let to = Scratch::new(4);
        let error = copy(&table, scratch.image(), &to.file, &Progress::new()).unwrap_err();
        let chunk_at = 500 * 4096 / CHUNK_BYTES as u64 * CHUNK_BYTES as u64;
        let CopyError::Read(ReadError::Damage(Damage { offset_bytes })) = error else {
            panic!("{error:?}");
        };
        assert_eq!(offset_bytes, chunk_at);
    }
}
