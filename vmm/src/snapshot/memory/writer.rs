//! Writes a memory to its file, straight from where the guest has it.
#![expect(
    unsafe_code,
    reason = "guest memory is summed up and written where it lies, while nobody writes it"
)]

mod lane;
mod sealing;

use std::io;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use coracle_storage::backend::Backend;
use coracle_storage::blocking::Blocking;
use coracle_storage::pipeline::PipelineError;
use coracle_storage::request::Failure;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub(super) use self::lane::pages_with_content;
use self::lane::{Lane, Sums};
use super::seal::{Seal, Sum};
use super::table::{Kind, MemoryId, MemoryTable};
use super::trailer::Trailer;
use super::{CHUNK_BYTES, PageSet, file_bytes, residence};

/// What is examined and written at a time, in bytes. A transfer of so much is the longest that a file in memory takes without
/// a kernel worker and two context switches.
const PIECE_BYTES: usize = 1 << 20;
const PIECE_CHUNKS: usize = PIECE_BYTES / CHUNK_BYTES;

/// Threads that write, each every next piece: one sums up while the kernel copies what the other has summed up.
const LANES_MAX: usize = 2;

/// Which pages of a memory go to the file.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// All that are not zeros.
    Full(Untouched),
    /// Those of these that somebody has touched, in a memory that began empty, and that are not zeros; the others are taken for
    /// zeros.
    Touched(&'a PageSet),
    /// Those of these that are not zeros; the others are taken for zeros, whatever is in them.
    Among(&'a PageSet),
    /// Those that were written since the parent's file was.
    Diff {
        /// The memory that the file goes on from.
        parent: MemoryId,
        /// Those pages.
        written: &'a PageSet,
        /// The pages that the guest has, if not all: a MiB of others is taken for zeros, and nobody looks at it.
        there: Option<&'a PageSet>,
    },
}

/// What a page of memory is that this process has not touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untouched {
    /// Zeros: the memory began empty, or all that it began with is there.
    Zeros,
    /// Anything: it is mapped from a file, or still to come.
    Anything,
}

/// How far the writing is, and how somebody else ends it.
#[derive(Debug, Default)]
pub struct Progress {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    is_cancelled: AtomicBool,
}

/// Why a memory was not written. What there is of the file is of no use.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum WriteError {
    #[error("writing the snapshot's memory was cancelled")]
    Cancelled,
    #[error("cannot write the snapshot's memory at {offset_bytes}")]
    Storage {
        offset_bytes: u64,
        #[source]
        source: Failure,
    },
    #[error("cannot write the snapshot's memory")]
    Pipeline(#[from] PipelineError),
    #[error("cannot begin to write the snapshot's memory")]
    Begin(#[source] io::Error),
    #[error("the file for the snapshot's memory has {found} bytes, and {expected} are needed")]
    FileSize { found: u64, expected: u64 },
    #[error(
        "the pages that were written are those of a memory of {found} bytes, and this one has {expected}"
    )]
    PageSet { found: u64, expected: u64 },
}

impl Progress {
    /// Nothing is done yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// How much memory was looked at, in bytes.
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    /// How much there is to look at; 0 until that is known.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    /// Ends it, at the next MiB.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether somebody has ended it.
    pub fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }

    pub(super) fn begin(&self, total_bytes: u64) {
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    pub(super) fn add(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Writes `content` of `memory` as `id` under `seal`, and a trailer, to `image`: a new file of [`file_bytes`] that reads as
/// zeros. When it returns all of that is on the medium. The table says what the file has.
///
/// Nobody writes the memory meanwhile: its machine is paused and its devices are stopped.
///
/// # Errors
///
/// When it was cancelled, or what the storage answers.
pub fn write(
    memory: &GuestMemoryMmap,
    (id, seal): (MemoryId, Seal),
    content: Content<'_>,
    image: Box<dyn Backend>,
    progress: &Progress,
) -> Result<MemoryTable, WriteError> {
    let size_bytes = memory.iter().map(GuestMemoryRegion::len).sum();
    check_sizes(size_bytes, &content, image.as_ref())?;
    progress.begin(size_bytes);
    let (kind, candidates, there) = match content {
        Content::Full(Untouched::Zeros) => (Kind::Full, &residence::touched(memory, None), None),
        Content::Touched(pages) => (Kind::Full, &residence::touched(memory, Some(pages)), None),
        Content::Full(Untouched::Anything) => (Kind::Full, &PageSet::full(size_bytes), None),
        Content::Among(pages) => (Kind::Full, pages, None),
        Content::Diff {
            parent,
            written,
            there,
        } => (Kind::Diff { parent }, written, there),
    };
    let job = Job {
        memory,
        kind,
        seal: &seal,
        candidates,
        there,
        progress,
        next: AtomicUsize::new(0),
        is_over: AtomicBool::new(false),
    };
    let (image, summed) = job.run(image)?;
    let (pages, sums) = summed.put_together(size_bytes);
    let table = MemoryTable::new(id, kind, seal, pages, &sums);
    finish(image, &table)?;
    Ok(table)
}

fn check_sizes(size_bytes: u64, content: &Content<'_>, image: &dyn Backend) -> Result<(), WriteError> {
    let (found, expected) = (image.geometry().size_bytes, file_bytes(size_bytes));
    if found != expected {
        return Err(WriteError::FileSize { found, expected });
    }
    let sets = match content {
        Content::Full(_) => [None, None],
        Content::Touched(pages) | Content::Among(pages) => [Some(*pages), None],
        Content::Diff { written, there, .. } => [Some(*written), *there],
    };
    let mut sizes = sets.into_iter().flatten().map(PageSet::size_bytes);
    match sizes.find(|found| *found != size_bytes) {
        Some(found) => Err(WriteError::PageSet {
            found,
            expected: size_bytes,
        }),
        None => Ok(()),
    }
}

/// Writes the trailer of `table`, and has all that was written on the medium.
pub(super) fn finish(image: Box<dyn Backend>, table: &MemoryTable) -> Result<(), WriteError> {
    let offset_bytes = table.size_bytes();
    let failed = |source| WriteError::Storage { offset_bytes, source };
    let mut image = Blocking::new(image).map_err(WriteError::Begin)?;
    image
        .write_at(offset_bytes, &Trailer::of(table).to_bytes())
        .map_err(failed)?;
    image.flush().map_err(failed)
}

/// One writing, shared by its lanes.
struct Job<'a> {
    memory: &'a GuestMemoryMmap,
    kind: Kind,
    seal: &'a Seal,
    /// No other page goes to the file.
    candidates: &'a PageSet,
    /// Nobody looks at a piece without such pages.
    there: Option<&'a PageSet>,
    progress: &'a Progress,
    /// The first piece that no lane has taken.
    next: AtomicUsize,
    /// A lane has failed: what the others do is for nothing.
    is_over: AtomicBool,
}

/// A MiB of memory.
struct Piece<'a> {
    number: usize,
    bytes: &'a [u8],
}

/// What the file has, piece by piece.
#[derive(Default)]
struct Summed(Vec<(usize, Sums)>);

impl<'a> Job<'a> {
    fn run(&self, image: Box<dyn Backend>) -> Result<(Box<dyn Backend>, Summed), WriteError> {
        let others = thread::available_parallelism()
            .map_or(1, NonZero::get)
            .min(LANES_MAX)
            - 1;
        let others: Vec<_> = (0..others).map_while(|_| image.fork()).collect();
        thread::scope(|scope| {
            let spawn = |image| {
                let name = "snapshot".to_owned();
                thread::Builder::new()
                    .name(name)
                    .spawn_scoped(scope, move || self.lane(image).map(|(_, summed)| summed))
            };
            // Where there are no threads to be had, one lane does it all.
            let others: Vec<_> = others.into_iter().flat_map(spawn).collect();
            let own = self.lane(image);
            let joined = others.into_iter().map(|other| {
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            let joined: Result<Vec<Summed>, WriteError> = joined.collect();
            let (image, mut summed) = own?;
            summed.0.extend(joined?.into_iter().flat_map(|summed| summed.0));
            Ok((image, summed))
        })
    }

    /// Writes every piece that nobody else does.
    fn lane(&self, image: Box<dyn Backend>) -> Result<(Box<dyn Backend>, Summed), WriteError> {
        let written = if self.seal.is_encrypted() {
            sealing::run(self, image)
        } else {
            Lane::new(self, image).and_then(Lane::run)
        };
        if written.is_err() {
            self.is_over.store(true, Ordering::Relaxed);
        }
        written
    }

    /// The next piece that no lane has taken, and whose pages may go to the file.
    fn take(&self) -> Result<Option<Piece<'a>>, WriteError> {
        loop {
            if self.progress.is_cancelled() {
                return Err(WriteError::Cancelled);
            }
            if self.is_over.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(bytes) = self.bytes_of(number) else {
                return Ok(None);
            };
            if self.candidates_of(number).iter().any(|mask| *mask != 0) {
                let is_there = |there| masks_of(there, number).iter().any(|mask| *mask != 0);
                let bytes = match self.there.is_none_or(is_there) {
                    true => bytes,
                    false => ZEROS.get(..bytes.len()).expect("it is as long as a piece"),
                };
                return Ok(Some(Piece { number, bytes }));
            }
            self.progress.add(bytes.len() as u64);
        }
    }

    fn candidates_of(&self, piece: usize) -> &'a [u16] {
        masks_of(self.candidates, piece)
    }

    /// A piece by its number in the file. Pieces end where regions do: those are whole MiB.
    fn bytes_of(&self, piece: usize) -> Option<&'a [u8]> {
        let mut at = piece.checked_mul(PIECE_BYTES)?;
        for region in self.memory.iter() {
            let len = usize::try_from(region.len()).expect("this is a 64-bit monitor");
            if at < len {
                let len = PIECE_BYTES.min(len - at);
                let start = region.as_ptr().wrapping_add(at);
                // SAFETY: the range lies in the mapping of `region`, which `self.memory` keeps, and nobody writes it for as long
                // as the job takes (contract of `write`).
                return Some(unsafe { std::slice::from_raw_parts(start, len) });
            }
            at -= len;
        }
        None
    }
}

/// What a piece is that is not there.
static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];

fn masks_of(pages: &PageSet, piece: usize) -> &[u16] {
    let first = piece * PIECE_CHUNKS;
    let masks = pages.masks();
    let masks = masks.get(first..(first + PIECE_CHUNKS).min(masks.len()));
    masks.unwrap_or_default()
}

impl Summed {
    fn put_together(self, size_bytes: u64) -> (PageSet, Vec<Sum>) {
        let chunks = super::pages::chunks_of(size_bytes);
        let (mut masks, mut all) = (vec![0; chunks], vec![Sum::default(); chunks]);
        for (piece, sums) in self.0 {
            let first = piece * PIECE_CHUNKS;
            for (to, from) in masks.iter_mut().skip(first).zip(sums.masks) {
                *to = from;
            }
            for (to, from) in all.iter_mut().skip(first).zip(sums.sums) {
                *to = from;
            }
        }
        (PageSet::of_masks(masks), all)
    }
}

#[cfg(test)]
mod tests;
