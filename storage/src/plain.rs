//! The reactor on plain system calls: operations run one after the other, while the owner waits.
//!
//! It serves `io_engine: Sync`, and hosts that refuse io_uring.
#![expect(
    unsafe_code,
    reason = "vectored reads and writes of guest memory, on borrowed descriptors"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::reactor::{Event, FILES_MAX, Full, KernelOp, Patience, Reactor, Submit, Token, WATCHES_MAX, Wake};
use crate::request::Durability;

/// A reactor without a ring: [`Reactor::wait`] carries out what was submitted, in order, then polls.
#[derive(Debug)]
pub struct Plain {
    files: Vec<RawFd>,
    watches: Vec<(RawFd, Token)>,
    queued: VecDeque<(KernelOp, Token)>,
    ops_max: usize,
    deadline: Option<Instant>,
}

impl Plain {
    /// A reactor with room for `ops_max` operations.
    pub fn new(ops_max: u32) -> Self {
        let ops_max = usize::try_from(ops_max).unwrap_or(usize::MAX);
        Self {
            files: Vec::new(),
            watches: Vec::new(),
            queued: VecDeque::with_capacity(ops_max),
            ops_max,
            deadline: None,
        }
    }
}

impl Submit for Plain {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        if self.queued.len() == self.ops_max {
            return Err(Full);
        }
        self.queued.push_back((op, token));
        Ok(())
    }
}

impl Reactor for Plain {
    fn register(&mut self, files: &[RawFd]) -> io::Result<()> {
        assert!(
            self.queued.is_empty(),
            "files are replaced only when nothing is in flight"
        );
        if files.len() > FILES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        self.files = files.to_vec();
        Ok(())
    }

    fn watch(&mut self, eventfd: RawFd, token: Token) -> io::Result<()> {
        if self.watches.len() == WATCHES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        self.watches.push((eventfd, token));
        Ok(())
    }

    fn unwatch(&mut self, token: Token) -> io::Result<()> {
        self.watches.retain(|(_, watched)| *watched != token);
        Ok(())
    }

    fn set_timer(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> io::Result<()> {
        let nothing_queued = self.queued.is_empty();
        while let Some((op, token)) = self.queued.pop_front() {
            let result = run(op, &self.files);
            wakes.push(Wake::Done(Event { token, result }));
        }
        let limit = match (patience, self.deadline) {
            (Patience::UntilEvent, None) if nothing_queued => None,
            (Patience::UntilEvent, Some(deadline)) if nothing_queued => {
                Some(deadline.saturating_duration_since(Instant::now()))
            }
            _ => Some(Duration::ZERO),
        };
        self.poll(limit, wakes)?;
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.deadline = None;
            wakes.push(Wake::TimerExpired);
        }
        Ok(())
    }
}

impl Plain {
    fn poll(&self, limit: Option<Duration>, wakes: &mut Vec<Wake>) -> io::Result<()> {
        let entry = |(eventfd, _): &(RawFd, Token)| PollFd::from_borrowed_fd(borrow(*eventfd), PollFlags::IN);
        let mut polled: Vec<PollFd<'_>> = self.watches.iter().map(entry).collect();
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match rustix::event::poll(&mut polled, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        for (entry, (eventfd, token)) in polled.iter().zip(&self.watches) {
            if entry.revents().intersects(PollFlags::NVAL | PollFlags::ERR) {
                return Err(io::Error::from_raw_os_error(libc::EBADF));
            }
            if entry.revents().contains(PollFlags::IN) {
                // Resets the counter; it is readable and nobody else reads it, so this cannot block.
                rustix::io::read(borrow(*eventfd), &mut [0_u8; 8])?;
                wakes.push(Wake::Signalled(*token));
            }
        }
        Ok(())
    }
}

/// Carries `op` out; a count or a negative errno, as io_uring would answer.
pub(crate) fn run(op: KernelOp, files: &[RawFd]) -> i32 {
    let slot = usize::try_from(op.file().0).ok();
    let Some(fd) = slot.and_then(|slot| files.get(slot)).copied() else {
        return -libc::EBADF;
    };
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
        KernelOp::Socket { .. } => -libc::EOPNOTSUPP,
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
