//! A tap of the host: a network interface whose other end is a descriptor, or several, of which each has a queue of its own.
#![expect(
    unsafe_code,
    reason = "ioctls of the tun driver, and vectored I/O into guest memory"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;

use coracle_storage::request::Segment;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
};

/// What makes taps.
const TUN: &str = "/dev/net/tun";
/// How the name of a descriptor begins.
pub(super) const HANDED_IN: &str = "/dev/fd/";
/// What is between the names of several.
pub(super) const AND: char = ',';
/// Of a tap that stays when nobody has it open (`linux/if_tun.h`).
const IFF_PERSIST: libc::c_int = 0x0800;
/// Whole frames, nothing of the driver's before them, but a virtio header.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// `struct virtio_net_hdr_v1`, which goes before each frame (5.1.6).
pub(super) const HEADER_BYTES: usize = 12;
/// The largest frame with its header: 64 KiB of IP and the Ethernet header before it.
pub(super) const FRAME_BYTES_MAX: usize = HEADER_BYTES + 14 + 65_535;

/// An open tap whose frames have a virtio header, and that never waits.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<TapQueue>,
    /// Whether this kernel cuts and joins UDP segments (since Linux 6.2).
    has_uso: bool,
}

/// One queue of a tap.
#[derive(Debug)]
pub(super) struct TapQueue {
    file: File,
    /// What the kernel lets be attached and detached; the only queue of a tap cannot be.
    is_one_of_several: bool,
}

impl Tap {
    /// Opens the tap of this name with so many queues; one that is not there is made for as long as it is open, if this process
    /// may do that. A name as `/dev/fd/7` is that of a descriptor of a tap, which whoever has started the process has handed
    /// in; of a tap with several queues there are as many, as in `/dev/fd/7,/dev/fd/8`.
    ///
    /// # Errors
    ///
    /// When it cannot be had, and what to do then.
    pub fn open(name: &str, queues: u16) -> Result<Self, TapError> {
        if name.starts_with(HANDED_IN) {
            return Self::all_handed_in(name, queues);
        }
        let refused = |source| TapError::new(name, queues, source);
        let files: Vec<File> = (0..queues)
            .map(|_| opened(name, queues))
            .collect::<Result<_, _>>()?;
        let flags = files.first().map(flags_of).transpose().map_err(refused)?;
        // Firecracker takes one as well, which the kernel has just made for it; who has mistyped a name is to hear of that.
        if flags.is_some_and(|(flags, _)| flags & IFF_PERSIST == 0) {
            log::warn!(
                "tap '{name}' is there for as long as it is open; if nobody else had made it before, it is down and has no \
                 address: ip tuntap add dev {name} mode tap"
            );
        }
        Self::of(files).map_err(refused)
    }

    fn all_handed_in(names: &str, queues: u16) -> Result<Self, TapError> {
        let mut interface = None;
        let mut files = Vec::new();
        for (number, name) in names.split(AND).enumerate() {
            let refused = |source| TapError::of_descriptor(name, source);
            if names.split(AND).take(number).any(|before| before == name) {
                return Err(TapError::Twice {
                    name: name.to_owned(),
                });
            }
            let number = name.strip_prefix(HANDED_IN).unwrap_or_default();
            let (file, of) = handed_in(number, queues).map_err(refused)?;
            if *interface.get_or_insert(of) != of {
                return Err(refused(io::Error::from_raw_os_error(libc::EINVAL)));
            }
            files.push(file);
        }
        if files.len() != usize::from(queues) {
            let names = names.to_owned();
            return Err(TapError::Count { names, queues });
        }
        Self::of(files).map_err(|source| TapError::of_descriptor(names, source))
    }

    /// Open descriptors of one tap become one that devices can use.
    fn of(files: Vec<File>) -> io::Result<Self> {
        let is_one_of_several = files.len() > 1;
        let queue = |file| TapQueue {
            file,
            is_one_of_several,
        };
        let queues: Vec<TapQueue> = files.into_iter().map(queue).collect();
        let mut has_uso = false;
        if let Some(first) = queues.first() {
            let header = i32::try_from(HEADER_BYTES).unwrap_or_default();
            // SAFETY: the kernel reads one int.
            checked(unsafe {
                libc::ioctl(first.file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header)
            })?;
            let all = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
            has_uso = first.offload(all).is_ok();
            first.offload(0)?;
        }
        Ok(Self { queues, has_uso })
    }

    /// Sockets whose datagrams are frames with their headers, one for each queue: no device of this kind can tell, so tests
    /// need no tap. They have to be some that do not wait.
    pub fn over(sockets: impl IntoIterator<Item = std::os::unix::net::UnixDatagram>) -> Self {
        let queue = |socket| TapQueue {
            file: File::from(std::os::fd::OwnedFd::from(socket)),
            is_one_of_several: false,
        };
        Self {
            queues: sockets.into_iter().map(queue).collect(),
            has_uso: true,
        }
    }

    /// Whether UDP segments can be left to the kernel.
    pub(super) fn has_uso(&self) -> bool {
        self.has_uso
    }

    /// Its queues, all of which are attached.
    pub(super) fn into_queues(self) -> Vec<TapQueue> {
        self.queues
    }
}

impl TapQueue {
    /// Lets the kernel give the guest what it has said that it takes: frames without checksums, and long ones. That holds for
    /// all queues of the tap.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn offload_for(&self, features: u64) -> io::Result<()> {
        let flags = [
            (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
            (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
            (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
        ];
        let has = |bit: u32| features & 1 << bit != 0;
        // Nothing is joined whose sum is not left out as well.
        let flags = flags.iter().filter(|_| has(VIRTIO_NET_F_GUEST_CSUM));
        self.offload(
            flags
                .filter(|(bit, _)| has(*bit))
                .fold(0, |all, (_, flag)| all | flag),
        )
    }

    fn offload(&self, flags: libc::c_uint) -> io::Result<()> {
        // SAFETY: the argument is a number.
        checked(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        })
    }

    /// Has the kernel give this queue frames, or none, which loses those that it has; either way once, in turn.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn attach(&self, wish: bool) -> io::Result<()> {
        if !self.is_one_of_several {
            return Ok(());
        }
        let flag = if wish {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        switch(&self.file, flag)
    }

    /// Reads one frame into `segments`, its header first; what does not fit is lost.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is none.
    pub(super) fn read(&self, segments: &[Segment]) -> io::Result<usize> {
        let (iovecs, count) = iovecs(segments);
        // SAFETY: whoever made the segments has promised that they stay mapped while they are lent.
        counted(unsafe { libc::readv(self.file.as_raw_fd(), iovecs, count) })
    }

    /// Sends one frame, its header first.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when the host takes none now; another when it does not take this one.
    pub(super) fn write(&self, segments: &[Segment]) -> io::Result<usize> {
        let (iovecs, count) = iovecs(segments);
        // SAFETY: as above; the kernel only reads them.
        counted(unsafe { libc::writev(self.file.as_raw_fd(), iovecs, count) })
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What a tap with so many queues is opened with.
fn flags_for(queues: u16) -> libc::c_int {
    if queues > 1 {
        FLAGS | libc::IFF_MULTI_QUEUE
    } else {
        FLAGS
    }
}

/// Attaches the queue of a descriptor to its tap, or detaches it.
fn switch(file: &File, flag: libc::c_int) -> io::Result<()> {
    let mut request = blank_request();
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).unwrap_or_default();
    // SAFETY: the kernel reads a `struct ifreq`, which `request` is.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
}

/// One queue of the tap of this name, of which so many are wanted.
fn opened(name: &str, queues: u16) -> Result<File, TapError> {
    let mut request = request(name)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
        .map_err(|source| TapError::NoDriver { source })?;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags_for(queues)).unwrap_or_default();
    // SAFETY: the kernel reads and writes a `struct ifreq`, which `request` is.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
        .map_err(|source| TapError::new(name, queues, source))?;
    Ok(file)
}

/// A copy of the descriptor of this number, which stays open for whoever needs it next, and what its tap is called.
fn handed_in(number: &str, queues: u16) -> io::Result<(File, [libc::c_char; libc::IFNAMSIZ])> {
    let refused = || io::Error::from_raw_os_error(libc::EBADF);
    let is_plain = |written: &RawFd| *written >= 0 && written.to_string() == number;
    let number: RawFd = number.parse().ok().filter(is_plain).ok_or_else(refused)?;
    // SAFETY: it is not -1, and is looked at for two calls only, which themselves find out whether it is open.
    let inherited = unsafe { BorrowedFd::borrow_raw(number) };
    // What this process has opened itself ends when it executes another.
    if rustix::io::fcntl_getfd(inherited)?.contains(rustix::io::FdFlags::CLOEXEC) {
        return Err(refused());
    }
    let file = File::from(inherited.try_clone_to_owned()?);
    let (flags, name) = flags_of(&file)?;
    let needed = flags_for(queues);
    if flags & needed != needed {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // Whoever had it last may have left it without its queue, which is the descriptor's and not the process's.
    if flags & libc::IFF_DETACH_QUEUE != 0 {
        switch(&file, libc::IFF_ATTACH_QUEUE)?;
    }
    let status = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, status | rustix::fs::OFlags::NONBLOCK)?;
    Ok((file, name))
}

/// The flags of a tap, and what it is called.
fn flags_of(file: &File) -> io::Result<(libc::c_int, [libc::c_char; libc::IFNAMSIZ])> {
    let mut request = blank_request();
    // SAFETY: the kernel writes a `struct ifreq`, which `request` is; or refuses, if it is no tap's.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    // SAFETY: the kernel has written the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    Ok((flags, request.ifr_name))
}

/// Segments are laid out as what the kernel takes; of more than that it takes none.
fn iovecs(segments: &[Segment]) -> (*const libc::iovec, libc::c_int) {
    (
        segments.as_ptr().cast(),
        libc::c_int::try_from(segments.len()).unwrap_or(libc::c_int::MAX),
    )
}

fn blank_request() -> libc::ifreq {
    // SAFETY: all of its fields are numbers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

fn request(name: &str) -> Result<libc::ifreq, TapError> {
    let mut request = blank_request();
    let is_name = !name.is_empty()
        && name.len() < request.ifr_name.len()
        && !name
            .bytes()
            .any(|byte| byte == 0 || byte == b'/' || byte == b'%' || byte.is_ascii_whitespace());
    if !is_name {
        return Err(TapError::Name {
            name: name.to_owned(),
        });
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn checked(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn counted(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Why a tap cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface can be called so.
    #[error("host_dev_name `{name}` is no name of a network interface: 1 to 15 bytes, no blanks, `/` or `%`")]
    Name {
        /// As configured.
        name: String,
    },
    /// A descriptor that is none, or not a tap's.
    #[error(
        "`{name}` is no descriptor of a tap: hand one in whose IFF_TAP, IFF_NO_PI and IFF_VNET_HDR are set (TUNSETIFF), and that \
         stays open when the monitor is executed"
    )]
    HandedIn {
        /// As configured.
        name: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// No taps here.
    #[error(
        "{TUN} cannot be opened: load the module `tun`, or have it in the jail, and let this user read and write it"
    )]
    NoDriver {
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Somebody else's, or none at all.
    #[error(
        "tap `{name}` cannot be opened: make one that this user owns, `ip tuntap add dev {name} mode tap user UID`, in the \
         network namespace of this process"
    )]
    NotAllowed {
        /// As configured.
        name: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// In use.
    #[error("tap `{name}` is in use by another process: give each machine its own")]
    Busy {
        /// As configured.
        name: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// One descriptor, twice.
    #[error(
        "`{name}` is named twice: hand in a descriptor of its own for each pair of queues (open /dev/net/tun for each)"
    )]
    Twice {
        /// As configured.
        name: String,
    },
    /// Not as many as there are pairs of queues.
    #[error(
        "`{names}` is not a descriptor for each of {queues} pairs of queues: hand in one of the tap for each, as in \
             `/dev/fd/7,/dev/fd/8`, and say `queue_pairs`"
    )]
    Count {
        /// As configured.
        names: String,
        /// How many pairs of queues there are.
        queues: u16,
    },
    /// Not one that suits.
    #[error("`{name}` is no tap that can be used: it has to be `mode tap`{}", with(*queues))]
    Other {
        /// As configured.
        name: String,
        /// With how many queues.
        queues: u16,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

impl TapError {
    fn of_descriptor(name: &str, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(libc::EBADF | libc::EBADFD | libc::ENOTTY | libc::EINVAL) => Self::HandedIn { name, source },
            _ => Self::Other {
                name,
                queues: 1,
                source,
            },
        }
    }

    fn new(name: &str, queues: u16, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotAllowed { name, source },
            Some(libc::EBUSY) => Self::Busy { name, source },
            _ => Self::Other { name, queues, source },
        }
    }
}

/// How a tap with so many queues is made.
fn with(queues: u16) -> &'static str {
    if queues > 1 {
        " and `multi_queue` (`ip tuntap add dev NAME mode tap multi_queue`), as `queue_pairs` is more than 1"
    } else {
        ", without `multi_queue` unless `queue_pairs` is more than 1"
    }
}
