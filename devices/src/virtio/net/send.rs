//! From the guest to the tap.

use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use coracle_storage::limit::RateLimiter;

use super::tap::{FRAME_BYTES_MAX, HEADER_BYTES, Tap};
use super::worker::{NetCounts, Next};
use crate::virtio::device::ActiveQueue;
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;

/// Frames sent before the other direction has its turn.
const BATCH_FRAMES_MAX: usize = 64;

/// Sends what the guest has put into its queue.
#[derive(Debug, Default)]
pub(super) struct Sender {
    chain: Chain,
    pub(super) limiter: RateLimiter,
}

impl Sender {
    /// Sends some of it, and says what there is to wait for. What is left in the queue was not taken out of it.
    pub(super) fn turn(
        &mut self,
        queue: &mut ActiveQueue,
        tap: &Tap,
        counts: &NetCounts,
    ) -> Result<Next, PopError> {
        for _ in 0..BATCH_FRAMES_MAX {
            match queue.ring.pop(&mut self.chain) {
                Ok(false) => return Ok(Next::Kick),
                Ok(true) => {}
                Err(PopError::Malformed { head, .. }) => {
                    counts.tx_guest_faults.fetch_add(1, Relaxed);
                    queue.ring.push(head, 0);
                    continue;
                }
                Err(broken) => return Err(broken),
            }
            let bytes = segments::len_bytes(&self.chain.readable);
            if bytes <= HEADER_BYTES as u64 || bytes > FRAME_BYTES_MAX as u64 {
                counts.tx_guest_faults.fetch_add(1, Relaxed);
                queue.ring.push(self.chain.head, 0);
                continue;
            }
            if self.limiter.is_limiting()
                && let Err(at) = self.limiter.admit(bytes, Instant::now())
            {
                queue.ring.unpop();
                counts.tx_throttled.fetch_add(1, Relaxed);
                return Ok(Next::Tokens(at));
            }
            match tap.write(&self.chain.readable) {
                Ok(_) => {
                    counts.tx_frames.fetch_add(1, Relaxed);
                    counts.tx_bytes.fetch_add(bytes - HEADER_BYTES as u64, Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.limiter.refund(bytes, Instant::now());
                    queue.ring.unpop();
                    return Ok(Next::TapTakes);
                }
                // A header that makes no sense, an interface that is down: the frame is lost, as on a wire.
                Err(_) => {
                    counts.tx_dropped.fetch_add(1, Relaxed);
                }
            }
            queue.ring.push(self.chain.head, 0);
        }
        Ok(Next::More)
    }
}
