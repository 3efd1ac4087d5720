//! A point in time by which a wait has to end.

use std::io;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;

/// A point in time by which a wait has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    /// The deadline that lies `wait` from now.
    pub(crate) fn after(wait: Duration) -> Self {
        Self(Instant::now() + wait)
    }

    /// What is left; zero once the deadline has passed.
    pub(crate) fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether nothing is left.
    pub(crate) fn passed(self) -> bool {
        self.remaining().is_zero()
    }
}

/// Waits until one of `descriptors` is ready; false when the deadline came first.
///
/// A signal does not end the wait: the signals that matter ring a descriptor of their own.
///
/// # Errors
///
/// What `poll` reports, which is never `EINTR`.
pub(crate) fn wait_ready(descriptors: &mut [PollFd<'_>], deadline: Option<Deadline>) -> io::Result<bool> {
    loop {
        let timeout = deadline.map(|deadline| timespec(deadline.remaining()));
        match poll(descriptors, timeout.as_ref()) {
            Ok(0) if deadline.is_some_and(Deadline::passed) => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn timespec(wait: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(wait.subsec_nanos()),
    }
}
