//! One queue of a simulated guest: it keeps the rules of the ring, and no more than them.

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::oracle::Ticket;
use coracle_storage::sim::reactor::Moment;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::wish::Wish;
use crate::virtio::device::ActiveQueue;
use crate::virtio::ring::{FEATURE_EVENT_IDX, Virtqueue};
use crate::virtio::testing::{DriverRing, Piece};

/// A queue from the driver's side.
pub(super) struct Ring {
    pub(super) driver: DriverRing,
    pub(super) asked: BTreeMap<u16, Asked>,
    kick: Arc<EventFd>,
    size: u16,
    has_event_index: bool,
    /// The available index, and where it was when the driver last asked itself whether to kick.
    offered: u16,
    considered: u16,
    /// The used index up to which answers were taken.
    taken: u16,
    /// Descriptors ever used: those from the oldest request in flight on are taken.
    descriptors: u64,
}

/// A request that was offered and not answered.
pub(super) struct Asked {
    pub(super) wish: Wish,
    pub(super) ticket: Ticket,
    /// Where its memory is.
    pub(super) slot: u64,
    /// When it was offered.
    pub(super) offered: Moment,
    /// The number of its first descriptor.
    first: u64,
}

/// A request that is to be offered.
pub(super) struct Offer<'pieces> {
    pub(super) wish: Wish,
    pub(super) ticket: Ticket,
    pub(super) slot: u64,
    pub(super) pieces: &'pieces [Piece],
    /// Where a table of descriptors may lie.
    pub(super) table: u64,
}

impl Ring {
    pub(super) fn new(memory: &Arc<GuestMemoryMmap>, base: u64, size: u16, features: u64) -> Self {
        Self {
            driver: DriverRing::new(memory, base, size),
            asked: BTreeMap::new(),
            kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            size,
            has_event_index: features & FEATURE_EVENT_IDX != 0,
            offered: 0,
            considered: 0,
            taken: 0,
            descriptors: 0,
        }
    }

    /// The device's end, at its beginning.
    pub(super) fn device_end(&self, features: u64) -> ActiveQueue {
        let memory = Arc::clone(self.driver.memory());
        ActiveQueue {
            ring: Virtqueue::new(memory, self.driver.layout(), features).unwrap(),
            kick: Arc::clone(&self.kick),
        }
    }

    /// How many descriptors are free.
    pub(super) fn room(&self) -> usize {
        let oldest = self.asked.values().map(|asked| asked.first).min();
        let used = self.descriptors - oldest.unwrap_or(self.descriptors);
        usize::from(self.size) - usize::try_from(used).unwrap()
    }

    /// Makes a request available, in descriptors of the queue or in a table; there is room.
    pub(super) fn offer(&mut self, offer: &Offer<'_>, now: Moment, dice: &mut Dice) {
        let first = self.descriptors;
        let head = if offer.pieces.len() > self.room() || dice.one_in(3) {
            self.descriptors += 1;
            self.driver.offer_indirect(offer.table, offer.pieces)
        } else {
            self.descriptors += offer.pieces.len() as u64;
            self.driver.offer_chain(offer.pieces)
        };
        self.offered = self.offered.wrapping_add(1);
        let asked = Asked {
            wish: offer.wish,
            ticket: offer.ticket,
            slot: offer.slot,
            offered: now,
            first,
        };
        let before = self.asked.insert(head, asked);
        assert!(before.is_none(), "the guest uses no descriptor twice");
    }

    /// Kicks if the device wants to hear of what was offered since the last time; says whether it did.
    pub(super) fn kick_if_wanted(&mut self) -> bool {
        let (before, now) = (self.considered, self.offered);
        self.considered = now;
        if before == now {
            return false;
        }
        let is_wanted = if self.has_event_index {
            // 2.7.10: the index at whose passing the device wants a kick was passed.
            let event = self.driver.avail_event();
            now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
        } else {
            self.driver.used_flags() & 1 == 0
        };
        if is_wanted {
            self.kick.write(1).unwrap();
        }
        is_wanted
    }

    /// Forgets a kick that nobody has heard.
    pub(super) fn forget_kick(&self) {
        // Nothing was written: then there is nothing to forget.
        let _ = self.kick.read();
    }

    /// The next answer, and how much the device says it has written.
    pub(super) fn take_answer(&mut self) -> Option<(Asked, u32)> {
        let (head, written) = self.driver.take_used()?;
        self.taken = self.taken.wrapping_add(1);
        let asked = u16::try_from(head).ok().and_then(|head| self.asked.remove(&head));
        let Some(asked) = asked else {
            panic!("chain {head} came back, and was not in flight: a request was answered twice");
        };
        Some((asked, written))
    }

    /// Whether there are answers that were not taken.
    pub(super) fn has_answers(&self) -> bool {
        self.driver.used_index() != self.taken
    }

    /// Asks for an interrupt with the next answer.
    pub(super) fn want_interrupt(&self) {
        self.driver.set_used_event(self.taken);
    }
}
