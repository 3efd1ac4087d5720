//! Reads a memory file from its first chunk to its last, some way ahead, and checks each.
#![expect(
    unsafe_code,
    reason = "segments point into buffers that are kept until they are read"
)]

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use coracle_storage::backend::Backend;
use coracle_storage::pipeline::{Next, Pipeline, PipelineError};
use coracle_storage::request::{Completion, Durability, Failure, Operation, Request, Segment};

use super::table::{Damage, MemoryTable};
use super::trailer::{TRAILER_BYTES, Trailer, TrailerError};
use super::{CHUNK_BYTES, file_bytes};

/// Why a memory file cannot be read, or not be trusted.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum ReadError {
    #[error("reading the snapshot's memory was cancelled")]
    Cancelled,
    #[error("cannot read the memory file at {offset_bytes}")]
    Storage {
        offset_bytes: u64,
        #[source]
        source: Failure,
    },
    #[error("cannot read the memory file")]
    Pipeline(#[from] PipelineError),
    #[error("cannot begin to read the memory file")]
    Begin(#[source] io::Error),
    #[error(
        "the memory file has {found} bytes, and the memory in it takes {expected}: it was cut off or added to, or is another's"
    )]
    FileSize { found: u64, expected: u64 },
    #[error("the memory file does not belong to the state file")]
    Trailer(#[from] TrailerError),
    #[error(transparent)]
    Damage(#[from] Damage),
    #[error(
        "the memory file is damaged: it has bytes at {offset_bytes}, where nothing was saved; a load with `verify: off` would \
         show them to the guest"
    )]
    Stray { offset_bytes: u64 },
}

/// Reads in flight at most, and how much each is of.
const DEPTH: u16 = 8;
const EXTENT_CHUNKS: usize = 16;

/// Which chunks are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// Those of which the file has a page. What else is in the file is not looked at, and never given out.
    Saved,
    /// All: where the file has no page it has to have zeros, or [`Reader::end`] says so.
    Whole,
}

/// The chunks of a file, in order.
pub(super) struct Reader<'t> {
    /// Dropped first: the kernel may still fill the buffers.
    pipeline: Pipeline,
    table: &'t MemoryTable,
    extent: Extent,
    /// Where the first byte lies that is to be none.
    stray: Option<u64>,
    /// Where the next read begins to look for chunks.
    ahead: usize,
    reads: VecDeque<Read>,
    /// The number of the first of them.
    first_read: u64,
    /// The read whose chunks are being given out, and how many of them were.
    open: Option<(Read, usize)>,
    spare: Vec<Buffer>,
    trailer: Box<[u8; TRAILER_BYTES]>,
}

type Buffer = Box<[u8]>;

/// Neighbours that are read at once.
struct Read {
    chunks: Range<usize>,
    buffer: Buffer,
    outcome: Option<Result<(), Failure>>,
}

impl<'t> Reader<'t> {
    /// A reader of the file of `table`, at its first chunk.
    pub(super) fn new(
        table: &'t MemoryTable,
        image: Box<dyn Backend>,
        extent: Extent,
    ) -> Result<Self, ReadError> {
        let (found, expected) = (image.geometry().size_bytes, file_bytes(table.size_bytes()));
        if found != expected {
            return Err(ReadError::FileSize { found, expected });
        }
        let mut reader = Self {
            table,
            extent,
            stray: None,
            pipeline: Pipeline::new(image, DEPTH).map_err(ReadError::Begin)?,
            ahead: 0,
            reads: VecDeque::new(),
            first_read: 0,
            open: None,
            spare: Vec::new(),
            trailer: Box::new([0; TRAILER_BYTES]),
        };
        reader.check_trailer()?;
        Ok(reader)
    }

    fn check_trailer(&mut self) -> Result<(), ReadError> {
        let offset_bytes = self.table.size_bytes();
        let memory = NonNull::from(self.trailer.as_mut_slice());
        self.pipeline.start(read(0, offset_bytes, memory));
        while self.pipeline.in_flight() > 0 {
            // Nothing else is in flight, and nothing is watched.
            if let Next::Completed(completion) = self.pipeline.next(None)? {
                let failed = |source| ReadError::Storage { offset_bytes, source };
                completion.outcome.map_err(failed)?;
            }
        }
        Ok(Trailer::check(&self.trailer, self.table)?)
    }

    /// The next chunk, checked: its number and its bytes, where absent pages are zeros.
    pub(super) fn next(&mut self) -> Result<Option<(usize, &mut [u8])>, ReadError> {
        if self
            .open
            .as_ref()
            .is_none_or(|(read, given)| *given == read.chunks.len())
        {
            if let Some((read, _)) = self.open.take() {
                self.spare.push(read.buffer);
            }
            self.read_ahead();
            self.open = self.await_first()?.map(|read| (read, 0));
        }
        let Some((read, given)) = &mut self.open else {
            return Ok(None);
        };
        let chunk = read.chunks.start + *given;
        let bytes = read.buffer.chunks_exact_mut(CHUNK_BYTES).nth(*given);
        let bytes = bytes.expect("a read has a buffer for all of its chunks");
        *given += 1;
        if self.extent == Extent::Whole && self.stray.is_none() {
            self.stray = self.table.stray(chunk, bytes);
        }
        self.table.check(chunk, bytes)?;
        Ok(Some((chunk, bytes)))
    }

    /// What was found beside the chunks, which have all been given out.
    pub(super) fn end(self) -> Result<(), ReadError> {
        match self.stray {
            Some(offset_bytes) => Err(ReadError::Stray { offset_bytes }),
            None => Ok(()),
        }
    }

    /// Keeps as many reads in flight as there is room for.
    fn read_ahead(&mut self) {
        while self.pipeline.has_room()
            && let Some(chunks) = self.next_extent()
        {
            self.ahead = chunks.end;
            let buffer = self.spare.pop();
            let mut buffer =
                buffer.unwrap_or_else(|| vec![0; EXTENT_CHUNKS * CHUNK_BYTES].into_boxed_slice());
            let memory = buffer.get_mut(..chunks.len() * CHUNK_BYTES);
            let memory = NonNull::from(memory.expect("an extent fits into a buffer"));
            let number = self.first_read + self.reads.len() as u64;
            self.pipeline
                .start(read(number, (chunks.start * CHUNK_BYTES) as u64, memory));
            self.reads.push_back(Read {
                chunks,
                buffer,
                outcome: None,
            });
        }
    }

    fn next_extent(&self) -> Option<Range<usize>> {
        let is_read = |chunk: &usize| self.extent == Extent::Whole || self.table.mask(*chunk) != 0;
        let start = (self.ahead..self.table.chunks()).find(is_read)?;
        let longest = (start..self.table.chunks()).take(EXTENT_CHUNKS);
        Some(start..start + longest.take_while(is_read).count())
    }

    /// The first read, at its end; `None` if nothing is left to read.
    fn await_first(&mut self) -> Result<Option<Read>, ReadError> {
        while let Some(read) = self.reads.front() {
            if let Some(outcome) = read.outcome {
                let offset_bytes = (read.chunks.start * CHUNK_BYTES) as u64;
                outcome.map_err(|source| ReadError::Storage { offset_bytes, source })?;
                self.first_read += 1;
                return Ok(self.reads.pop_front());
            }
            if let Next::Completed(Completion { request, outcome }) = self.pipeline.next(None)? {
                let place = usize::try_from(request.tag - self.first_read).ok();
                let read = place.and_then(|place| self.reads.get_mut(place));
                read.expect("reads end once, and stay until then").outcome = Some(outcome);
            }
        }
        Ok(None)
    }
}

/// A read of the file into `memory`, a buffer of the reader's.
fn read(tag: u64, offset_bytes: u64, memory: NonNull<[u8]>) -> Request {
    // SAFETY: the buffers of a reader stay in place, and are dropped after its pipeline.
    let segment = unsafe { Segment::new(memory.cast(), memory.len()) };
    Request {
        tag,
        operation: Operation::Read,
        offset_bytes,
        len_bytes: memory.len() as u64,
        durability: Durability::Cached,
        segments: vec![segment],
    }
}
