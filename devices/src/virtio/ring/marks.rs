//! What a device writes by way of one queue, marked in the pages that are tracked.

use std::sync::Arc;

use coracle_storage::request::Segment;
use vm_memory::GuestAddress;

use super::{Chain, QueueLayout};
use crate::virtio::dirty::DirtyPages;

/// Remembers what may be written of each chain in flight, so that no device has to. Kept off the path of a queue that is not
/// tracked.
///
/// A driver that makes a descriptor available again before it was given back has mixed up its own requests, and a page of
/// theirs may go without a mark.
#[derive(Debug)]
pub(super) struct Marks {
    dirty: Arc<DirtyPages>,
    layout: QueueLayout,
    /// By the head of the chain; emptied, not freed, when it is given back.
    writable: Box<[Vec<Segment>]>,
}

impl Marks {
    /// For a queue that has nothing in flight.
    pub(super) fn new(dirty: Arc<DirtyPages>, layout: QueueLayout) -> Self {
        Self {
            dirty,
            layout,
            writable: (0..layout.size).map(|_| Vec::new()).collect(),
        }
    }

    /// The device has `chain`, as far as it makes sense.
    #[cold]
    pub(super) fn taken(&mut self, chain: &Chain) {
        let writable = self.of(chain.head);
        writable.clear();
        writable.extend_from_slice(&chain.writable);
    }

    /// The device has written what it has to.
    #[cold]
    pub(super) fn given_back(&mut self, head: u16) {
        let mut writable = std::mem::take(self.of(head));
        for segment in &writable {
            self.dirty.mark_segment(segment);
        }
        writable.clear();
        *self.of(head) = writable;
    }

    /// Everything that the device writes into the used ring lies here (2.7.8).
    pub(super) fn used_ring(&self) {
        let len_bytes = 6 + 8 * u64::from(self.layout.size);
        self.dirty.mark(GuestAddress(self.layout.used), len_bytes);
    }

    fn of(&mut self, head: u16) -> &mut Vec<Segment> {
        self.writable
            .get_mut(usize::from(head))
            .expect("a chain that was taken has its head in the queue")
    }
}

/// The ring may be given up at any time, and was written until then.
impl Drop for Marks {
    fn drop(&mut self) {
        self.used_ring();
    }
}
