//! What a backend may ask of the kernel, and who carries it out.
//!
//! Two reactors exist: io_uring ([`crate::ring`]) and, where the host refuses io_uring, plain
//! system calls ([`crate::plain`]). A seeded simulator is the third.
#![expect(unsafe_code, reason = "operations carry the address of their segments")]

use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

use crate::request::{Durability, Segment};

/// Names one operation or watch; its owner chooses it and gets it back in the [`Event`] or
/// [`Wake::Signalled`]. The top bit is the reactor's own and must be clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// A file that was registered with the reactor, by its place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(pub u32);

/// One operation on a registered file.
#[derive(Clone, Copy, Debug)]
pub enum KernelOp {
    /// `preadv`: result is the number of bytes read; fewer than asked is legal.
    Read {
        /// The file.
        file: FileSlot,
        /// First of `segment_count` segments; they stay in place until the operation ends.
        segments: *const Segment,
        /// How many segments, at most IOV_MAX.
        segment_count: u32,
        /// Where in the file.
        offset_bytes: u64,
    },
    /// `pwritev2`: result is the number of bytes written; fewer than asked is legal.
    Write {
        /// The file.
        file: FileSlot,
        /// First of `segment_count` segments; they stay in place until the operation ends.
        segments: *const Segment,
        /// How many segments, at most IOV_MAX.
        segment_count: u32,
        /// Where in the file.
        offset_bytes: u64,
        /// Whether the write is on the medium when it completes (RWF_DSYNC).
        durability: Durability,
    },
    /// `fdatasync`.
    SyncData {
        /// The file.
        file: FileSlot,
    },
    /// `fallocate` with `mode` (FALLOC_FL_*).
    Allocate {
        /// The file.
        file: FileSlot,
        /// FALLOC_FL_* bits.
        mode: i32,
        /// Where in the file.
        offset_bytes: u64,
        /// How much.
        len_bytes: u64,
    },
}

impl KernelOp {
    /// The file that the operation is on.
    pub fn file(&self) -> FileSlot {
        let (Self::Read { file, .. }
        | Self::Write { file, .. }
        | Self::SyncData { file }
        | Self::Allocate { file, .. }) = *self;
        file
    }

    /// How many bytes a read or a write asks for; zero for other operations.
    pub fn transfer_bytes(&self) -> u64 {
        let (Self::Read {
            segments,
            segment_count,
            ..
        }
        | Self::Write {
            segments,
            segment_count,
            ..
        }) = *self
        else {
            return 0;
        };
        let count = usize::try_from(segment_count).expect("this is a 64-bit monitor");
        // SAFETY: whoever made the operation keeps its segments in place until it ends.
        let segments = unsafe { std::slice::from_raw_parts(segments, count) };
        segments.iter().map(|segment| segment.len_bytes() as u64).sum()
    }
}

/// The end of one [`KernelOp`].
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// The operation that ended.
    pub token: Token,
    /// The system call's result: a count, or a negative errno.
    pub result: i32,
}

/// The reactor has no room for another operation; nothing was submitted. Wait for an event, then try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// How a backend puts an operation in flight.
pub trait Submit {
    /// Queues `op`; its end is reported as an [`Event`] with `token`, exactly once.
    ///
    /// # Errors
    ///
    /// [`Full`] when there is no room; then nothing was queued.
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full>;
}

/// What woke the owner of a reactor.
#[derive(Clone, Copy, Debug)]
pub enum Wake {
    /// An operation ended.
    Done(Event),
    /// A watched eventfd was written, once or more often, since the last report. The watch stays.
    Signalled(Token),
    /// The timer ran out; it is not set any more.
    TimerExpired,
}

/// Carries operations out and is the only place where an I/O thread waits.
///
/// The room of an operation is free again when its event is reported. An owner that answers each
/// event with at most one new operation, before anybody starts other ones, is never told [`Full`].
pub trait Reactor: Submit {
    /// Registers `files` for use by [`FileSlot`], replacing what was registered before.
    ///
    /// Nothing may be in flight. The caller keeps the descriptors open until they are replaced.
    ///
    /// # Errors
    ///
    /// When there are more than [`FILES_MAX`], or the kernel refuses a descriptor.
    fn register(&mut self, files: &[RawFd]) -> io::Result<()>;

    /// Reports every write to `eventfd` as [`Wake::Signalled`] with `token`, until [`Self::unwatch`];
    /// a counter that is not zero now is reported too. Nobody else may read the eventfd meanwhile.
    ///
    /// # Errors
    ///
    /// When [`WATCHES_MAX`] are watched, or the kernel refuses the descriptor.
    fn watch(&mut self, eventfd: RawFd, token: Token) -> io::Result<()>;

    /// Takes a watch back: `token` is not reported any more. Unknown tokens are ignored.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; the watch then still counts, but is not reported.
    fn unwatch(&mut self, token: Token) -> io::Result<()>;

    /// The time on the clock by which [`Self::set_timer`] goes: that of a simulation is its own.
    fn now(&self) -> Instant {
        Instant::now()
    }

    /// Reports [`Wake::TimerExpired`] at `deadline`; a new deadline replaces an older one, `None` takes it back.
    fn set_timer(&mut self, deadline: Option<Instant>);

    /// Submits what is queued, waits until at least one wake-up is there (not at all if `patience`
    /// is [`Patience::None`]), and appends all that there are to `wakes`. A signal may end the wait early.
    ///
    /// # Errors
    ///
    /// When the kernel cannot carry the wait out at all; the reactor is then of no more use.
    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> io::Result<()>;
}

/// How many files a reactor registers at most.
pub const FILES_MAX: usize = 16;

/// How many eventfds a reactor watches at most.
pub const WATCHES_MAX: usize = 48;

/// Whether [`Reactor::wait`] may block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Submit, collect what is there, return.
    None,
    /// Block until something happens.
    UntilEvent,
}
