//! How a pager is told what to do: a queue, and a bell that wakes it where it waits.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What a pager is told to do.
#[derive(Debug)]
pub(super) enum Order {
    /// Bring these chunks in before others, and tell when they are there; never if one is lost.
    Bring { chunks: Vec<usize>, brought: Sender<()> },
    /// Leave.
    Stop,
}

/// The end that tells.
#[derive(Debug)]
pub(super) struct Orders {
    queue: Sender<Order>,
    bell: Arc<EventFd>,
}

/// The end that is told.
#[derive(Debug)]
pub(super) struct OrderInbox {
    queue: Receiver<Order>,
    bell: Arc<EventFd>,
}

/// Both ends.
pub(super) fn orders() -> io::Result<(Orders, OrderInbox)> {
    let (sender, receiver) = channel();
    let bell = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let inbox = OrderInbox {
        queue: receiver,
        bell: Arc::clone(&bell),
    };
    Ok((Orders { queue: sender, bell }, inbox))
}

impl Orders {
    /// Whether there is still somebody who is told.
    pub(super) fn tell(&self, order: Order) -> bool {
        let told = self.queue.send(order).is_ok();
        // A counter that is at its end has rung as well.
        let _ = self.bell.write(1);
        told
    }
}

impl OrderInbox {
    /// What was told meanwhile.
    pub(super) fn take(&self) -> impl Iterator<Item = Order> {
        // First: whoever tells something after this rings again.
        let _ = self.bell.read();
        self.queue.try_iter()
    }
}

impl AsRawFd for OrderInbox {
    /// Readable when there are orders.
    fn as_raw_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}
