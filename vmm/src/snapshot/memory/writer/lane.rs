//! One thread that writes: it examines a piece, starts its writes and goes on with the next.
#![expect(unsafe_code, reason = "segments point into guest memory")]

use std::ptr::NonNull;

use coracle_storage::backend::Backend;
use coracle_storage::pipeline::{Next, Pipeline};
use coracle_storage::request::{Completion, Durability, Operation, Request, Segment};

use super::{Job, PIECE_BYTES, PIECE_CHUNKS, Piece, Summed, WriteError};
use crate::snapshot::memory::pages::runs;
use crate::snapshot::memory::seal::{Part, Sum};
use crate::snapshot::memory::table::Kind;
use crate::snapshot::memory::{CHUNK_BYTES, PAGE_BYTES};

/// Writes that a lane has in flight at most.
const DEPTH: u16 = 16;

/// What the file has of one piece.
#[derive(Default)]
pub(super) struct Sums {
    pub(super) masks: [u16; PIECE_CHUNKS],
    pub(super) sums: [Sum; PIECE_CHUNKS],
}

pub(super) struct Lane<'a> {
    job: &'a Job<'a>,
    pipeline: Pipeline,
    summed: Summed,
    /// Lists of segments for the next requests.
    spare: Vec<Vec<Segment>>,
}

impl<'a> Lane<'a> {
    pub(super) fn new(job: &'a Job<'a>, image: Box<dyn Backend>) -> Result<Self, WriteError> {
        Ok(Self {
            job,
            pipeline: Pipeline::new(image, DEPTH).map_err(WriteError::Begin)?,
            summed: Summed::default(),
            spare: Vec::new(),
        })
    }

    /// Writes until there is no piece left, and gives the image back, in which nothing is in flight.
    pub(super) fn run(mut self) -> Result<(Box<dyn Backend>, Summed), WriteError> {
        while let Some(piece) = self.job.take()? {
            let (sums, filled) = examine(&piece, self.job);
            for run in runs(&filled) {
                self.write(&piece, run.start * PAGE_BYTES..run.end * PAGE_BYTES)?;
            }
            self.pipeline.submit()?;
            self.summed.0.push((piece.number, sums));
            self.job.progress.add(piece.bytes.len() as u64);
        }
        while self.pipeline.in_flight() > 0 {
            self.complete()?;
        }
        Ok((self.pipeline.into_image(), self.summed))
    }

    fn write(&mut self, piece: &Piece<'_>, range: std::ops::Range<usize>) -> Result<(), WriteError> {
        while !self.pipeline.has_room() {
            self.complete()?;
        }
        let offset_bytes = (piece.number * PIECE_BYTES + range.start) as u64;
        let bytes = piece
            .bytes
            .get(range)
            .expect("a piece has as many pages as its masks have bits");
        let mut segments = self.spare.pop().unwrap_or_default();
        // SAFETY: the memory outlives the job, and so the pipeline; it is only ever read from.
        segments.push(unsafe { Segment::new(NonNull::from(bytes).cast(), bytes.len()) });
        self.pipeline.start(Request {
            tag: 0,
            operation: Operation::Write,
            offset_bytes,
            len_bytes: bytes.len() as u64,
            durability: Durability::Cached,
            segments,
        });
        Ok(())
    }

    fn complete(&mut self) -> Result<(), WriteError> {
        // Nothing is watched, and there is no limit.
        let Next::Completed(Completion {
            mut request, outcome, ..
        }) = self.pipeline.next(None)?
        else {
            return Ok(());
        };
        request.segments.clear();
        self.spare.push(request.segments);
        outcome.map_err(|source| WriteError::Storage {
            offset_bytes: request.offset_bytes,
            source,
        })
    }
}

/// Says what the file is to have of a piece, and which pages are to be written for that: a hole is zeros already.
fn examine(piece: &Piece<'_>, job: &Job<'_>) -> (Sums, [u16; PIECE_CHUNKS]) {
    let mut sums = Sums::default();
    let mut filled = [0; PIECE_CHUNKS];
    let first = piece.number * PIECE_CHUNKS;
    let chunks = piece.bytes.as_chunks::<CHUNK_BYTES>().0;
    let chunks = (first..).zip(chunks).zip(job.candidates_of(piece.number));
    let places = sums.masks.iter_mut().zip(&mut sums.sums).zip(&mut filled);
    for (((mask, sum), filled), ((chunk, bytes), candidates)) in places.zip(chunks) {
        (*mask, *filled) = masks(bytes, *candidates, job.kind);
        if *mask != 0 {
            *sum = job.seal.sum(Part { chunk, mask: *mask }, bytes);
        }
    }
    (sums, filled)
}

/// Which of the `candidates` the file is to have of a chunk, and which of those are not zeros.
pub(super) fn masks(chunk: &[u8; CHUNK_BYTES], candidates: u16, kind: Kind) -> (u16, u16) {
    let filled = pages_with_content(chunk, candidates);
    match kind {
        Kind::Full => (filled, filled),
        // Zeros that were written are no longer what the parent has.
        Kind::Diff { .. } => (candidates, filled),
    }
}

/// Those of `candidates` that are not zeros.
pub(in super::super) fn pages_with_content(chunk: &[u8; CHUNK_BYTES], candidates: u16) -> u16 {
    let pages = chunk.as_chunks::<PAGE_BYTES>().0.iter();
    pages.enumerate().fold(0, |mask, (number, page)| {
        let bit = 1 << number;
        let is_filled = candidates & bit != 0 && !is_zeros(page);
        mask | if is_filled { bit } else { 0 }
    })
}

/// Whether a page is zeros; of most that are not, the first line says so.
fn is_zeros(page: &[u8; PAGE_BYTES]) -> bool {
    const LINE_BYTES: usize = 128;
    let words = |line: &[u8; LINE_BYTES]| {
        let (words, _) = line.as_chunks();
        words.iter().fold(0, |or, word| or | u128::from_ne_bytes(*word))
    };
    page.as_chunks::<LINE_BYTES>()
        .0
        .iter()
        .all(|line| words(line) == 0)
}
