//! The control queue (5.1.6.5), of which announcements and the number of pairs of queues are offered, and what the driver
//! changes by it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
};

use super::pairs::Pairs;
use super::worker::Next;
use crate::complaints::Complaints;
use crate::virtio::device::ActiveQueue;
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;

/// Commands answered before the frames have their turn: one, as the kernel takes its time to attach and detach queues.
const BATCH_COMMANDS_MAX: usize = 1;

/// What the guest reads as the status of its link, and takes note of by the control queue, and how many pairs of queues it
/// uses.
#[derive(Debug)]
pub(super) struct Link {
    announces: AtomicBool,
    /// The driver has not been told.
    is_news: AtomicBool,
    pairs: AtomicUsize,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            announces: AtomicBool::default(),
            is_news: AtomicBool::default(),
            pairs: AtomicUsize::new(1),
        }
    }
}

impl Link {
    /// How many pairs of queues the driver uses: the first ones.
    pub(super) fn pairs(&self) -> usize {
        self.pairs.load(Ordering::SeqCst)
    }

    /// The same from now on. While the device serves, [`Pairs::set_used`] does it.
    pub(super) fn set_pairs(&self, pairs: usize) {
        self.pairs.store(pairs, Ordering::SeqCst);
    }

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
}

/// Answers commands.
#[derive(Debug, Default)]
pub(super) struct Commands {
    chain: Chain,
}

/// What commands are about.
pub(super) struct Subject<'a> {
    pub(super) link: &'a Link,
    pub(super) pairs: &'a Pairs,
    /// How many pairs the driver may use: it has not accepted VIRTIO_NET_F_MQ where that is one.
    pub(super) pairs_max: usize,
    pub(super) complaints: &'a mut Complaints,
}

impl Commands {
    /// Answers some commands.
    pub(super) fn turn(
        &mut self,
        queue: &mut ActiveQueue,
        subject: &mut Subject<'_>,
    ) -> Result<Next, PopError> {
        for _ in 0..BATCH_COMMANDS_MAX {
            match queue.ring.pop(&mut self.chain) {
                Ok(false) => return Ok(Next::Kick),
                Ok(true) => {
                    let answer = u8::try_from(subject.answer(&self.chain)).unwrap_or(1);
                    // The answer is one byte, wherever the guest wants it.
                    let written = segments::scatter(&self.chain.writable, 0, &[answer]);
                    queue
                        .ring
                        .push(self.chain.head, u32::try_from(written).unwrap_or_default());
                }
                Err(PopError::Malformed { head, .. }) => queue.ring.push(head, 0),
                Err(broken) => return Err(broken),
            }
        }
        Ok(Next::More)
    }
}

impl Subject<'_> {
    fn answer(&mut self, chain: &Chain) -> u32 {
        let mut command = [0; 4];
        let length = segments::gather(&chain.readable, 0, &mut command);
        let [class, word, low, high] = command;
        match (u32::from(class), u32::from(word)) {
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) if length >= 2 => {
                self.link.set_announces(false);
                VIRTIO_NET_OK
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if length >= 4 && self.pairs_max > 1 => {
                let pairs = usize::from(u16::from_le_bytes([low, high]));
                if (1..=self.pairs_max).contains(&pairs) {
                    self.use_pairs(pairs)
                } else {
                    VIRTIO_NET_ERR
                }
            }
            _ => VIRTIO_NET_ERR,
        }
    }

    fn use_pairs(&mut self, pairs: usize) -> u32 {
        match self.pairs.set_used(pairs) {
            Ok(()) => VIRTIO_NET_OK,
            Err(error) => {
                self.complaints.complain(format_args!(
                    "the guest cannot use {pairs} pairs of queues, as the tap does not: {error}"
                ));
                VIRTIO_NET_ERR
            }
        }
    }
}
