//! One split virtqueue (virtio 1.2, 2.7), seen from the device.
//!
//! The guest may write anything into its rings at any time. So each field is read once, atomically;
//! every address is checked before it becomes a [`Segment`]; every walk has an end. What can go
//! wrong is of two kinds: a chain that makes no sense ([`PopError::Malformed`]: only that chain is
//! lost) and a ring whose positions make no sense ([`PopError::Broken`]: the queue is over).
//!
//! ```text
//!   loop {
//!       while ring.pop(&mut chain)? { … ring.push(chain.head, written) … }
//!       ring.publish();
//!       if ring.needs_interrupt() { interrupt.used_buffer() }
//!       if !ring.enable_kicks() { wait for the kick }
//!       ring.disable_kicks();
//!   }
//! ```

mod error;
mod marks;
mod memory;
#[cfg(test)]
mod tests;
mod walk;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use coracle_storage::request::Segment;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use vm_memory::GuestMemoryMmap;

use super::dirty::DirtyPages;
use super::mem::Blocks;
pub use error::{ChainFault, PopError, RingError, RingFault};
use marks::Marks;
use memory::{Area, Map};
use walk::{DESCRIPTOR_BYTES, Walk};

/// The largest queue that the standard allows, in descriptors (2.7).
pub const QUEUE_SIZE_MAX: u16 = 32768;
/// The most pieces a chain may have, in segments: one `preadv` takes no more (IOV_MAX).
pub const CHAIN_SEGMENTS_MAX: usize = 1024;
/// The most descriptors in an indirect table. The standard says the queue's size, Linux's driver goes
/// beyond that on small queues, and no driver has a use for more than fits a chain.
pub const INDIRECT_DESCRIPTORS_MAX: usize = CHAIN_SEGMENTS_MAX;

/// VIRTIO_F_INDIRECT_DESC as a bit of the feature word.
pub const FEATURE_INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// VIRTIO_F_EVENT_IDX as a bit of the feature word.
pub const FEATURE_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

// The kernel's headers give the flags as u32; on the ring they are u16.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the flags are the values 1, 2 and 4"
)]
mod flag {
    use super::*;
    pub(super) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
    pub(super) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    pub(super) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
    pub(super) const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
    pub(super) const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;
}

/// Where the driver put a queue: guest addresses and the size in descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLayout {
    /// Descriptors; a power of two.
    pub size: u16,
    /// The descriptor table, aligned to 16 bytes.
    pub descriptors: u64,
    /// The available ring ("driver area"), aligned to 2 bytes.
    pub avail: u64,
    /// The used ring ("device area"), aligned to 4 bytes.
    pub used: u64,
}

/// A queue's place and progress: what must survive for it to go on elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// Where the rings are.
    pub layout: QueueLayout,
    /// The available index up to which chains were taken.
    pub next_avail: u16,
    /// The used index up to which chains were given back.
    pub next_used: u16,
}

/// One chain of descriptors as segments of this process. Reused from pop to pop, so that no pop allocates.
///
/// The segments are valid while the queue's memory is, that is until the session is given back.
#[derive(Debug, Default)]
pub struct Chain {
    /// Names the chain in [`Virtqueue::push`].
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<Segment>,
    /// What the device may write, in order.
    pub writable: Vec<Segment>,
}

impl Chain {
    fn clear(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
    }
}

/// A ready queue. One thread owns it; the other end is the guest.
#[derive(Debug)]
pub struct Virtqueue {
    map: Map,
    descriptors: Area<AtomicU64>,
    /// `flags`, `idx`, `ring[size]`, `used_event` (2.7.6).
    avail: Area<AtomicU16>,
    /// The used ring by its elements (2.7.8): one cell for flags and idx, not touched, then (id, len) pairs.
    used: Area<AtomicU32>,
    /// The used ring by its 16-bit fields: flags, idx, and avail_event behind the elements.
    used_words: Area<AtomicU16>,
    layout: QueueLayout,
    features: u64,
    next_avail: u16,
    /// The available index as last read; chains up to here are taken without touching the index again.
    seen_avail: u16,
    next_used: u16,
    /// The used index for which the driver was last interrupted, or considered.
    considered_used: u16,
    /// Where pages are tracked.
    marks: Option<Box<Marks>>,
}

impl Virtqueue {
    /// A queue at its beginning, as the driver makes it ready.
    ///
    /// # Errors
    ///
    /// When the layout is not one that the standard allows, or not in `memory`.
    pub fn new(memory: Arc<GuestMemoryMmap>, layout: QueueLayout, features: u64) -> Result<Self, RingError> {
        let state = QueueState {
            layout,
            next_avail: 0,
            next_used: 0,
        };
        Self::restore(memory, state, features)
    }

    /// A queue that goes on where [`Self::state`] was asked.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; and when the positions contradict the size.
    pub fn restore(
        memory: Arc<GuestMemoryMmap>,
        state: QueueState,
        features: u64,
    ) -> Result<Self, RingError> {
        let QueueState {
            layout,
            next_avail,
            next_used,
        } = state;
        let size = layout.size;
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(RingError::Size(size));
        }
        if next_avail.wrapping_sub(next_used) > size {
            return Err(RingError::Progress {
                size,
                next_avail,
                next_used,
            });
        }
        let map = Map::new(memory);
        let count = usize::from(size);
        let wrong = |area, address| RingError::Area { area, address };
        if !layout.descriptors.is_multiple_of(u64::from(DESCRIPTOR_BYTES)) {
            return Err(wrong("descriptor table", layout.descriptors));
        }
        let descriptors = map
            .area(layout.descriptors, 2 * count)
            .ok_or(wrong("descriptor table", layout.descriptors))?;
        let avail = map
            .area(layout.avail, 3 + count)
            .ok_or(wrong("available ring", layout.avail))?;
        let used = map
            .area(layout.used, 1 + 2 * count)
            .ok_or(wrong("used ring", layout.used))?;
        let used_words = map
            .area(layout.used, 3 + 4 * count)
            .ok_or(wrong("used ring", layout.used))?;
        Ok(Self {
            map,
            descriptors,
            avail,
            used,
            used_words,
            layout,
            features,
            next_avail,
            seen_avail: next_avail,
            next_used,
            considered_used: next_used,
            marks: None,
        })
    }

    /// From now on what is not plugged of `blocks`, which are those of a region of the memory, is no memory for this queue.
    ///
    /// # Errors
    ///
    /// When the rings lie there.
    pub fn restrict(&mut self, blocks: Arc<Blocks>) -> Result<(), RingError> {
        self.map.restrict(blocks);
        let layout = self.layout;
        let count = usize::from(layout.size);
        let is_there = |address, bytes| self.map.cells::<AtomicU8>(address, bytes).is_some();
        let areas = [
            ("descriptor table", layout.descriptors, 16 * count),
            ("available ring", layout.avail, 6 + 2 * count),
            ("used ring", layout.used, 6 + 8 * count),
        ];
        match areas
            .into_iter()
            .find(|(_, address, bytes)| !is_there(*address, *bytes))
        {
            Some((area, address, _)) => Err(RingError::Area { area, address }),
            None => Ok(()),
        }
    }

    /// Place and progress. Ask when nothing is in flight and everything pushed is published.
    pub fn state(&self) -> QueueState {
        QueueState {
            layout: self.layout,
            next_avail: self.next_avail,
            next_used: self.next_used,
        }
    }

    /// Whether something was published for which [`Self::needs_interrupt`] was not asked: the driver may wait for it.
    pub fn owes_interrupt(&self) -> bool {
        self.considered_used != self.next_used
    }

    /// Marks in `dirty` from now on what is written by way of this queue: the writable part of each chain when it is given
    /// back, and the used ring when [`Self::mark_used_ring`] asks for it and when the queue ends.
    ///
    /// # Panics
    ///
    /// When something is in flight.
    pub fn track(&mut self, dirty: Option<Arc<DirtyPages>>) {
        assert_eq!(self.in_flight(), 0, "what is in flight was not remembered");
        let layout = self.layout;
        self.marks = dirty.map(|dirty| Box::new(Marks::new(dirty, layout)));
    }

    /// Marks the used ring, where pages are tracked: it is written all the time, and looked for rarely.
    pub fn mark_used_ring(&self) {
        if let Some(marks) = &self.marks {
            marks.used_ring();
        }
    }

    /// Descriptors in the queue.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Chains taken and not given back; never more than the size.
    pub fn in_flight(&self) -> u16 {
        self.next_avail.wrapping_sub(self.next_used)
    }

    /// Takes the next chain into `chain`; `false` when there is none.
    ///
    /// # Errors
    ///
    /// [`PopError::Malformed`] when this chain makes no sense (it counts as taken, go on with the
    /// next), [`PopError::Broken`] when the ring does (it will say so for ever).
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, PopError> {
        if self.next_avail == self.seen_avail && !self.look().map_err(PopError::Broken)? {
            return Ok(false);
        }
        let size = self.layout.size;
        let slot = self.next_avail & (size - 1);
        let head = u16::from_le(self.avail.at(2 + usize::from(slot)).load(Ordering::Relaxed));
        if head >= size {
            return Err(PopError::Broken(RingFault::Head { head, size }));
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        chain.clear(head);
        let walk = Walk::new(&self.map, chain, self.features);
        let walked = walk.along(self.descriptors.cells(), self.layout.size);
        if let Some(marks) = &mut self.marks {
            marks.taken(chain);
        }
        walked.map_err(|fault| PopError::Malformed { head, fault })?;
        Ok(true)
    }

    /// Puts the chain that [`Self::pop`] gave last back into the ring, to be popped again: for a device
    /// that cannot serve it yet and wants to have nothing in flight when it stops.
    ///
    /// # Panics
    ///
    /// When nothing is in flight. The caller has not pushed that chain.
    pub fn unpop(&mut self) {
        assert!(self.in_flight() > 0, "there is a chain to put back");
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// Reads the driver's index; true when there is something new.
    fn look(&mut self) -> Result<bool, RingFault> {
        // Acquire: what the driver wrote into ring and descriptors before the index is visible after.
        let to = u16::from_le(self.avail.at(1).load(Ordering::Acquire));
        let (from, size, in_flight) = (self.next_avail, self.layout.size, self.in_flight());
        // The driver may reuse only what it was given back, so this bounds what a device holds, too.
        if u32::from(to.wrapping_sub(from)) + u32::from(in_flight) > u32::from(size) {
            return Err(RingFault::AvailIndex {
                from,
                to,
                size,
                in_flight,
            });
        }
        self.seen_avail = to;
        Ok(to != from)
    }

    /// Gives a chain back, with how many bytes the device wrote into it. The driver sees it after [`Self::publish`].
    ///
    /// # Panics
    ///
    /// When nothing is in flight: the caller gave a chain back twice.
    #[inline]
    pub fn push(&mut self, head: u16, written_bytes: u32) {
        assert!(
            self.in_flight() > 0,
            "a chain is given back once: descriptor {head} was not in flight"
        );
        if let Some(marks) = &mut self.marks {
            marks.given_back(head);
        }
        let slot = usize::from(self.next_used & (self.layout.size - 1));
        self.used
            .at(1 + 2 * slot)
            .store(u32::from(head).to_le(), Ordering::Relaxed);
        self.used
            .at(2 + 2 * slot)
            .store(written_bytes.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver everything pushed so far: one store for a batch.
    #[inline]
    pub fn publish(&mut self) {
        // Release: the elements, and the data in the buffers, are visible before the index.
        self.used_words
            .at(1)
            .store(self.next_used.to_le(), Ordering::Release);
    }

    /// Whether the driver wants an interrupt for what was published since the last call (2.7.7, 2.7.10).
    ///
    /// Ask once after each [`Self::publish`], or less often to coalesce. True obliges the caller to
    /// raise it: the same buffers are not reported again.
    #[inline]
    pub fn needs_interrupt(&mut self) -> bool {
        let (old, new) = (self.considered_used, self.next_used);
        if old == new {
            return false;
        }
        self.considered_used = new;
        // The used index must be visible before the driver's wish is read: the driver writes its wish
        // and then reads the index, and one of the two must see the other's write.
        fence(Ordering::SeqCst);
        if self.features & FEATURE_EVENT_IDX == 0 {
            return u16::from_le(self.avail.at(0).load(Ordering::Relaxed)) & flag::NO_INTERRUPT == 0;
        }
        let event = u16::from_le(
            self.avail
                .at(2 + usize::from(self.layout.size))
                .load(Ordering::Relaxed),
        );
        // Did the index step over `event` on its way from old to new?
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Asks the driver not to kick while the device looks by itself. A hint: kicks may come all the same.
    #[inline]
    pub fn disable_kicks(&mut self) {
        // With EVENT_IDX the driver kicks when it passes avail_event; once passed, it is silent already.
        if self.features & FEATURE_EVENT_IDX == 0 {
            self.used_words
                .at(0)
                .store(flag::NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// Asks for a kick at the next buffer. True: buffers have come meanwhile whose kick may never
    /// come, look again before waiting.
    #[inline]
    pub fn enable_kicks(&mut self) -> bool {
        if self.features & FEATURE_EVENT_IDX == 0 {
            self.used_words.at(0).store(0, Ordering::Relaxed);
        } else {
            let event = self.used_words.at(2 + 4 * usize::from(self.layout.size));
            event.store(self.next_avail.to_le(), Ordering::Relaxed);
        }
        // The wish must be visible before the index is read: the mirror of `needs_interrupt`.
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Whether the driver's index says that there is something to pop.
    #[inline]
    pub fn has_available(&self) -> bool {
        self.available() != 0
    }

    /// How many chains the driver's index says that there are to pop.
    #[inline]
    pub fn available(&self) -> u16 {
        u16::from_le(self.avail.at(1).load(Ordering::Relaxed)).wrapping_sub(self.next_avail)
    }
}
