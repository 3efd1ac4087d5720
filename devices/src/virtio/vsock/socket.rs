//! The Unix sockets of the host: the one that callers connect to, with its file, and the streams.
#![expect(unsafe_code, reason = "messages from and into guest memory")]

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use coracle_storage::request::Segment;
use rustix::fs::{AtFlags, CWD, unlinkat};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    shutdown, socket_with,
};

/// Longest path of a socket, in bytes: `sun_path` without its final zero.
const PATH_BYTES_MAX: usize = 107;
/// Callers that wait to be accepted; those beyond are made to wait, or are refused, by the kernel.
const BACKLOG: i32 = 128;
/// No call here waits.
const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// The socket that programs of the host connect to. Its file is there as long as it is, and as long as the device that it was
/// given to.
#[derive(Debug)]
pub struct Listener {
    pub(super) socket: OwnedFd,
    pub(super) file: SocketFile,
}

impl Listener {
    /// Makes the socket at `path`.
    ///
    /// # Errors
    ///
    /// There is something, or nothing can be made there; and what to do then.
    pub fn bind(path: &str) -> Result<Self, ListenError> {
        let failed = |source: io::Error| ListenError::new(path, source);
        let address = SocketAddrUnix::new(path).map_err(|source| failed(source.into()))?;
        let socket = stream_socket().map_err(failed)?;
        bind(&socket, &address).map_err(|source| failed(source.into()))?;
        let file = SocketFile::of(Path::new(path)).map_err(failed)?;
        listen(&socket, BACKLOG).map_err(|source| failed(source.into()))?;
        Ok(Self { socket, file })
    }

    /// Says whether [`Self::bind`] would be refused now.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn check(path: &str) -> Result<(), ListenError> {
        Self::bind(path).map(drop)
    }

    /// Who has called, or `WouldBlock`.
    pub(super) fn accept(socket: &OwnedFd) -> io::Result<Stream> {
        Ok(Stream(accept_with(socket, FLAGS)?))
    }
}

/// The file of a socket; it is gone with this, if it is still the same.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identity(path)?,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = path.symlink_metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have removed it, or the directory, or have made another there since.
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _nothing_there = unlinkat(CWD, &self.path, AtFlags::empty());
        }
    }
}

fn stream_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?)
}

/// One end of a stream. Nothing here waits: what cannot be done at once is `WouldBlock`.
#[derive(Debug)]
pub(super) struct Stream(OwnedFd);

impl Stream {
    /// Connects to who listens at `path`.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let socket = stream_socket()?;
        // A Unix socket is connected at once; one whose listener has too many callers is not.
        connect(&socket, &address)?;
        Ok(Self(socket))
    }

    /// Receives into `segments`; 0 when the other end sends no more.
    pub(super) fn receive(&self, segments: &[Segment]) -> io::Result<usize> {
        self.receive_by(segments, 0)
    }

    fn receive_by(&self, segments: &[Segment], flags: libc::c_int) -> io::Result<usize> {
        let mut message = message(segments);
        // SAFETY: the message names segments that their maker has promised to stay mapped while they are lent, and no other
        // buffer. Descriptors that come along find no room, and are closed by the kernel.
        let result =
            unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, flags | libc::MSG_DONTWAIT) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Sends from `segments`, as much as is taken at once.
    pub(super) fn send(&self, segments: &[Segment]) -> io::Result<usize> {
        let message = message(segments);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: as above; the kernel only reads them.
        let result = unsafe { libc::sendmsg(self.0.as_raw_fd(), &raw const message, flags) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// The same from two pieces of this process's memory.
    pub(super) fn send_bytes(&self, pieces: [&[u8]; 2]) -> io::Result<usize> {
        let segments = pieces.map(|piece| {
            // SAFETY: the piece outlives the call, which only reads it.
            unsafe { Segment::new(NonNull::from(piece).cast(), piece.len()) }
        });
        self.send(&segments)
    }

    /// Reads up to and with the first end of a line, and no further; at most as much as fits. 0 when there will be no more.
    pub(super) fn receive_line(&self, to: &mut [u8]) -> io::Result<usize> {
        let segment = |to: &mut [u8]| {
            // SAFETY: the bytes outlive the calls below, and nobody else looks at them meanwhile.
            unsafe { Segment::new(NonNull::from(&mut *to).cast(), to.len()) }
        };
        let there = self.receive_by(&[segment(to)], libc::MSG_PEEK)?;
        let seen = to.get(..there).unwrap_or_default();
        let wanted = seen
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(there, |at| at + 1);
        match to.get_mut(..wanted) {
            Some(line) if wanted > 0 => self.receive(&[segment(line)]),
            _ => Ok(0),
        }
    }

    /// Tells the other end that nothing more comes.
    pub(super) fn end_sending(&self) {
        // Refused only when the other end is gone.
        let _ = shutdown(&self.0, Shutdown::Write);
    }

    /// Refuses what the other end sends from now on.
    pub(super) fn end_receiving(&self) {
        // As above.
        let _ = shutdown(&self.0, Shutdown::Read);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether it is worth trying again when the socket is ready.
pub(super) fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Segments are laid out as what the kernel takes.
fn message(segments: &[Segment]) -> libc::msghdr {
    // SAFETY: all of its fields are numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // The kernel does not write it.
    message.msg_iov = segments.as_ptr().cast_mut().cast();
    message.msg_iovlen = segments.len();
    message
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("uds_path `{path}` is in use: a running process listens there; give each machine its own path")]
    Served {
        /// As configured.
        path: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Something is left over there.
    #[error(
        "there is something at uds_path `{path}` already, where nobody listens: remove it, or choose another path"
    )]
    Exists {
        /// As configured.
        path: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Nothing can be made there.
    #[error(
        "uds_path `{path}` cannot be made: choose a path of at most {PATH_BYTES_MAX} bytes, in a directory that exists (in the \
         jail, if there is one) and in which this user may create it"
    )]
    Create {
        /// As configured.
        path: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

impl ListenError {
    fn new(path: &str, source: io::Error) -> Self {
        let is_served = || Stream::connect(Path::new(path)).is_ok();
        let is_there = source.kind() == ErrorKind::AddrInUse;
        let path = path.to_owned();
        match () {
            () if !is_there => Self::Create { path, source },
            () if is_served() => Self::Served { path, source },
            () => Self::Exists { path, source },
        }
    }
}
