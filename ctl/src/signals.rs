//! The signals that ask `coraclectl run` to end, as a descriptor that can be polled.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::process::Signal;
use thiserror::Error;
use vmm_sys_util::signal::register_signal_handler;

use crate::deadline::{Deadline, wait_ready};

/// What a terminal, a shell and a CI runner send to end a program.
const WATCHED: [Signal; 4] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT];

/// Rung by the handler; the only descriptor that it may touch.
static BELL: OnceLock<OwnedFd> = OnceLock::new();
/// The latest signal that nobody has taken yet, or 0.
static LATEST: AtomicI32 = AtomicI32::new(0);

/// Why signals cannot be watched.
#[derive(Debug, Error)]
#[error("cannot watch for signals")]
pub(crate) struct SignalsError(#[source] io::Error);

/// Proof that the signals are watched.
#[derive(Debug)]
pub(crate) struct Signals {
    bell: &'static OwnedFd,
}

impl Signals {
    /// Watches the signals from now until the process ends; a program that is executed gets them back
    /// as they were. A signal that the caller has set to be ignored, as `nohup` does, stays ignored.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub(crate) fn watch() -> Result<Self, SignalsError> {
        if BELL.get().is_none() {
            let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
            // Where another thread was faster, its bell is as good.
            let _ = BELL.set(bell.map_err(|errno| SignalsError(errno.into()))?);
        }
        let bell = BELL.get().expect("the bell was set above");
        let status = fs::read_to_string("/proc/self/status").map_err(SignalsError)?;
        let ignored = ignored_mask(&status);
        for signal in WATCHED {
            let number = signal.as_raw();
            if ignored >> (number - 1) & 1 == 0 {
                register_signal_handler(number, note)
                    .map_err(|error| SignalsError(io::Error::from_raw_os_error(error.errno())))?;
            }
        }
        Ok(Self { bell })
    }

    /// Whether a signal waits to be taken.
    ///
    /// # Errors
    ///
    /// What `poll` reports.
    pub(crate) fn is_ringing(&self) -> io::Result<bool> {
        let now = Deadline::after(Duration::ZERO);
        wait_ready(&mut [PollFd::new(self, PollFlags::IN)], Some(now))
    }

    /// Takes the latest signal that has arrived, if any.
    pub(crate) fn take(&self) -> Option<i32> {
        // Emptied first: a signal between the two lines rings again. An empty bell is no error.
        let _ = rustix::io::read(self.bell, &mut [0; 8]);
        Some(LATEST.swap(0, Ordering::AcqRel)).filter(|signal| *signal != 0)
    }
}

/// What a program ends with that a signal has ended.
pub(crate) fn status_of(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

impl AsFd for Signals {
    /// Readable while a signal waits to be taken.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// The handler: an atomic store and one system call, both allowed in a handler (signal-safety(7)).
extern "C" fn note(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    LATEST.store(signal, Ordering::Release);
    if let Some(bell) = BELL.get() {
        // A bell that cannot take one more ring is ringing.
        let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
    }
}

/// `SigIgn` of proc_pid_status(5): bit n is signal n + 1.
fn ignored_mask(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use rustix::process::{getpid, kill_process};

    use super::*;

    #[test]
    fn a_signal_rings_once_and_is_taken_once() {
        let signals = Signals::watch().unwrap();
        kill_process(getpid(), Signal::HUP).unwrap();
        let limit = Deadline::after(Duration::from_secs(5));
        assert!(wait_ready(&mut [PollFd::new(&signals, PollFlags::IN)], Some(limit)).unwrap());
        assert_eq!(signals.take(), Some(Signal::HUP.as_raw()));
        assert_eq!(signals.take(), None);
    }

    #[test]
    fn what_the_caller_ignores_is_known() {
        assert_eq!(ignored_mask("Name:\tx\nSigIgn:\t0000000000001001\n"), 0x1001);
        assert_eq!(ignored_mask(""), 0);
    }
}
