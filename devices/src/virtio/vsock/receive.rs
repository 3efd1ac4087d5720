//! From the host to the guest.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use coracle_storage::request::Segment;

use super::connection::Said;
use super::connections::{Connections, VsockCounts};
use super::packet::HEADER_BYTES;
use super::worker::Next;
use crate::virtio::device::ActiveQueue;
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;

/// Packets given before the other direction has its turn.
const BATCH_PACKETS_MAX: usize = 64;

/// Fills the buffers that the guest has offered.
#[derive(Debug)]
pub(super) struct Receiver {
    chain: Chain,
    scratch: Vec<Segment>,
    counts: Arc<VsockCounts>,
}

impl Receiver {
    pub(super) fn new(counts: Arc<VsockCounts>) -> Self {
        Self {
            chain: Chain::default(),
            scratch: Vec::new(),
            counts,
        }
    }

    /// Gives the guest some packets, and says what there is to wait for. A buffer that nothing was said in stays in the queue.
    pub(super) fn turn(
        &mut self,
        queue: &mut ActiveQueue,
        connections: &mut Connections,
    ) -> Result<Next, PopError> {
        for _ in 0..BATCH_PACKETS_MAX {
            if !connections.has_news() {
                return Ok(Next::Nothing);
            }
            let written = match queue.ring.pop(&mut self.chain) {
                Ok(false) => return Ok(Next::Kick),
                Ok(true) => self.fill(connections),
                Err(PopError::Malformed { head, .. }) => {
                    self.chain.head = head;
                    self.count_fault();
                    Some(0)
                }
                Err(broken) => return Err(broken),
            };
            match written {
                Some(bytes) => queue
                    .ring
                    .push(self.chain.head, u32::try_from(bytes).unwrap_or(u32::MAX)),
                None => {
                    queue.ring.unpop();
                    return Ok(Next::Nothing);
                }
            }
        }
        Ok(Next::More)
    }

    /// How much was written into the buffer; `None` if there was nothing to say.
    fn fill(&mut self, connections: &mut Connections) -> Option<usize> {
        let said = if segments::len_bytes(&self.chain.writable) < HEADER_BYTES as u64 {
            Said::TooSmall
        } else {
            connections.say(&self.chain.writable, &mut self.scratch)
        };
        match said {
            Said::Packet(bytes) => {
                self.counts.rx_packets.fetch_add(1, Relaxed);
                self.counts.rx_bytes.fetch_add(bytes as u64, Relaxed);
                Some(HEADER_BYTES + bytes)
            }
            Said::TooSmall => {
                self.count_fault();
                Some(0)
            }
            Said::Nothing | Said::Broken => None,
        }
    }

    fn count_fault(&self) {
        self.counts.rx_guest_faults.fetch_add(1, Relaxed);
    }
}
