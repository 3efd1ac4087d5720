//! From the guest to the tap.

use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::tap::{FRAME_BYTES_MAX, HEADER_BYTES};
use super::worker::{Next, Way, locked};
use crate::mmds::{HEAD_BYTES, Stack};
use crate::virtio::device::ActiveQueue;
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;

/// Frames sent before the other direction has its turn.
const BATCH_FRAMES_MAX: usize = 64;

/// Sends what the guest has put into its queue.
#[derive(Debug, Default)]
pub(super) struct Sender {
    chain: Chain,
}

impl Sender {
    /// Sends some of it, and says what there is to wait for. What is left in the queue was not taken out of it.
    pub(super) fn turn(&mut self, queue: &mut ActiveQueue, way: &Way<'_>) -> Result<Next, PopError> {
        let (counts, limiter) = (way.counts, &way.limiters.tx);
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
            // What never leaves this process is no part of what is limited.
            if let Some(metadata) = way.metadata {
                let mut stack = locked(metadata);
                if self.is_for(&stack) {
                    self.divert(&mut stack, bytes);
                    queue.ring.push(self.chain.head, 0);
                    continue;
                }
            }
            if limiter.is_limiting() {
                // It goes as soon as there is a token, and leaves its debt to all pairs: were it to wait for all of its own, who
                // sends small frames by another pair would take them away for ever.
                let now = Instant::now();
                let at = limiter.ready_at(1, now);
                if at > now {
                    queue.ring.unpop();
                    counts.tx_throttled.fetch_add(1, Relaxed);
                    return Ok(Next::Then(at));
                }
                limiter.reserve(bytes, now);
            }
            match way.tap.write(&self.chain.readable) {
                Ok(_) => {
                    counts.tx_frames.fetch_add(1, Relaxed);
                    counts.tx_bytes.fetch_add(bytes - HEADER_BYTES as u64, Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    limiter.refund(bytes, Instant::now());
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

    fn is_for(&self, stack: &Stack) -> bool {
        let mut head = [0; HEAD_BYTES];
        let length = segments::gather(&self.chain.readable, HEADER_BYTES, &mut head);
        stack.wants(head.get(..length).unwrap_or_default())
    }

    /// Gives the frame of so many bytes, with its header, to the metadata service.
    fn divert(&self, stack: &mut Stack, bytes: u64) {
        let length = usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .saturating_sub(HEADER_BYTES);
        // One byte more than what is of use is as useless as all of it.
        let mut frame = vec![0; length.min(Stack::frame_bytes_max() + 1)];
        segments::gather(&self.chain.readable, HEADER_BYTES, &mut frame);
        stack.take(frame, Instant::now());
    }
}
