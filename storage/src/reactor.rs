//! What a backend may ask of the kernel, and who carries it out.
//!
//! Two reactors exist: io_uring ([`crate::ring`]) and, where the host refuses io_uring, plain
//! system calls ([`crate::plain`]). A seeded simulator is the third.
#![expect(unsafe_code, reason = "operations carry the address of their segments")]

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, RawFd};
use std::time::Instant;

use crate::request::{Durability, Segment};

/// Names one operation or watch; its owner chooses it and gets it back in the [`Event`] or
/// [`Wake::Signalled`]. The top bit is the reactor's own and must be clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// A file that was registered with the reactor, by its place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(pub u32);

/// One operation on a registered file, or on a socket that was made in a file's place.
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
    /// Something that only a socket does.
    Socket {
        /// The socket's place: one of the registered files, or empty.
        file: FileSlot,
        /// What it does.
        operation: SocketOp,
    },
}

/// What is asked of a TCP socket. A socket lives in the place of a registered file; its owner keeps the place's
/// descriptor, if it had one, no longer than until a new socket was made there.
#[derive(Clone, Copy, Debug)]
pub enum SocketOp {
    /// Makes a new socket in the place, and closes what was there: result is 0. Nothing else may be in flight there.
    Make(Family),
    /// Sets an option: result is 0.
    SetOption(SocketOption),
    /// Connects: result is 0 once the peer has answered, or a negative errno once it has refused.
    Connect {
        /// Whom to; it stays in place until the operation ends.
        peer: *const SocketAddress,
    },
    /// `sendmsg` with MSG_NOSIGNAL: result is the number of bytes that were taken; fewer than asked is legal.
    Send {
        /// First of `segment_count` segments; they stay in place until the operation ends.
        segments: *const Segment,
        /// How many segments, at most IOV_MAX.
        segment_count: u32,
    },
    /// `recvmsg`: result is the number of bytes received, as many as are there and fit; 0 is the end of the stream. Where
    /// nothing is there at first, it waits for as much as [`SocketOption::LowWater`] says, or the end of the stream.
    Receive {
        /// First of `segment_count` segments; they stay in place until the operation ends.
        segments: *const Segment,
        /// How many segments, at most IOV_MAX.
        segment_count: u32,
    },
    /// Ends another operation on the same socket early: that one ends with -ECANCELED, or as it would have. Result is 0,
    /// or a negative errno where there was nothing to cancel any more.
    Cancel {
        /// The other operation.
        target: Token,
    },
    /// Copies the socket into a descriptor of the process, which is the result: another reactor goes on with it.
    Take,
    /// Empties the place: result is 0. Nothing else may be in flight there.
    Close,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// AF_INET.
    V4,
    /// AF_INET6.
    V6,
}

/// An option of a TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketOption {
    /// TCP_NODELAY: small sends are not held back.
    NoDelay,
    /// SO_LINGER with no time: closing resets the connection, and nothing of it is delivered later.
    ResetOnClose,
    /// SO_RCVLOWAT: a receive that waits goes on waiting until so much is there. It holds at once, for one that waits
    /// already, too. A kernel that has no room for so much goes on earlier.
    LowWater(LowWater),
}

/// How much a receive waits for: one of a few marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LowWater(&'static libc::c_int);

/// Every mark there is. They lie here for good: the kernel may read one when its operation is long submitted. The low ones are
/// for a few short answers, those from [`LowWater::STEP_BYTES`] on for data.
static MARKS: [libc::c_int; 24] = [
    1, 96, 192, 384, 768, 1_536, 3_072, 8_192, 16_384, 32_768, 49_152, 65_536, 81_920, 98_304, 114_688,
    131_072, 147_456, 163_840, 180_224, 196_608, 212_992, 229_376, 245_760, 262_144,
];

impl LowWater {
    /// Any byte: that of a new socket.
    pub const ANY: Self = Self(&1);
    /// From one mark to the next, where they are high.
    pub const STEP_BYTES: usize = 16 << 10;

    /// The highest mark that `bytes` reach.
    pub fn reached_by(bytes: usize) -> Self {
        let highest = MARKS.iter().map(Self).rfind(|mark| mark.bytes() <= bytes);
        highest.unwrap_or(Self::ANY)
    }

    /// How much that is.
    pub fn bytes(self) -> usize {
        usize::try_from(*self.0).expect("a mark is no negative number")
    }

    /// The same as the kernel reads it.
    pub(crate) fn value(self) -> &'static libc::c_int {
        self.0
    }
}

/// Where a peer listens, laid out as the kernel reads it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SocketAddress {
    storage: libc::sockaddr_storage,
    len: libc::socklen_t,
    address: SocketAddr,
}

impl SocketAddress {
    /// The address and port as the kernel reads them.
    pub fn new(address: SocketAddr) -> Self {
        // SAFETY: a `sockaddr_storage` of zeros is one (AF_UNSPEC).
        let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        let place = (&raw mut storage).cast::<u8>();
        let len = match address {
            SocketAddr::V4(v4) => {
                let inet = libc::sockaddr_in {
                    sin_family: family(libc::AF_INET),
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: u32::from_ne_bytes(v4.ip().octets()),
                    },
                    sin_zero: [0; 8],
                };
                // SAFETY: a `sockaddr_storage` has room and alignment for every kind of address.
                unsafe { place.cast::<libc::sockaddr_in>().write(inet) };
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(v6) => {
                let inet6 = libc::sockaddr_in6 {
                    sin6_family: family(libc::AF_INET6),
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: v6.flowinfo(),
                    sin6_addr: libc::in6_addr {
                        s6_addr: v6.ip().octets(),
                    },
                    sin6_scope_id: v6.scope_id(),
                };
                // SAFETY: as above.
                unsafe { place.cast::<libc::sockaddr_in6>().write(inet6) };
                size_of::<libc::sockaddr_in6>()
            }
        };
        Self {
            storage,
            len: libc::socklen_t::try_from(len).expect("an address is short"),
            address,
        }
    }

    /// The same for people and for simulations.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The family that a socket needs to connect to it.
    pub fn family(&self) -> Family {
        match self.address {
            SocketAddr::V4(_) => Family::V4,
            SocketAddr::V6(_) => Family::V6,
        }
    }

    /// What `connect` takes; valid as long as `self` is in place.
    pub fn as_sockaddr(&self) -> (*const libc::sockaddr, libc::socklen_t) {
        ((&raw const self.storage).cast(), self.len)
    }
}

fn family(number: libc::c_int) -> libc::sa_family_t {
    libc::sa_family_t::try_from(number).expect("address families are small numbers")
}

impl fmt::Debug for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

impl KernelOp {
    /// The file that the operation is on.
    pub fn file(&self) -> FileSlot {
        let (Self::Read { file, .. }
        | Self::Write { file, .. }
        | Self::SyncData { file }
        | Self::Allocate { file, .. }
        | Self::Socket { file, .. }) = *self;
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

    /// The time on the clock of the reactor: that of a simulation is its own.
    fn now(&self) -> Instant {
        crate::clock::now()
    }
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
    /// Registers `files` for use by [`FileSlot`], replacing what was registered before, and closing the sockets that
    /// were made there. A place with [`NO_FILE`], or beyond the list, is empty.
    ///
    /// Nothing may be in flight. The caller keeps the descriptors open until they are replaced, and its sockets are
    /// blocking ones: on others an operation that would wait ends with -EAGAIN on a ring.
    ///
    /// # Errors
    ///
    /// When there are more than [`FILES_MAX`], or the kernel refuses a descriptor.
    fn register(&mut self, files: &[ImageFile]) -> io::Result<()>;

    /// What its operations may be on.
    fn reach(&self) -> Reach {
        Reach::SocketsAndRecords
    }

    /// Reports every write to `eventfd` as [`Wake::Signalled`] with `token`, until [`Self::unwatch`];
    /// a counter that is not zero now is reported too. Nobody else may read the eventfd meanwhile.
    ///
    /// # Errors
    ///
    /// When [`WATCHES_MAX`] are watched, or the kernel refuses the descriptor.
    fn watch(&mut self, eventfd: RawFd, token: Token) -> io::Result<()>;

    /// Reports as [`Wake::Signalled`] with `token` that `fd` has become readable, or is already; until [`Self::unwatch`]. Nothing
    /// is read of it: whoever is told reads all that is there, and may be told again until then.
    ///
    /// # Errors
    ///
    /// As [`Self::watch`], and when the reactor cannot.
    fn watch_readable(&mut self, fd: RawFd, token: Token) -> io::Result<()> {
        let _unsupported = (fd, token);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Takes a watch back: `token` is not reported any more. Unknown tokens are ignored.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; the watch then still counts, but is not reported.
    fn unwatch(&mut self, token: Token) -> io::Result<()>;

    /// Reports [`Wake::TimerExpired`] when [`Submit::now`] has reached `deadline`; a new deadline replaces an older one,
    /// `None` takes it back.
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

/// In the place of a descriptor: none (io_uring_register(2)).
pub const NO_FILE: RawFd = -1;

/// How many eventfds a reactor watches at most.
pub const WATCHES_MAX: usize = 48;

/// A descriptor that operations name by its place, and what is known of what it leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageFile {
    /// The descriptor, or [`NO_FILE`].
    pub fd: RawFd,
    /// What it leads to, as far as that matters.
    pub medium: Medium,
}

/// One of which nothing is known.
impl From<RawFd> for ImageFile {
    fn from(fd: RawFd) -> Self {
        Self {
            fd,
            medium: Medium::Any,
        }
    }
}

/// What a file is on: who opens it looks, so that who serves it does not have to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Medium {
    /// Anything else.
    #[default]
    Any,
    /// It lies in memory.
    Memory,
    /// Its buffered writes are never tried without waiting.
    WaitingWrites,
}

impl Medium {
    /// What `file` is on.
    pub fn of(file: impl AsFd) -> Self {
        match rustix::fs::fstatfs(file).map(|told| told.f_type) {
            Ok(TMPFS_MAGIC | RAMFS_MAGIC) => Self::Memory,
            Ok(EXT4_MAGIC) => Self::WaitingWrites,
            _ => Self::Any,
        }
    }
}

/// `f_type` of a tmpfs, which is what a memfd and /dev/shm are (statfs(2)).
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// `f_type` of a ramfs.
const RAMFS_MAGIC: i64 = 0x8584_58f6;
/// `f_type` of ext2, ext3 and ext4.
const EXT4_MAGIC: i64 = 0xef53;

/// What the operations of a reactor may be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// Registered files; an operation on a socket is refused where the host can do that.
    Files,
    /// Registered files, and sockets that are made in their places.
    FilesAndSockets,
    /// The same; and its thread may open files by name: there are the records of a lease.
    SocketsAndRecords,
}

impl Reach {
    /// What an image of a network needs, by whether its lease has its records in a directory.
    pub(crate) fn of_remote(has_records_in_files: bool) -> Self {
        match has_records_in_files {
            true => Self::SocketsAndRecords,
            false => Self::FilesAndSockets,
        }
    }
}

/// Whether [`Reactor::wait`] may block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Submit, collect what is there, return.
    None,
    /// Block until something happens.
    UntilEvent,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_reached_by_no_less_than_itself_and_lies_a_step_above_the_last() {
        let marks: Vec<LowWater> = MARKS.iter().map(LowWater).collect();
        assert!(marks.is_sorted() && marks.first() == Some(&LowWater::ANY));
        let high = marks.iter().filter(|mark| mark.bytes() >= LowWater::STEP_BYTES);
        for (steps, mark) in (1..).zip(high) {
            assert_eq!(mark.bytes(), steps * LowWater::STEP_BYTES);
        }
        for mark in marks {
            assert_eq!(LowWater::reached_by(mark.bytes()), mark);
            assert!(LowWater::reached_by(mark.bytes() - 1) < mark || mark == LowWater::ANY);
        }
        assert_eq!(LowWater::reached_by(0), LowWater::ANY);
        assert_eq!(LowWater::reached_by(usize::MAX).bytes(), 256 << 10);
    }
}
