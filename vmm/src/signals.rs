//! The signals that stop a monitor, as a descriptor that the event loop waits on.
#![expect(unsafe_code, reason = "signalfd and the signal mask have no safe wrapper")]

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use vmm_sys_util::signal::create_sigset;

/// A signal that asks the process to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGINT, of a user at the terminal.
    Interrupt,
    /// SIGTERM, of whoever manages the process.
    Terminate,
    /// SIGHUP, of a terminal that goes away.
    HangUp,
}

impl StopSignal {
    const ALL: [Self; 3] = [Self::Interrupt, Self::Terminate, Self::HangUp];

    /// The status by which a shell tells of a process that died of this signal: 128 and its number.
    pub fn exit_status(self) -> u8 {
        u8::try_from(128 + self.number()).expect("these three have numbers below 16")
    }

    fn number(self) -> libc::c_int {
        match self {
            Self::Interrupt => libc::SIGINT,
            Self::Terminate => libc::SIGTERM,
            Self::HangUp => libc::SIGHUP,
        }
    }
}

impl fmt::Display for StopSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
            Self::HangUp => "SIGHUP",
        })
    }
}

/// The stopping signals, blocked in every thread and read here.
#[derive(Debug)]
pub struct StopSignals(OwnedFd);

impl StopSignals {
    /// Blocks the stopping signals in this thread and in those that it will start, and reads them from here on.
    /// A hang-up stops the process unless it was started to survive one (`nohup`).
    ///
    /// Call it before the first thread is started.
    ///
    /// # Errors
    ///
    /// When the host refuses the mask or the descriptor.
    pub fn take_over() -> io::Result<Self> {
        ignore(libc::SIGXFSZ)?;
        let mut stopping = Vec::new();
        for signal in StopSignal::ALL {
            // Whoever starts a process that shall outlive its terminal (nohup) ignores SIGHUP for it.
            if signal != StopSignal::HangUp || !is_ignored(libc::SIGHUP)? {
                stopping.push(signal.number());
            }
        }
        let set = create_sigset(&stopping).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        change_mask(libc::SIG_BLOCK, &set)?;
        // SAFETY: the set is initialised; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// A signal that has arrived, if one has.
    pub fn arrived(&self) -> Option<StopSignal> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is as large as the kernel is told.
        let read = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(read) != Ok(size) {
            return None;
        }
        // SAFETY: the kernel has written the whole structure.
        let info = unsafe { info.assume_init() };
        StopSignal::ALL
            .into_iter()
            .find(|signal| libc::c_int::try_from(info.ssi_signo) == Ok(signal.number()))
    }
}

impl AsRawFd for StopSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Lets `signal` interrupt this thread and those that it will start, whatever mask was inherited from
/// the parent process.
pub(crate) fn let_through(signal: libc::c_int) -> io::Result<()> {
    let set = create_sigset(&[signal]).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    change_mask(libc::SIG_UNBLOCK, &set)
}

fn change_mask(how: libc::c_int, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set is initialised, and the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(how, &raw const *set, ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn is_ignored(signal: libc::c_int) -> io::Result<bool> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: no new action is given, and the buffer is of the type that the kernel fills.
    if unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the structure is filled.
    Ok(unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN)
}

/// A file-size limit must reach the guest as a failed write (EFBIG), not end the process.
fn ignore(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: SIG_IGN is a valid disposition for this signal, and no handler of ours was there.
    let previous = unsafe { libc::signal(signal, libc::SIG_IGN) };
    if previous == libc::SIG_ERR {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
