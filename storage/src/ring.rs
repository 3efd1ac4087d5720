//! The reactor on io_uring; the only io_uring code there is.
//!
//! The ring may reach nothing but its registered files, and sockets in their places if it is set up for them
//! (restrictions: every entry must name a fixed file, and only the operations of an image exist), belongs to one
//! thread (SINGLE_ISSUER) and runs its completions only when that thread enters it (DEFER_TASKRUN): no interprocessor
//! interrupts.
#![expect(unsafe_code, reason = "entries of the submission queue carry addresses")]

mod entry;
mod inline;
mod restrictions;
mod socket;
#[cfg(test)]
mod tests;
mod unavailable;

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{CancelBuilder, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};

use crate::clock;
use crate::reactor::{
    Event, FILES_MAX, Full, ImageFile, KernelOp, NO_FILE, Patience, Reach, Reactor, SocketOp, Submit, Token,
    WATCHES_MAX, Wake,
};
use crate::socket::place;
use entry::entry_of;
use inline::Inline;
use restrictions::restrict;
use socket::Messages;
pub use unavailable::Unavailable;

/// A ring that is set up and restricted, but not yet bound to a thread: the thread that will use
/// it calls [`PreparedRing::enable`].
pub struct PreparedRing {
    ring: IoUring,
    ops_max: u32,
    reach: Reach,
}

impl PreparedRing {
    /// What its operations may be on.
    pub fn reach(&self) -> Reach {
        self.reach
    }

    /// Sets a ring up for `ops_max` operations in flight on what is in `reach`. This is also the probe of the host: the
    /// setup flags are younger than every operation on files, so a kernel that takes them has them all.
    ///
    /// # Errors
    ///
    /// What this host lacks, and what to do about it.
    pub fn new(ops_max: u32, reach: Reach) -> Result<Self, Unavailable> {
        Self::with_workers(ops_max, reach, FILE_WORKERS_MAX)
    }

    /// The same with at most `file_workers_max` kernel workers for operations on files.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn with_workers(ops_max: u32, reach: Reach, file_workers_max: u32) -> Result<Self, Unavailable> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            // Lets a look for completions skip the system call when there is nothing to run.
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_r_disabled()
            .setup_cqsize((2 * (ops_max + WATCH_ENTRIES)).next_power_of_two())
            .build((ops_max + WATCH_ENTRIES).next_power_of_two())
            .map_err(Unavailable::from_setup)?;
        restrict(&ring, reach, file_workers_max)?;
        Ok(Self { ring, ops_max, reach })
    }

    /// Binds the ring to the calling thread, which from now on is the only one that may use it.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn enable(self) -> io::Result<Ring> {
        self.ring.submitter().register_enable_rings()?;
        let messages_max = match self.reach {
            Reach::Files => 0,
            Reach::FilesAndSockets | Reach::SocketsAndRecords => self.ops_max,
        };
        let messages_max = messages_max.try_into().expect("this is a 64-bit monitor");
        Ok(Ring {
            ring: self.ring,
            ops_max: self.ops_max,
            reach: self.reach,
            messages: Messages::with_capacity(messages_max),
            ops_in_flight: 0,
            inline: Inline::default(),
            done: Vec::new(),
            watches: [const { WatchSlot::EMPTY }; WATCHES_MAX],
            deadline: None,
        })
    }
}

/// Kernel workers of a disk's ring for operations on files, which are bounded by the medium. Without a cap the kernel starts up
/// to one per operation in flight.
const FILE_WORKERS_MAX: u32 = 4;

/// Room in the submission queue for watches; they are submitted at once, so one would do.
const WATCH_ENTRIES: u32 = 2;

/// Fixed files: first those of the backend, then the watched eventfds.
#[expect(clippy::cast_possible_truncation, reason = "64")]
const FIXED_FILES: u32 = (FILES_MAX + WATCHES_MAX) as u32;

/// An io_uring that belongs to the thread that enabled it.
///
/// Eventfds are watched by multishot polls. Each write posts a completion, edge-triggered, without
/// a new entry and without reading the counter; a one-shot poll would cost an entry and a `read`
/// per kick, and a read operation an entry and a descriptor that blocks. The timer is the limit of the wait
/// itself (IORING_ENTER_EXT_ARG): replacing it costs nothing.
pub struct Ring {
    ring: IoUring,
    ops_max: u32,
    reach: Reach,
    ops_in_flight: u32,
    messages: Messages,
    inline: Inline,
    /// The ends of operations that bypassed the ring.
    done: Vec<Event>,
    watches: [WatchSlot; WATCHES_MAX],
    deadline: Option<Instant>,
}

/// One place for a watched eventfd. A poll that was removed still completes once, with the
/// generation under which it was armed; that tells it from the slot's next watch.
struct WatchSlot {
    token: Option<Token>,
    generation: u32,
    /// The kernel ended the poll (it does when it has no room for a completion); arm it again.
    lapsed: bool,
}

impl WatchSlot {
    const EMPTY: Self = Self {
        token: None,
        generation: 0,
        lapsed: false,
    };
}

/// Marks the user data of a watch; below it the generation, and the slot in the lowest eight bits.
const WATCH: u64 = 1 << 63;
const SLOT_BITS: u32 = 8;
/// User data of the removal of a watch; no slot has this number.
const REMOVAL: u64 = u64::MAX;

impl Submit for Ring {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        assert!(
            token.0 & WATCH == 0,
            "the top bit of a token belongs to the reactor"
        );
        if self.ops_in_flight == self.ops_max {
            return Err(Full);
        }
        if let Some(result) = self.run_at_once(&op) {
            // It has its room until its event is reported, like any other: its successor may need the ring.
            self.ops_in_flight += 1;
            self.done.push(Event { token, result });
            return Ok(());
        }
        let entry = self.entry_of(op).user_data(token.0);
        // SAFETY: the operation's segments stay in place, and the memory they name stays mapped,
        // until the operation ends: the contracts of `KernelOp` and `Segment::new`.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| Full)?;
        self.ops_in_flight += 1;
        Ok(())
    }
}

impl Reactor for Ring {
    fn register(&mut self, files: &[ImageFile]) -> io::Result<()> {
        assert!(
            self.ops_in_flight == 0,
            "files are replaced only when nothing is in flight"
        );
        let mut slots = [NO_FILE; FILES_MAX];
        let Some(used) = slots.get_mut(..files.len()) else {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        };
        for (slot, file) in used.iter_mut().zip(files) {
            *slot = file.fd;
        }
        self.ring.submitter().register_files_update(0, &slots)?;
        self.inline = Inline::new(files);
        Ok(())
    }

    fn reach(&self) -> Reach {
        self.reach
    }

    fn watch(&mut self, eventfd: RawFd, token: Token) -> io::Result<()> {
        let Some(slot) = self.watches.iter().position(|watch| watch.token.is_none()) else {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        };
        self.ring
            .submitter()
            .register_files_update(watch_file(slot), &[eventfd])?;
        if let Some(watch) = self.watches.get_mut(slot) {
            watch.token = Some(token);
        }
        self.arm(slot)
    }

    fn watch_readable(&mut self, fd: RawFd, token: Token) -> io::Result<()> {
        // A multishot poll reads nothing, of an eventfd neither.
        self.watch(fd, token)
    }

    fn unwatch(&mut self, token: Token) -> io::Result<()> {
        let Some(slot) = self.watches.iter().position(|watch| watch.token == Some(token)) else {
            return Ok(());
        };
        let Some(watch) = self.watches.get_mut(slot) else {
            return Ok(());
        };
        let armed_as = watch_data(slot, watch.generation);
        watch.token = None;
        watch.generation = watch.generation.wrapping_add(1);
        watch.lapsed = false;
        let removal = opcode::PollRemove::new(armed_as).build();
        self.push_now(&removal.flags(Flags::FIXED_FILE).user_data(REMOVAL))?;
        self.ring
            .submitter()
            .register_files_update(watch_file(slot), &[NO_FILE])
            .map(drop)
    }

    fn set_timer(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> io::Result<()> {
        let patience = if self.done.is_empty() {
            patience
        } else {
            Patience::None
        };
        for event in self.done.drain(..) {
            self.ops_in_flight -= 1;
            wakes.push(Wake::Done(event));
        }
        self.enter(patience)?;
        if self.collect(wakes)? {
            self.arm_lapsed()?;
        }
        if self.deadline.is_some_and(|deadline| deadline <= clock::now()) {
            self.deadline = None;
            wakes.push(Wake::TimerExpired);
        }
        Ok(())
    }
}

impl Ring {
    /// Carries `op` out if it needs no ring; the result is that of the system call, as in an event.
    #[inline]
    fn run_at_once(&mut self, op: &KernelOp) -> Option<i32> {
        if let KernelOp::Socket { file, operation } = op {
            return self.empty_place(place(*file), operation);
        }
        self.inline.run(op)
    }

    /// Empties a place if it is to be closed: the ring takes no entry for that.
    fn empty_place(&mut self, place: usize, operation: &SocketOp) -> Option<i32> {
        match operation {
            SocketOp::Make(_) => {
                self.inline.forget(place);
                None
            }
            SocketOp::Close if self.reach > Reach::Files => {
                self.inline.forget(place);
                let place = place.try_into().expect("there are few places");
                let emptied = self.ring.submitter().register_files_update(place, &[NO_FILE]);
                Some(emptied.map_or_else(|error| -error.raw_os_error().unwrap_or(libc::EIO), |_| 0))
            }
            _ => None,
        }
    }

    fn entry_of(&mut self, op: KernelOp) -> Entry {
        match op {
            // A ring without reach for it has no room for its message. NOP is refused by the kernel in its stead.
            KernelOp::Socket { .. } if self.reach == Reach::Files => opcode::Nop::new().build(),
            KernelOp::Socket { .. } => {
                if self.ring.submission().is_empty() {
                    self.messages.clear();
                }
                entry_of(op, &mut self.messages)
            }
            _ => entry_of(op, &mut self.messages),
        }
    }

    fn arm(&mut self, slot: usize) -> io::Result<()> {
        let Some(watch) = self.watches.get_mut(slot) else {
            return Ok(());
        };
        watch.lapsed = false;
        let data = watch_data(slot, watch.generation);
        let poll = opcode::PollAdd::new(Fixed(watch_file(slot)), libc::POLLIN.unsigned_abs().into());
        self.push_now(&poll.multi(true).build().user_data(data))
    }

    fn arm_lapsed(&mut self) -> io::Result<()> {
        for slot in 0..WATCHES_MAX {
            if self.watches.get(slot).is_some_and(|watch| watch.lapsed) {
                self.arm(slot)?;
            }
        }
        Ok(())
    }

    /// Pushes an entry that carries no address, and submits: the queue keeps its room for operations.
    fn push_now(&mut self, entry: &Entry) -> io::Result<()> {
        // SAFETY: the entry is a poll, its removal, or the end of everything; it names no memory.
        unsafe { self.ring.submission().push(entry) }
            .map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))?;
        self.ring.submit().map(drop).or_else(ignore_interruption)
    }

    fn enter(&mut self, patience: Patience) -> io::Result<()> {
        let submission = self.ring.submission();
        let idle = submission.is_empty() && !submission.taskrun() && !submission.cq_overflow();
        drop(submission);
        let entered = match (patience, self.deadline) {
            (Patience::None, _) if idle => return Ok(()),
            (Patience::None, _) => self.ring.submit(),
            (Patience::UntilEvent, None) => self.ring.submit_and_wait(1),
            (Patience::UntilEvent, Some(deadline)) => {
                let limit = Timespec::from(deadline.saturating_duration_since(clock::now()));
                self.ring
                    .submitter()
                    .submit_with_args(1, &SubmitArgs::new().timespec(&limit))
            }
        };
        entered.map(drop).or_else(ignore_interruption)
    }

    /// Appends what the completion queue holds; says whether a watch lapsed.
    fn collect(&mut self, wakes: &mut Vec<Wake>) -> io::Result<bool> {
        let mut any_lapsed = false;
        for completion in self.ring.completion() {
            let (data, result) = (completion.user_data(), completion.result());
            if data & WATCH == 0 {
                self.ops_in_flight -= 1;
                wakes.push(Wake::Done(Event {
                    token: Token(data),
                    result,
                }));
                continue;
            }
            // A removal, or the last words of a watch that was removed, find no slot.
            let Some((watch, token)) = live_watch(&mut self.watches, data) else {
                continue;
            };
            if result < 0 && result != -libc::ECANCELED {
                return Err(io::Error::from_raw_os_error(-result));
            }
            if !cqueue::more(completion.flags()) {
                watch.lapsed = true;
                any_lapsed = true;
            }
            wakes.push(Wake::Signalled(token));
        }
        Ok(any_lapsed)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Closing a ring does not stop the kernel from writing to the memory of operations in
        // flight; whoever dropped it may unmap that memory next.
        if let Err(error) = self.drain() {
            log::error!(
                "cannot wait for {} disk operations in flight: {error}",
                self.ops_in_flight
            );
        }
    }
}

/// How long the end of what was cancelled is waited for until it is cancelled again.
const CANCEL_PATIENCE: Duration = Duration::from_millis(100);

impl Ring {
    /// Returns when nothing is in flight. What waits for a peer, which may be for ever, is cancelled;
    /// an operation on a file ends when the medium has answered.
    fn drain(&mut self) -> io::Result<()> {
        let mut wakes = Vec::new();
        while self.ops_in_flight > 0 {
            if self.reach > Reach::Files {
                self.cancel_everything()?;
                self.deadline = Some(clock::now() + CANCEL_PATIENCE);
            }
            self.wait(Patience::UntilEvent, &mut wakes)?;
            wakes.clear();
        }
        if self.reach > Reach::Files {
            // A ring is torn down some time after it was closed; the peers learn of the end now.
            self.ring
                .submitter()
                .register_files_update(0, &[NO_FILE; FILES_MAX])?;
        }
        Ok(())
    }

    fn cancel_everything(&mut self) -> io::Result<()> {
        for watch in &mut self.watches {
            watch.token = None;
        }
        let cancel = opcode::AsyncCancel2::new(CancelBuilder::any().all()).build();
        self.push_now(&cancel.flags(Flags::FIXED_FILE).user_data(REMOVAL))
    }
}

fn live_watch(watches: &mut [WatchSlot], data: u64) -> Option<(&mut WatchSlot, Token)> {
    let slot = usize::try_from(data & ((1 << SLOT_BITS) - 1)).ok()?;
    let watch = watches.get_mut(slot)?;
    let token = watch.token?;
    (watch_data(slot, watch.generation) == data).then_some((watch, token))
}

fn watch_data(slot: usize, generation: u32) -> u64 {
    WATCH | u64::from(generation) << SLOT_BITS | slot as u64
}

fn watch_file(slot: usize) -> u32 {
    u32::try_from(FILES_MAX + slot).expect("there are 64 fixed files")
}

/// A wait that was cut short, timed out or found the completion queue full is no failure: the
/// caller collects what there is and comes back.
fn ignore_interruption(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => Ok(()),
        _ => Err(error),
    }
}
