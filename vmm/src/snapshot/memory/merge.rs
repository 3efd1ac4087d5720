//! Makes one memory file of two: what a diff has, over what its parent has.
#![expect(
    unsafe_code,
    reason = "segments point into buffers that are kept until they are written"
)]

use std::ptr::NonNull;

use coracle_storage::backend::Backend;
use coracle_storage::pipeline::{Next, Pipeline};
use coracle_storage::request::{Durability, Operation, Request, Segment};

use super::pages::{PageSet, runs};
use super::reader::{ReadError, Reader};
use super::table::{Kind, MemoryId, MemoryTable, checksum};
use super::writer::{WriteError, pages_with_content, seal};
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

/// Writes what `diff` has over what `base` has, as memory `id`, to `image`: a new file that reads as zeros. Both are checked as
/// they are read. When it returns all is on the medium, and the table says what the file has. It is full if `base` is.
///
/// # Errors
///
/// When they do not follow each other, are damaged, or cannot be read or written.
pub fn merge(
    base: Source<'_>,
    diff: Source<'_>,
    id: MemoryId,
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
    let (mut masks, mut checksums) = (Vec::new(), Vec::new());
    for chunk in 0..base.table.chunks() {
        if progress.is_cancelled() {
            return Err(WriteError::Cancelled.into());
        }
        progress.add(CHUNK_BYTES as u64);
        let (base_mask, diff_mask) = (base.table.mask(chunk), diff.table.mask(chunk));
        let mut mask = base_mask | diff_mask;
        let mut sum = 0;
        if mask != 0 {
            let mut bytes = output.buffer()?;
            base.put(chunk, !diff_mask, &mut bytes)
                .map_err(MergeError::Base)?;
            diff.put(chunk, diff_mask, &mut bytes).map_err(MergeError::Diff)?;
            let filled = pages_with_content(&bytes, mask);
            if kind == Kind::Full {
                mask = filled;
            }
            sum = checksum(mask, bytes.as_slice());
            output.write(chunk, filled, bytes)?;
        }
        masks.push(mask);
        checksums.push(sum);
    }
    let table = MemoryTable::new(id, kind, PageSet::of_masks(masks), checksums);
    seal(output.finish()?, &table)?;
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

type Buffer = Box<[u8; CHUNK_BYTES]>;

impl<'t> Layer<'t> {
    fn new(source: Source<'t>) -> Result<Self, ReadError> {
        Ok(Self {
            table: source.table,
            reader: Reader::new(source.table, source.image)?,
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

/// The new file, with many chunks being written.
struct Output {
    /// Dropped first: the kernel may still read the buffers.
    pipeline: Pipeline,
    /// Those that are being written, each with how many of its writes have not ended.
    busy: Vec<Option<(Buffer, usize)>>,
    spare: Vec<Buffer>,
}

/// Writes in flight at most.
const DEPTH: u16 = 16;

impl Output {
    fn new(image: Box<dyn Backend>) -> Result<Self, WriteError> {
        Ok(Self {
            pipeline: Pipeline::new(image, DEPTH).map_err(WriteError::Begin)?,
            busy: Vec::new(),
            spare: Vec::new(),
        })
    }

    /// A buffer of zeros.
    fn buffer(&mut self) -> Result<Buffer, WriteError> {
        while !self.pipeline.has_room() {
            self.complete()?;
        }
        let mut buffer = self.spare.pop().unwrap_or_else(|| Box::new([0; CHUNK_BYTES]));
        buffer.fill(0);
        Ok(buffer)
    }

    fn write(&mut self, chunk: usize, mask: u16, buffer: Buffer) -> Result<(), WriteError> {
        let place = self.busy.iter().position(Option::is_none);
        let place = place.unwrap_or_else(|| {
            self.busy.push(None);
            self.busy.len() - 1
        });
        let memory = NonNull::from(buffer.as_slice());
        // One for us, until all writes are begun.
        if let Some(busy) = self.busy.get_mut(place) {
            *busy = Some((buffer, 1));
        }
        for run in runs(&[mask]) {
            while !self.pipeline.has_room() {
                self.complete()?;
            }
            let (at, len) = (run.start * PAGE_BYTES, run.len() * PAGE_BYTES);
            if let Some((_, writes)) = self.busy.get_mut(place).and_then(Option::as_mut) {
                *writes += 1;
            }
            // SAFETY: `at` is less than the length of the buffer, as masks have a bit for each of its pages.
            let start = unsafe { memory.cast::<u8>().add(at) };
            // SAFETY: the buffer stays where it is until its writes have ended, or the pipeline is dropped; it is only read from.
            let segment = unsafe { Segment::new(start, len) };
            self.pipeline.start(Request {
                tag: place as u64,
                operation: Operation::Write,
                offset_bytes: (chunk * CHUNK_BYTES + at) as u64,
                len_bytes: len as u64,
                durability: Durability::Cached,
                segments: vec![segment],
            });
        }
        self.release(place);
        self.pipeline.submit().map_err(WriteError::Pipeline)
    }

    /// One writer of a buffer less.
    fn release(&mut self, place: usize) {
        let Some(busy) = self.busy.get_mut(place) else {
            return;
        };
        if let Some((buffer, writes)) = busy.take() {
            if writes == 1 {
                self.spare.push(buffer);
            } else {
                *busy = Some((buffer, writes - 1));
            }
        }
    }

    fn complete(&mut self) -> Result<(), WriteError> {
        // Nothing is watched, and there is no limit.
        if let Next::Completed(completion) = self.pipeline.next(None)? {
            let place = usize::try_from(completion.request.tag).expect("a tag is a place");
            self.release(place);
            completion.outcome.map_err(|source| WriteError::Storage {
                offset_bytes: completion.request.offset_bytes,
                source,
            })?;
        }
        Ok(())
    }

    /// Gives the file back when everything is written.
    fn finish(mut self) -> Result<Box<dyn Backend>, WriteError> {
        while self.pipeline.in_flight() > 0 {
            self.complete()?;
        }
        Ok(self.pipeline.into_image())
    }
}

#[cfg(test)]
mod tests;
