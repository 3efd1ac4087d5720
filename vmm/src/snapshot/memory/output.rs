//! A memory file that is written chunk by chunk, out of buffers: for what is not in guest memory as it goes to the file.
#![expect(
    unsafe_code,
    reason = "segments point into buffers that are kept until they are written"
)]

use std::ptr::NonNull;

use coracle_storage::backend::Backend;
use coracle_storage::pipeline::{Next, Pipeline};
use coracle_storage::request::{Durability, Operation, Request, Segment};

use super::pages::runs;
use super::writer::WriteError;
use super::{CHUNK_BYTES, PAGE_BYTES};

/// A chunk.
pub(super) type Buffer = Box<[u8; CHUNK_BYTES]>;

/// The new file, with many chunks being written.
pub(super) struct Output {
    /// Dropped first: the kernel may still read the buffers.
    pipeline: Pipeline,
    /// Those that are being written, each with how many of its writes have not ended.
    busy: Vec<Option<(Buffer, usize)>>,
    spare: Vec<Buffer>,
}

/// Writes in flight at most.
const DEPTH: u16 = 16;

impl Output {
    pub(super) fn new(image: Box<dyn Backend>) -> Result<Self, WriteError> {
        Ok(Self {
            pipeline: Pipeline::new(image, DEPTH).map_err(WriteError::Begin)?,
            busy: Vec::new(),
            spare: Vec::new(),
        })
    }

    /// A buffer of zeros.
    pub(super) fn buffer(&mut self) -> Result<Buffer, WriteError> {
        while !self.pipeline.has_room() {
            self.complete()?;
        }
        let mut buffer = self.spare.pop().unwrap_or_else(|| Box::new([0; CHUNK_BYTES]));
        buffer.fill(0);
        Ok(buffer)
    }

    /// Begins to write those pages of `chunk` that `mask` names.
    pub(super) fn write(&mut self, chunk: usize, mask: u16, buffer: Buffer) -> Result<(), WriteError> {
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
    pub(super) fn finish(mut self) -> Result<Box<dyn Backend>, WriteError> {
        while self.pipeline.in_flight() > 0 {
            self.complete()?;
        }
        Ok(self.pipeline.into_image())
    }
}
