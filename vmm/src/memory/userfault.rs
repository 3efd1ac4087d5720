//! Memory whose absent pages somebody has to fill: userfaultfd(2), for pages that are missing.
//!
//! ```text
//!   guard ──► a thread, a vCPU or the kernel touches an absent page: it waits, `faults` tells the address
//!                └── fill, zero: the page is there, and whoever waits for it goes on
//! ```
//!
//! A page that is there is never changed by any of this, so that nobody who has seen it can tell.
#![expect(unsafe_code, reason = "userfaultfd has no safe wrapper")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::snapshot::memory::PAGE_BYTES;

/// A userfaultfd. While it is open, an absent page of guarded memory is one that somebody waits for; afterwards it is zeros.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

/// A range of addresses of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct HostRange {
    /// Its first byte, at the start of a page.
    pub start: u64,
    /// A multiple of the page size.
    pub len_bytes: u64,
}

impl HostRange {
    /// The page that has `address`.
    pub fn page_at(address: u64) -> Self {
        let len_bytes = PAGE_BYTES as u64;
        Self {
            start: address / len_bytes * len_bytes,
            len_bytes,
        }
    }
}

/// Why the host does not tell of absent pages.
#[derive(Debug, thiserror::Error)]
#[error("userfaultfd is not to be had: {call}")]
pub struct UserfaultError {
    /// What was asked of the kernel.
    pub(super) call: &'static str,
    /// Its answer.
    #[source]
    pub(super) source: io::Error,
}

impl UserfaultError {
    /// Whether it is for want of a permission, which the host can give.
    pub fn is_refusal(&self) -> bool {
        self.source.kind() == io::ErrorKind::PermissionDenied
    }
}

/// How many faults are taken from the kernel in one call.
const FAULTS_PER_READ: usize = 32;
/// `struct uffd_msg`.
const MESSAGE_BYTES: usize = 32;

impl Userfault {
    /// One that also tells of faults of the kernel, which it takes for KVM and for I/O.
    ///
    /// # Errors
    ///
    /// When the kernel has none, or not for this process.
    pub fn new() -> Result<Self, UserfaultError> {
        Self::with_features(0)
    }

    /// One that also tells of pages that are given back to the host: who gives them back waits until that was read.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn telling_of_removal() -> Result<Self, UserfaultError> {
        Self::with_features(UFFD_FEATURE_EVENT_REMOVE)
    }

    fn with_features(features: u64) -> Result<Self, UserfaultError> {
        let fd = open().map_err(|errno| UserfaultError {
            call: "userfaultfd(2)",
            source: errno.into(),
        })?;
        let userfault = Self { fd: in_between(fd) };
        let mut handshake = Api {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        userfault
            .order(UFFDIO_API, &mut handshake)
            .map_err(|source| UserfaultError {
                call: "UFFDIO_API",
                source,
            })?;
        Ok(userfault)
    }

    /// From now on whoever touches an absent page of `range` waits until it is filled.
    ///
    /// # Errors
    ///
    /// When the kernel does not guard such memory.
    pub fn guard(&self, range: HostRange) -> Result<(), UserfaultError> {
        let mut order = Register {
            range,
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        let guarded = self.order(UFFDIO_REGISTER, &mut order).and_then(|()| {
            if order.ioctls & FILLING_IOCTLS == FILLING_IOCTLS {
                Ok(())
            } else {
                Err(io::ErrorKind::Unsupported.into())
            }
        });
        guarded.map_err(|source| UserfaultError {
            call: "UFFDIO_REGISTER",
            source,
        })
    }

    /// Guards `range` no more: its absent pages are zeros, and whoever waits for one goes on.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn release(&self, mut range: HostRange) -> io::Result<()> {
        self.order(UFFDIO_UNREGISTER, &mut range)
    }

    /// Puts `bytes`, whole pages, where pages of guarded memory are absent, from `address` on. Pages that are there stay.
    ///
    /// # Errors
    ///
    /// What the kernel answers: that memory is not guarded, or the host has no page left.
    pub fn fill(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let whole = HostRange {
            start: address,
            len_bytes: bytes.len() as u64,
        };
        self.page_by_page(whole, |rest| {
            let from = bytes
                .get(bytes.len() - index(rest.len_bytes)..)
                .unwrap_or_default();
            let mut order = CopyOrder {
                to: rest.start,
                from: from.as_ptr() as u64,
                len_bytes: rest.len_bytes,
                mode: 0,
                done: 0,
            };
            let outcome = self.order(UFFDIO_COPY, &mut order);
            (outcome, order.done)
        })
    }

    /// The same with zeros, which need no memory of the host's until they are written.
    ///
    /// # Errors
    ///
    /// As [`Self::fill`].
    pub fn zero(&self, range: HostRange) -> io::Result<()> {
        self.page_by_page(range, |rest| {
            let mut order = ZeroPage {
                range: rest,
                mode: 0,
                done: 0,
            };
            let outcome = self.order(UFFDIO_ZEROPAGE, &mut order);
            (outcome, order.done)
        })
    }

    /// Lets whoever waits for a page of `range` look again.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn wake(&self, mut range: HostRange) -> io::Result<()> {
        self.order(UFFDIO_WAKE, &mut range)
    }

    /// Appends the addresses that somebody waits for, as far as they were not told yet; never waits itself.
    ///
    /// # Errors
    ///
    /// When the descriptor cannot be read.
    pub fn faults(&self, addresses: &mut Vec<u64>) -> io::Result<()> {
        loop {
            let mut messages = [0; MESSAGE_BYTES * FAULTS_PER_READ];
            let read_bytes = match rustix::io::read(&self.fd, &mut messages) {
                Ok(read_bytes) => read_bytes,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let messages = messages.get(..read_bytes).unwrap_or_default();
            addresses.extend(messages.as_chunks().0.iter().filter_map(fault_address));
            if read_bytes < MESSAGE_BYTES * FAULTS_PER_READ {
                return Ok(());
            }
        }
    }

    /// Goes through `range` with an order that fills pages from the start of what is left, and says how it ended and how many
    /// bytes were done; steps over pages that are there.
    fn page_by_page(
        &self,
        range: HostRange,
        mut fill: impl FnMut(HostRange) -> (io::Result<()>, i64),
    ) -> io::Result<()> {
        let mut rest = range;
        let mut stepped_over = false;
        while rest.len_bytes > 0 {
            let (outcome, done) = fill(rest);
            let done_bytes = match outcome {
                Ok(()) => rest.len_bytes,
                Err(error) => match (u64::try_from(done), error.raw_os_error()) {
                    (Ok(done_bytes @ 1..), _) => done_bytes,
                    (_, Some(libc::EEXIST)) => {
                        stepped_over = true;
                        PAGE_BYTES as u64
                    }
                    // Mappings are changing just now.
                    (_, Some(libc::EAGAIN)) => 0,
                    _ => return Err(error),
                },
            };
            rest.start += done_bytes;
            rest.len_bytes = rest.len_bytes.saturating_sub(done_bytes);
        }
        if stepped_over {
            // Who waits for a page that was there before is woken by nobody else.
            self.wake(range)?;
        }
        Ok(())
    }

    fn order<T>(&self, request: Opcode, order: &mut T) -> io::Result<()> {
        // SAFETY: each request comes with the structure that it is declared with, and what that points to is borrowed for the
        // time of the call. The kernel writes to absent pages of guarded memory only, which nobody has seen.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request.into(), &raw mut *order) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One that another process has made.
#[cfg(test)]
impl From<OwnedFd> for Userfault {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsRawFd for Userfault {
    /// Readable when there are faults.
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The first number for these descriptors: between those that keep a machine there, which has to be until this is
/// closed (`kvm::vm`).
const FD_MIN: libc::c_int = 256;

/// The same by a number that is neither low nor one of the highest, if there is one.
fn in_between(fd: OwnedFd) -> OwnedFd {
    // SAFETY: this makes a descriptor, and touches no memory.
    let moved = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, FD_MIN) };
    if moved < 0 {
        return fd;
    }
    // SAFETY: a descriptor that was made just now is nobody else's.
    unsafe { OwnedFd::from_raw_fd(moved) }
}

/// By the system call, or where that is for the privileged only, by the device that the host can give to others.
fn open() -> rustix::io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: what the descriptor can do to memory is in the hands of this module, see above.
    match unsafe { userfaultfd(flags) } {
        Err(Errno::PERM) => open_by_device(flags).ok_or(Errno::PERM),
        opened => opened,
    }
}

fn open_by_device(flags: UserfaultfdFlags) -> Option<OwnedFd> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_CLOEXEC);
    let device = options.open("/dev/userfaultfd").ok()?;
    // SAFETY: this request takes flags in place of an address, and makes a descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW.into(), flags.bits()) };
    // SAFETY: a descriptor that was made just now is nobody else's.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The address in a message about a page fault: no other event is asked for by whoever reads them here.
fn fault_address(message: &[u8; MESSAGE_BYTES]) -> Option<u64> {
    let (event, rest) = message.split_first()?;
    // After the event come seven bytes that are reserved, and eight of flags.
    let address = rest.get(15..)?.first_chunk()?;
    (*event == UFFD_EVENT_PAGEFAULT).then(|| u64::from_ne_bytes(*address))
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}

// As in <linux/userfaultfd.h>; `HostRange` is its `struct uffdio_range`.

const UFFD_API: u64 = 0xaa;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
/// Bits of UFFDIO_COPY and UFFDIO_ZEROPAGE.
const FILLING_IOCTLS: u64 = 1 << 3 | 1 << 4;

const USERFAULTFD_IOC_NEW: Opcode = opcode::none(0xaa, 0x00);
const UFFDIO_API: Opcode = opcode::read_write::<Api>(0xaa, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(0xaa, 0x00);
const UFFDIO_UNREGISTER: Opcode = opcode::read::<HostRange>(0xaa, 0x01);
const UFFDIO_WAKE: Opcode = opcode::read::<HostRange>(0xaa, 0x02);
const UFFDIO_COPY: Opcode = opcode::read_write::<CopyOrder>(0xaa, 0x03);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<ZeroPage>(0xaa, 0x04);

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    range: HostRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyOrder {
    to: u64,
    from: u64,
    len_bytes: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct ZeroPage {
    range: HostRange,
    mode: u64,
    done: i64,
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::memory::testing::{touch, waits};
    use crate::memory::{Backing, PageSize, allocate, slots};

    const PAGE: u64 = PAGE_BYTES as u64;
    const LIMIT: Duration = Duration::from_secs(5);

    fn guarded() -> (Userfault, Arc<GuestMemoryMmap>, u64) {
        let memory = allocate(1, Backing::Anonymous, PageSize::Base).unwrap();
        let slot = slots(&memory).next().unwrap();
        let userfault = Userfault::new().unwrap();
        let range = HostRange {
            start: slot.host_address,
            len_bytes: slot.size_bytes,
        };
        userfault.guard(range).unwrap();
        (userfault, memory, slot.host_address)
    }

    #[test]
    fn who_touches_an_absent_page_is_told_of_and_waits() {
        let (userfault, memory, start) = guarded();
        let mut faults = Vec::new();
        userfault.faults(&mut faults).unwrap();
        assert!(faults.is_empty(), "{faults:?}");
        let touched = touch(&memory, 3 * PAGE_BYTES + 17);
        assert!(waits(&touched));
        userfault.faults(&mut faults).unwrap();
        assert_eq!(faults, [start + 3 * PAGE]);
        userfault.fill(start + 3 * PAGE, &[9; PAGE_BYTES]).unwrap();
        assert_eq!(touched.recv_timeout(LIMIT), Ok(9));
        faults.clear();
        userfault.faults(&mut faults).unwrap();
        assert!(faults.is_empty(), "a fault is told once");
    }

    #[test]
    fn pages_that_are_there_stay_and_those_around_them_are_filled() {
        let (userfault, memory, start) = guarded();
        for page in [0, 2, 3, 6] {
            userfault.fill(start + page * PAGE, &[1; PAGE_BYTES]).unwrap();
        }
        memory.write_obj(5_u8, GuestAddress(2 * PAGE)).unwrap();
        let touched = touch(&memory, 4 * PAGE_BYTES);
        userfault.fill(start, &[2; 8 * PAGE_BYTES]).unwrap();
        assert_eq!(touched.recv_timeout(LIMIT), Ok(2));
        let found = |page| memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(found), [1, 2, 5, 1, 2, 2, 1, 2]);
        // And likewise with zeros.
        userfault
            .zero(HostRange {
                start: start + 6 * PAGE,
                len_bytes: 4 * PAGE,
            })
            .unwrap();
        assert_eq!([6, 7, 8, 9].map(found), [1, 2, 0, 0]);
    }

    #[test]
    fn memory_that_is_released_is_like_any_other() {
        let (userfault, memory, start) = guarded();
        let touched = touch(&memory, 0);
        assert!(waits(&touched));
        userfault
            .release(HostRange {
                start,
                len_bytes: 1 << 20,
            })
            .unwrap();
        assert_eq!(touched.recv_timeout(LIMIT), Ok(0));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(77 * PAGE)).unwrap(), 0);
    }

    #[test]
    fn memory_that_is_not_guarded_is_not_touched() {
        let (userfault, _memory, _) = guarded();
        let other = allocate(1, Backing::Anonymous, PageSize::Base).unwrap();
        let start = slots(&other).next().unwrap().host_address;
        let refused = userfault.fill(start, &[1; PAGE_BYTES]).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOENT));
        assert_eq!(other.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    }
}
