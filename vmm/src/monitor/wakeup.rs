//! What wakes the `vmm` thread for work that it has begun: a bell, a timer for where nobody rings, and a
//! reminder.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_devices::virtio::device::Notice;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::event_loop::{EventLoop, Source};

/// How soon a guest that has not listened is told again.
const REMIND_AFTER: Duration = Duration::from_secs(1);

/// All of them.
pub(super) struct Wakeup {
    bell: Arc<EventFd>,
    timer: TimerFd,
    reminder: TimerFd,
}

impl Wakeup {
    /// Has `event_loop` watch for them from now on; it is dropped first.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub(super) fn new(event_loop: &mut EventLoop) -> io::Result<Self> {
        let wakeup = Self {
            bell: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            timer: TimerFd::new().map_err(errno)?,
            reminder: TimerFd::new().map_err(errno)?,
        };
        event_loop.watch(Source::Progress(wakeup.bell.as_raw_fd()));
        event_loop.watch(Source::Progress(wakeup.timer.as_raw_fd()));
        event_loop.watch(Source::Reminder(wakeup.reminder.as_raw_fd()));
        Ok(wakeup)
    }

    /// Where the bell is rung.
    pub(super) fn notice(&self) -> Notice {
        Notice::new(Arc::clone(&self.bell))
    }

    /// Wakes at the time `due`, or by the bell alone.
    pub(super) fn set_due(&mut self, due: Option<Instant>) {
        let armed = match due {
            // Zero would mean never.
            Some(due) => {
                let left = due.saturating_duration_since(Instant::now());
                self.timer.reset(left.max(Duration::from_micros(1)), None)
            }
            None => self.timer.clear(),
        };
        armed.expect("a timer takes every time from now on");
    }

    /// Wakes in a while, once, whatever else is due.
    pub(super) fn remind(&mut self) {
        let armed = self.reminder.reset(REMIND_AFTER, None);
        armed.expect("a timer takes every time from now on");
    }

    /// Quiets the reminder.
    pub(super) fn reminded(&mut self) {
        self.reminder.clear().expect("a timer can always be stopped");
    }

    /// Quiets bell and timer; whoever is woken looks at everything.
    pub(super) fn quiet(&mut self) {
        // Each fails only when it is quiet already.
        let _ = self.bell.read();
        self.timer.clear().expect("a timer can always be stopped");
    }
}

/// The other error of the crates that make descriptors.
pub(super) fn errno(error: vmm_sys_util::errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
