//! From the guest to the host.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use coracle_storage::request::{Segment, cut_first_bytes};

use super::connections::{Connections, VsockCounts};
use super::packet::{HEADER_BYTES, Header};
use super::worker::Next;
use crate::virtio::device::ActiveQueue;
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;

/// Packets taken before the other direction has its turn.
const BATCH_PACKETS_MAX: usize = 64;

/// Takes what the guest has put into its queue.
#[derive(Debug)]
pub(super) struct Sender {
    chain: Chain,
    counts: Arc<VsockCounts>,
}

impl Sender {
    pub(super) fn new(counts: Arc<VsockCounts>) -> Self {
        Self {
            chain: Chain::default(),
            counts,
        }
    }

    /// Takes some of it, and says what there is to wait for.
    pub(super) fn turn(
        &mut self,
        queue: &mut ActiveQueue,
        connections: &mut Connections,
    ) -> Result<Next, PopError> {
        for _ in 0..BATCH_PACKETS_MAX {
            // The other direction goes on first: the guest has to take what it was told already (5.10.6.1.1).
            if !connections.has_room() {
                return Ok(Next::Nothing);
            }
            let head = match queue.ring.pop(&mut self.chain) {
                Ok(false) => return Ok(Next::Kick),
                Ok(true) => {
                    match packet(&mut self.chain.readable) {
                        Some(header) => connections.take(&header, &mut self.chain.readable),
                        None => self.count_fault(),
                    }
                    self.chain.head
                }
                Err(PopError::Malformed { head, .. }) => {
                    self.count_fault();
                    head
                }
                Err(broken) => return Err(broken),
            };
            queue.ring.push(head, 0);
        }
        Ok(Next::More)
    }

    fn count_fault(&self) {
        self.counts.tx_guest_faults.fetch_add(1, Relaxed);
    }
}

/// The header of the packet in `segments`, which then are its data; `None` if there is less than it says.
fn packet(segments: &mut Vec<Segment>) -> Option<Header> {
    let header = Header::read(segments)?;
    cut_first_bytes(segments, HEADER_BYTES);
    if segments::len_bytes(segments) < header.len_bytes.into() {
        return None;
    }
    segments::keep_first_bytes(segments, usize::try_from(header.len_bytes).ok()?);
    Some(header)
}
