//! The control queue (5.1.6.5), of which only announcements are offered, and the part of the configuration space that changes.

use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_OK,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::worker::Next;
use crate::virtio::device::ActiveQueue;
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;

/// Commands answered before the frames have their turn.
const BATCH_COMMANDS_MAX: usize = 8;

/// What the guest reads as the status of its link, and takes note of by the control queue.
#[derive(Debug, Default)]
pub(super) struct Link {
    announces: AtomicBool,
    /// The driver has not been told.
    is_news: AtomicBool,
}

impl Link {
    /// Asks the driver to tell the network where its guest is now.
    pub(super) fn announce(&self) {
        self.set_announces(true);
        self.is_news.store(true, Ordering::SeqCst);
    }

    /// Whether it is asked; it has been told of that, or will be.
    pub(super) fn set_announces(&self, wish: bool) {
        self.announces.store(wish, Ordering::SeqCst);
    }

    /// Whether the driver has to be told of [`Self::announce`], once.
    pub(super) fn is_news(&self) -> bool {
        self.is_news.swap(false, Ordering::SeqCst)
    }

    /// Whether the driver has been asked, and has not answered.
    pub(super) fn announces(&self) -> bool {
        self.announces.load(Ordering::SeqCst)
    }

    /// The field `status` (5.1.4).
    pub(super) fn status(&self) -> u16 {
        let announce = if self.announces() {
            VIRTIO_NET_S_ANNOUNCE
        } else {
            0
        };
        u16::try_from(VIRTIO_NET_S_LINK_UP | announce).unwrap_or_default()
    }

    /// Answers some commands.
    pub(super) fn turn(&self, queue: &mut ActiveQueue, chain: &mut Chain) -> Result<Next, PopError> {
        for _ in 0..BATCH_COMMANDS_MAX {
            match queue.ring.pop(chain) {
                Ok(false) => return Ok(Next::Kick),
                Ok(true) => {
                    let answer = u8::try_from(self.answer(chain)).unwrap_or(1);
                    // The answer is one byte, wherever the guest wants it.
                    let written = segments::scatter(&chain.writable, 0, &[answer]);
                    queue
                        .ring
                        .push(chain.head, u32::try_from(written).unwrap_or_default());
                }
                Err(PopError::Malformed { head, .. }) => queue.ring.push(head, 0),
                Err(broken) => return Err(broken),
            }
        }
        Ok(Next::More)
    }

    fn answer(&self, chain: &Chain) -> u32 {
        let mut command = [0; 2];
        let length = segments::gather(&chain.readable, 0, &mut command);
        let [class, word] = command.map(u32::from);
        if length == 2 && (class, word) == (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) {
            self.set_announces(false);
            VIRTIO_NET_OK
        } else {
            VIRTIO_NET_ERR
        }
    }
}
