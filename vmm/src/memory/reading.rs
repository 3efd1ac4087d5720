//! Chunks of a memory file, checked: none comes out of here whose sum is not that of the table.
#![expect(
    unsafe_code,
    reason = "a segment promises that its buffer outlives the request"
)]

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::pipeline::{Next, Pipeline, PipelineError, PreparedPipeline};
use coracle_storage::request::{Completion, Durability, Failure, Operation, Request, Segment};
use vm_memory::GuestAddress;

use super::chunk::Pages;
use super::layout::Layout;
use crate::snapshot::memory::{CHUNK_BYTES, MemoryTable};

/// How many chunks are read at a time.
pub(super) const DEPTH: u16 = 16;

/// A memory file, and its table.
pub(super) struct Saved {
    /// The file's name, for messages.
    pub(super) path: String,
    pub(super) table: Arc<MemoryTable>,
    /// Where the guest has it.
    pub(super) layout: Layout,
}

/// Reads chunks, several at a time.
pub(super) struct ChunkReader {
    /// Dropped first: the kernel writes to the buffers.
    pipeline: Pipeline,
    buffers: HashMap<usize, Box<[u8]>>,
    idle: Vec<Box<[u8]>>,
    saved: Arc<Saved>,
}

/// What [`ChunkReader::next`] has waited for.
pub(super) enum Read {
    /// A chunk has been read, and is as it was saved.
    Chunk(CheckedChunk),
    /// A chunk will never be had.
    Lost(usize, ChunkError),
    /// A watched descriptor is readable.
    Signalled,
    /// Nothing has happened within the limit.
    TimedOut,
}

/// A chunk as it was saved.
pub(super) struct CheckedChunk {
    pub(super) chunk: usize,
    pages: Pages,
    buffer: Box<[u8]>,
}

/// Why a piece of guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// The file has other bytes than were written.
    #[error(
        "memory file `{path}` is damaged: the 64 KiB of guest memory at {address:#x} are not those that were saved; restore \
         another snapshot"
    )]
    Damaged {
        /// The file.
        path: String,
        /// The guest-physical address of the first byte.
        address: u64,
    },
    /// The storage failed.
    #[error("cannot read the 64 KiB of guest memory at {address:#x} from memory file `{path}`")]
    Storage {
        /// The file.
        path: String,
        /// The guest-physical address of the first byte.
        address: u64,
        /// What the storage answers.
        #[source]
        source: Failure,
    },
}

impl ChunkReader {
    /// For the calling thread, which alone may use it.
    pub(super) fn bind(pipeline: PreparedPipeline, saved: Arc<Saved>) -> io::Result<Self> {
        Ok(Self {
            pipeline: pipeline.bind()?,
            buffers: HashMap::new(),
            idle: Vec::new(),
            saved,
        })
    }

    /// From now on [`Self::next`] tells when `fd` becomes readable. The caller keeps it open as long as the reader lives.
    pub(super) fn watch(&mut self, fd: RawFd) -> io::Result<()> {
        self.pipeline.watch(fd)
    }

    pub(super) fn has_room(&self) -> bool {
        self.pipeline.has_room()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.buffers.len()
    }

    /// Begins to read `chunk`, of which the file has something, which is not being read, and for which there is room.
    pub(super) fn start(&mut self, chunk: usize) {
        let span = Pages(self.saved.table.mask(chunk)).span();
        let mut buffer = self.idle.pop().unwrap_or_else(|| vec![0; CHUNK_BYTES].into());
        let target = buffer
            .get_mut(span.clone())
            .expect("a chunk's pages lie within it");
        let memory = NonNull::from(&mut *target).cast();
        // SAFETY: the buffer is on the heap and stays in `buffers`, untouched, until its request has come back; if the reader is
        // dropped before, the pipeline goes first, and with it what the kernel had in flight.
        let segment = unsafe { Segment::new(memory, span.len()) };
        let request = Request {
            tag: chunk as u64,
            operation: Operation::Read,
            offset_bytes: (chunk * CHUNK_BYTES + span.start) as u64,
            len_bytes: span.len() as u64,
            durability: Durability::Cached,
            segments: vec![segment],
        };
        let before = self.buffers.insert(chunk, buffer);
        assert!(before.is_none(), "chunk {chunk} is read twice at a time");
        self.pipeline.start(request);
    }

    /// Waits until something happens, but no longer than `limit`.
    pub(super) fn next(&mut self, limit: Option<Duration>) -> Result<Read, PipelineError> {
        Ok(match self.pipeline.next(limit)? {
            Next::Completed(completion) => self.check(&completion),
            Next::Signalled(_) => Read::Signalled,
            Next::TimedOut => Read::TimedOut,
        })
    }

    /// Takes a buffer back, to be used again.
    pub(super) fn recycle(&mut self, chunk: CheckedChunk) {
        self.idle.push(chunk.buffer);
    }

    fn check(&mut self, completion: &Completion) -> Read {
        let chunk = usize::try_from(completion.request.tag).expect("the tag is a chunk's number");
        let mut buffer = self.buffers.remove(&chunk).expect("what is read has a buffer");
        let table = &self.saved.table;
        let path = || self.saved.path.clone();
        let address = guest_address(self.saved.layout.ranges(), chunk).0;
        if let Err(source) = completion.outcome {
            let path = path();
            return Read::Lost(
                chunk,
                ChunkError::Storage {
                    path,
                    address,
                    source,
                },
            );
        }
        if table.check(chunk, &mut buffer).is_err() {
            let path = path();
            return Read::Lost(chunk, ChunkError::Damaged { path, address });
        }
        Read::Chunk(CheckedChunk {
            chunk,
            pages: Pages(table.mask(chunk)),
            buffer,
        })
    }
}

/// The chunks of which the file has anything, in order.
pub(super) fn saved_chunks(table: &MemoryTable) -> impl Iterator<Item = usize> {
    (0..table.chunks()).filter(|chunk| table.mask(*chunk) != 0)
}

/// Where the guest sees `chunk`, which is one of its memory; that has these `ranges`.
pub(super) fn guest_address(ranges: impl Iterator<Item = (GuestAddress, u64)>, chunk: usize) -> GuestAddress {
    let mut offset_bytes = (chunk * CHUNK_BYTES) as u64;
    for (start, len_bytes) in ranges {
        if offset_bytes < len_bytes {
            return GuestAddress(start.0 + offset_bytes);
        }
        offset_bytes -= len_bytes;
    }
    panic!("chunk {chunk} is none of this memory");
}

impl CheckedChunk {
    /// What was saved of the chunk: bytes, and where in the chunk they lie.
    pub(super) fn runs(&self) -> impl Iterator<Item = (usize, &[u8])> {
        self.pages.runs().map(|run| {
            let start = run.start;
            (
                start,
                self.buffer.get(run).expect("a chunk's pages lie within it"),
            )
        })
    }
}
