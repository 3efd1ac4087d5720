//! Signals that a parent waits for, instead of being interrupted by them.

#![expect(unsafe_code, reason = "masks and waits for signals have no safe form")]

use std::io;
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use rustix::process::Signal;

/// What is passed on to the monitor.
const PASSED_ON: [Signal; 6] = [
    Signal::TERM,
    Signal::INT,
    Signal::HUP,
    Signal::QUIT,
    Signal::USR1,
    Signal::USR2,
];

/// A signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    /// Which.
    pub(crate) signal: Signal,
    /// Whether the kernel sent it to all processes of the terminal, the monitor among them.
    pub(crate) is_everybodys: bool,
}

/// The signals that this process waits for.
#[derive(Clone, Copy)]
pub(crate) struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks what is passed on and the news of children, for this process and those that it makes. What whoever started
    /// the jailer ignores stays ignored.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn take_over() -> io::Result<Self> {
        // SAFETY: the default is a disposition without a handler.
        if unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        let mut set = MaybeUninit::uninit();
        // SAFETY: it fills the set in.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: it was filled in.
        let mut set = unsafe { set.assume_init() };
        for signal in PASSED_ON
            .into_iter()
            .filter(|signal| !is_ignored(*signal))
            .chain([Signal::CHILD])
        {
            // SAFETY: a set and the number of a signal.
            unsafe { libc::sigaddset(&raw mut set, signal.as_raw()) };
        }
        // SAFETY: a set that is filled in; the old one is not asked for.
        if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(set))
    }

    /// The next one of them, or `None` when the time is over.
    pub(crate) fn next(&self, limit: Option<Duration>) -> Option<Received> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
            let number = match deadline {
                // SAFETY: both point to what they are said to.
                None => unsafe { libc::sigwaitinfo(&raw const self.0, info.as_mut_ptr()) },
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let left = libc::timespec {
                        tv_sec: left.as_secs().cast_signed(),
                        tv_nsec: left.subsec_nanos().into(),
                    };
                    // SAFETY: all three point to what they are said to.
                    unsafe { libc::sigtimedwait(&raw const self.0, info.as_mut_ptr(), &raw const left) }
                }
            };
            // SAFETY: zeros are a valid value, and what the kernel writes is one.
            let info = unsafe { info.assume_init() };
            if let Some(signal) = Signal::from_named_raw(number) {
                return Some(Received {
                    signal,
                    is_everybodys: info.si_code == libc::SI_KERNEL,
                });
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return None;
            }
        }
    }
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signals")
    }
}

fn is_ignored(signal: Signal) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is changed, and there is room for the answer.
    let asked = unsafe { libc::sigaction(signal.as_raw(), std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: zeros are a valid value, and so is what the kernel writes.
    let action = unsafe { action.assume_init() };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}
