//! The reactor on plain system calls: operations run one after the other, while the owner waits.
//!
//! Only what waits for a peer is tried without waiting, and again when the poll at the end says so.
//! It serves `io_engine: Sync`, and hosts that refuse io_uring.
#![expect(
    unsafe_code,
    reason = "vectored reads and writes of guest memory, on borrowed descriptors"
)]

mod sockets;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::clock;
use crate::reactor::{
    Event, FILES_MAX, Full, ImageFile, KernelOp, NO_FILE, Patience, Reactor, Submit, Token, WATCHES_MAX, Wake,
};
use crate::request::Durability;
use sockets::Sockets;

/// A reactor without a ring: [`Reactor::wait`] carries out what was submitted, in order, then polls.
#[derive(Debug)]
pub struct Plain {
    /// Those that were registered, and the sockets that were made in their places.
    files: [RawFd; FILES_MAX],
    sockets: Sockets,
    watches: Vec<Watch>,
    queued: VecDeque<(KernelOp, Token)>,
    ops_max: usize,
    deadline: Option<Instant>,
    /// The list of the last poll, for its room.
    polled: Vec<PollFd<'static>>,
}

/// A descriptor that is polled while the owner waits.
#[derive(Debug)]
struct Watch {
    fd: RawFd,
    token: Token,
    reading: Reading,
}

/// Who reads what is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// The reactor: it is a counter that is to be reset.
    Resets,
    /// Whoever is told.
    Leaves,
}

impl Plain {
    /// A reactor with room for `ops_max` operations.
    pub fn new(ops_max: u32) -> Self {
        let ops_max = usize::try_from(ops_max).unwrap_or(usize::MAX);
        Self {
            files: [NO_FILE; FILES_MAX],
            sockets: Sockets::default(),
            watches: Vec::new(),
            queued: VecDeque::with_capacity(ops_max),
            ops_max,
            deadline: None,
            polled: Vec::new(),
        }
    }

    /// How many operations were submitted and have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.queued.len() + self.sockets.waiting()
    }
}

impl Submit for Plain {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        if self.in_flight() == self.ops_max {
            return Err(Full);
        }
        self.queued.push_back((op, token));
        Ok(())
    }
}

impl Reactor for Plain {
    fn register(&mut self, files: &[ImageFile]) -> io::Result<()> {
        assert!(
            self.in_flight() == 0,
            "files are replaced only when nothing is in flight"
        );
        let mut places = [NO_FILE; FILES_MAX];
        let Some(used) = places.get_mut(..files.len()) else {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        };
        for (place, file) in used.iter_mut().zip(files) {
            *place = file.fd;
        }
        self.files = places;
        self.sockets = Sockets::default();
        Ok(())
    }

    fn watch(&mut self, eventfd: RawFd, token: Token) -> io::Result<()> {
        self.add_watch(eventfd, token, Reading::Resets)
    }

    fn watch_readable(&mut self, fd: RawFd, token: Token) -> io::Result<()> {
        self.add_watch(fd, token, Reading::Leaves)
    }

    fn unwatch(&mut self, token: Token) -> io::Result<()> {
        self.watches.retain(|watch| watch.token != token);
        Ok(())
    }

    fn set_timer(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> io::Result<()> {
        let before = wakes.len();
        self.run_queued(wakes);
        loop {
            let limit = match (patience, self.deadline) {
                (Patience::UntilEvent, None) if wakes.len() == before => None,
                (Patience::UntilEvent, Some(deadline)) if wakes.len() == before => {
                    Some(deadline.saturating_duration_since(clock::now()))
                }
                _ => Some(Duration::ZERO),
            };
            let polled = self.poll(limit, wakes)?;
            if self.deadline.is_some_and(|deadline| deadline <= clock::now()) {
                self.deadline = None;
                wakes.push(Wake::TimerExpired);
            }
            // A socket may be ready and its operation not at its end.
            if wakes.len() > before || patience == Patience::None || polled == Polled::Interrupted {
                return Ok(());
            }
        }
    }
}

/// How a poll came back.
#[derive(PartialEq, Eq)]
enum Polled {
    /// Something is ready, or the time is up.
    Ended,
    /// A signal came.
    Interrupted,
}

impl Plain {
    fn add_watch(&mut self, fd: RawFd, token: Token, reading: Reading) -> io::Result<()> {
        if self.watches.len() == WATCHES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        self.watches.push(Watch { fd, token, reading });
        Ok(())
    }

    fn run_queued(&mut self, wakes: &mut Vec<Wake>) {
        while let Some((op, token)) = self.queued.pop_front() {
            match op {
                KernelOp::Socket { file, operation } => {
                    self.sockets
                        .start((file, operation), token, &mut self.files, wakes);
                }
                _ => {
                    let result = run(op, &self.files);
                    wakes.push(Wake::Done(Event { token, result }));
                }
            }
        }
    }

    fn poll(&mut self, limit: Option<Duration>, wakes: &mut Vec<Wake>) -> io::Result<Polled> {
        let entry = |watch: &Watch| PollFd::from_borrowed_fd(borrow(watch.fd), PollFlags::IN);
        self.polled.clear();
        self.polled.extend(self.watches.iter().map(entry));
        self.polled.extend(self.sockets.polls());
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match rustix::event::poll(&mut self.polled, limit.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Polled::Interrupted),
            Err(errno) => return Err(errno.into()),
        }
        let mut polled = self.polled.iter().map(PollFd::revents);
        for (watch, revents) in self.watches.iter().zip(polled.by_ref()) {
            if revents.intersects(PollFlags::NVAL | PollFlags::ERR) {
                return Err(io::Error::from_raw_os_error(libc::EBADF));
            }
            if revents.contains(PollFlags::IN) && watch.reading == Reading::Resets {
                // It is readable and nobody else reads it, so this cannot block.
                rustix::io::read(borrow(watch.fd), &mut [0_u8; 8])?;
            }
            // The end of what another closes is read like anything else.
            if revents.intersects(PollFlags::IN | PollFlags::HUP) {
                wakes.push(Wake::Signalled(watch.token));
            }
        }
        self.sockets.go_on(polled, wakes);
        Ok(Polled::Ended)
    }
}

/// Carries `op`, which is on a file, out; a count or a negative errno, as io_uring would answer.
pub(crate) fn run(op: KernelOp, files: &[RawFd]) -> i32 {
    let slot = usize::try_from(op.file().0).ok();
    let Some(fd) = slot.and_then(|slot| files.get(slot)).copied() else {
        return -libc::EBADF;
    };
    if fd == NO_FILE {
        return -libc::EBADF;
    }
    match op {
        KernelOp::Read {
            segments,
            segment_count,
            offset_bytes,
            ..
        } => {
            let (Ok(count), Ok(offset)) = (segment_count.try_into(), offset_bytes.try_into()) else {
                return -libc::EINVAL;
            };
            // SAFETY: the segments and their memory are valid until the operation ends, which is
            // when this call returns (contracts of `KernelOp` and `Segment::new`).
            result_of(unsafe { libc::preadv(fd, segments.cast(), count, offset) })
        }
        KernelOp::Write {
            segments,
            segment_count,
            offset_bytes,
            durability,
            ..
        } => {
            let (Ok(count), Ok(offset)) = (segment_count.try_into(), offset_bytes.try_into()) else {
                return -libc::EINVAL;
            };
            let flags = match durability {
                Durability::Cached => 0,
                Durability::Durable => libc::RWF_DSYNC,
            };
            // SAFETY: as for the read.
            result_of(unsafe { libc::pwritev2(fd, segments.cast(), count, offset, flags) })
        }
        KernelOp::SyncData { .. } => errno_of(rustix::fs::fdatasync(borrow(fd))),
        KernelOp::Allocate {
            mode,
            offset_bytes,
            len_bytes,
            ..
        } => {
            let flags = rustix::fs::FallocateFlags::from_bits_retain(mode.cast_unsigned());
            errno_of(rustix::fs::fallocate(borrow(fd), flags, offset_bytes, len_bytes))
        }
        KernelOp::Socket { .. } => unreachable!("operations on sockets may have to wait"),
    }
}

fn result_of(count: isize) -> i32 {
    if count < 0 {
        return -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    }
    // The kernel transfers at most 0x7fff_f000 bytes at a time (MAX_RW_COUNT).
    i32::try_from(count).unwrap_or(i32::MAX)
}

fn errno_of(result: rustix::io::Result<()>) -> i32 {
    result.map_or_else(|errno| -errno.raw_os_error(), |()| 0)
}

fn borrow<'fd>(fd: RawFd) -> BorrowedFd<'fd> {
    // SAFETY: whoever registered or watches a descriptor keeps it open until it is replaced or
    // taken back (contract of `Reactor`).
    unsafe { BorrowedFd::borrow_raw(fd) }
}
