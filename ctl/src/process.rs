//! A process that is held by a pidfd: signals and waits cannot hit another one that got its number.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::deadline::{Deadline, wait_ready};

/// A process, alive or not yet reaped.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    /// The process that has the number `pid` now.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        Ok(Self {
            pid,
            pidfd: pidfd_open(pid, PidfdFlags::empty())?,
        })
    }

    /// Its number.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits until the process has ended; false when the deadline came first.
    ///
    /// # Errors
    ///
    /// What `poll` reports.
    pub(crate) fn wait(&self, deadline: Deadline) -> io::Result<bool> {
        wait_ready(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(deadline))
    }

    /// Sends `signal`; a process that has ended meanwhile is no error.
    ///
    /// # Errors
    ///
    /// When this user may not signal the process.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Process {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// How long the process `pid` has been running; `None` when it has ended.
pub(crate) fn uptime(pid: Pid) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let since_boot_s: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let started_s = started_ticks(&stat)? / ticks_per_second();
    Duration::try_from_secs_f64((since_boot_s - started_s).max(0.0)).ok()
}

/// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)); the second one is a name that may hold anything.
fn started_ticks(stat: &str) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

fn ticks_per_second() -> f64 {
    let ticks = u32::try_from(rustix::param::clock_ticks_per_second());
    f64::from(ticks.expect("the kernel's tick rate is a small number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_brackets_does_not_shift_the_fields() {
        let fields: Vec<String> = (3..=52).map(|number| number.to_string()).collect();
        let stat = format!("7 (a) b (c) {}", fields.join(" "));
        assert_eq!(started_ticks(&stat), Some(22.0));
        assert_eq!(started_ticks("7 (cut"), None);
    }

    #[test]
    fn this_process_has_run_for_less_than_the_machine() {
        let pid = rustix::process::getpid();
        let uptime = uptime(pid).expect("this process runs");
        assert!(uptime < Duration::from_hours(1), "{uptime:?}");
    }
}
