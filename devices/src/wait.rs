//! Waiting for eventfds, for threads that have no reactor.
#![expect(unsafe_code, reason = "borrows the descriptors of eventfds")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

/// Waits until one of `eventfds` is written or `timeout` has passed, and empties those that were
/// written. May also return for no reason; a caller looks at what it waits for.
pub(crate) fn wait(eventfds: &[&EventFd], timeout: Option<Duration>) {
    wait_also(eventfds, None, timeout);
}

/// The same, or until what one of `others` waits for has come; returns what has come of each of them.
pub(crate) fn wait_also<'a>(
    eventfds: &[&'a EventFd],
    others: impl IntoIterator<Item = PollFd<'a>>,
    timeout: Option<Duration>,
) -> Vec<PollFlags> {
    let mut descriptors: Vec<PollFd<'_>> = eventfds
        .iter()
        .map(|eventfd| PollFd::from_borrowed_fd(borrow(eventfd), PollFlags::IN))
        .chain(others)
        .collect();
    // A time beyond what the kernel takes is as good as none.
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    if let Err(error) = poll(&mut descriptors, timeout.as_ref()) {
        // Signals end a wait; nothing else can with descriptors that are open.
        debug_assert_eq!(error, rustix::io::Errno::INTR);
        return Vec::new();
    }
    for (eventfd, descriptor) in eventfds.iter().zip(&descriptors) {
        if descriptor.revents().contains(PollFlags::IN) {
            // Somebody else may have emptied it meanwhile, which is as well.
            let _ = eventfd.read();
        }
    }
    let others = descriptors.iter().skip(eventfds.len());
    others.map(PollFd::revents).collect()
}

/// The descriptor of an eventfd, which does not give it out by itself.
pub(crate) fn borrow(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open while the eventfd is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}
