//! Makes one memory file of two: what a diff has, over what its parent has.

use coracle_storage::backend::Backend;

use super::output::Output;
use super::pages::{PageSet, runs};
use super::reader::{Extent, ReadError, Reader};
use super::seal::{Part, Seal, Sum};
use super::table::{Kind, MemoryId, MemoryTable};
use super::writer::{WriteError, finish, pages_with_content};
use super::{CHUNK_BYTES, PAGE_BYTES, Progress, file_bytes};

/// A memory file, and what it has.
pub struct Source<'t> {
    /// Its table.
    pub table: &'t MemoryTable,
    /// The file.
    pub image: Box<dyn Backend>,
}

/// Why two memory files do not become one. What there is of it is of no use.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum MergeError {
    #[error(
        "the second snapshot is a full one: merge the diffs that follow a snapshot into it, in their order"
    )]
    NotADiff,
    #[error(
        "the diff goes on from memory {parent}, and the first snapshot is memory {base}: merge in the order in which they came"
    )]
    OtherParent { parent: MemoryId, base: MemoryId },
    #[error("the diff is of a memory of {diff_bytes} bytes, and the first snapshot of one of {base_bytes}")]
    Size { diff_bytes: u64, base_bytes: u64 },
    #[error("the first snapshot")]
    Base(#[source] ReadError),
    #[error("the diff")]
    Diff(#[source] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Writes what `diff` has over what `base` has, as memory `id` under `seal`, to `image`: a new file that reads as zeros. Both are
/// checked as they are read. When it returns all is on the medium, and the table says what the file has. It is full if `base` is.
///
/// # Errors
///
/// When they do not follow each other, are damaged, or cannot be read or written.
pub fn merge(
    base: Source<'_>,
    diff: Source<'_>,
    (id, seal): (MemoryId, Seal),
    image: Box<dyn Backend>,
    progress: &Progress,
) -> Result<MemoryTable, MergeError> {
    check(base.table, diff.table)?;
    let size_bytes = base.table.size_bytes();
    let (found, expected) = (image.geometry().size_bytes, file_bytes(size_bytes));
    if found != expected {
        return Err(WriteError::FileSize { found, expected }.into());
    }
    progress.begin(size_bytes);
    let mut base = Layer::new(base).map_err(MergeError::Base)?;
    let mut diff = Layer::new(diff).map_err(MergeError::Diff)?;
    let mut output = Output::new(image)?;
    let kind = base.table.kind();
    let (mut masks, mut sums) = (Vec::new(), Vec::new());
    for chunk in 0..base.table.chunks() {
        if progress.is_cancelled() {
            return Err(WriteError::Cancelled.into());
        }
        progress.add(CHUNK_BYTES as u64);
        let (base_mask, diff_mask) = (base.table.mask(chunk), diff.table.mask(chunk));
        let mut mask = base_mask | diff_mask;
        let mut sum = Sum::default();
        if mask != 0 {
            let mut bytes = output.buffer()?;
            base.put(chunk, !diff_mask, &mut bytes)
                .map_err(MergeError::Base)?;
            diff.put(chunk, diff_mask, &mut bytes).map_err(MergeError::Diff)?;
            let filled = pages_with_content(&bytes, mask);
            if kind == Kind::Full {
                mask = filled;
            }
            if mask != 0 {
                sum = seal.close(Part { chunk, mask }, bytes.as_mut_slice());
            }
            // Zeros that are encrypted are none.
            let written = if seal.is_encrypted() { mask } else { filled };
            output.write(chunk, written, bytes)?;
        }
        masks.push(mask);
        sums.push(sum);
    }
    let table = MemoryTable::new(id, kind, seal, PageSet::of_masks(masks), &sums);
    finish(output.finish()?, &table)?;
    Ok(table)
}

fn check(base: &MemoryTable, diff: &MemoryTable) -> Result<(), MergeError> {
    match diff.kind() {
        Kind::Full => return Err(MergeError::NotADiff),
        Kind::Diff { parent } if parent != base.id() => {
            return Err(MergeError::OtherParent {
                parent,
                base: base.id(),
            });
        }
        Kind::Diff { .. } => {}
    }
    let (diff_bytes, base_bytes) = (diff.size_bytes(), base.size_bytes());
    if diff_bytes != base_bytes {
        return Err(MergeError::Size {
            diff_bytes,
            base_bytes,
        });
    }
    Ok(())
}

/// One of the two, chunk by chunk.
struct Layer<'t> {
    table: &'t MemoryTable,
    reader: Reader<'t>,
}

impl<'t> Layer<'t> {
    fn new(source: Source<'t>) -> Result<Self, ReadError> {
        Ok(Self {
            table: source.table,
            reader: Reader::new(source.table, source.image, Extent::Saved)?,
        })
    }

    /// Copies those pages of `chunk` that `wanted` names, if the file has any; called for each chunk in order.
    fn put(&mut self, chunk: usize, wanted: u16, bytes: &mut [u8; CHUNK_BYTES]) -> Result<(), ReadError> {
        if self.table.mask(chunk) == 0 {
            return Ok(());
        }
        let Some((number, read)) = self.reader.next()? else {
            unreachable!("the reader gives every chunk that has a page");
        };
        assert!(
            number == chunk,
            "the reader gives every chunk that has a page, in order"
        );
        for run in runs(&[wanted]) {
            let range = run.start * PAGE_BYTES..run.end * PAGE_BYTES;
            if let (Some(to), Some(from)) = (bytes.get_mut(range.clone()), read.get(range)) {
                to.copy_from_slice(from);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
