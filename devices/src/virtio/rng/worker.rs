//! The data half of the entropy device: the thread `rng`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use coracle_storage::limit::RateLimiter;

use crate::complaints::Complaints;
use crate::random;
use crate::virtio::device::ActiveQueue;
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;
use crate::virtio::service::Mailbox;
use crate::virtio::single::{Next, Single};

/// The most that one request is given, in bytes; a device may use less of a buffer than there is (5.4.6).
pub const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// Requests served before the worker looks into its mailbox again.
const BATCH_REQUESTS_MAX: usize = 16;
/// Random bytes made at a time.
const PIECE_BYTES: usize = 4096;

/// What the entropy device has done, for metrics.
#[derive(Debug, Default)]
pub struct EntropyCounts {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Random bytes given to the guest.
    pub bytes: AtomicU64,
    /// Requests that made no sense, and rings that broke.
    pub guest_faults: AtomicU64,
    /// Times that the host's generator failed.
    pub host_failures: AtomicU64,
    /// Times that a request had to wait for the rate limiter.
    pub throttled: AtomicU64,
}

pub(super) struct Worker {
    counts: Arc<EntropyCounts>,
    limiter: RateLimiter,
    chain: Chain,
    complaints: Complaints,
}

impl Worker {
    pub(super) fn new(counts: Arc<EntropyCounts>, limiter: RateLimiter) -> Self {
        Self {
            counts,
            limiter,
            chain: Chain::default(),
            complaints: Complaints::default(),
        }
    }

    fn admit(&mut self, bytes: u64) -> Result<(), Instant> {
        if self.limiter.is_limiting() {
            self.limiter.admit(bytes, Instant::now())
        } else {
            Ok(())
        }
    }

    /// Writes up to `wanted_bytes` random bytes into the chain; returns how many it could.
    fn fill(&mut self, wanted_bytes: u64) -> u32 {
        let wanted_bytes = usize::try_from(wanted_bytes.min(REQUEST_BYTES_MAX)).unwrap_or(0);
        let mut piece = [0; PIECE_BYTES];
        let mut done = 0;
        while done < wanted_bytes {
            let len = PIECE_BYTES.min(wanted_bytes - done);
            let piece = piece.get_mut(..len).expect("at most PIECE_BYTES");
            if let Err(error) = random::fill(piece) {
                self.complaints
                    .complain(format_args!("the host gives no random bytes: {error}"));
                self.counts.host_failures.fetch_add(1, Ordering::Relaxed);
                break;
            }
            done += segments::scatter(&self.chain.writable, done, piece);
        }
        u32::try_from(done).expect("a request has at most REQUEST_BYTES_MAX")
    }
}

impl Single for Worker {
    fn turn(&mut self, _mailbox: &Mailbox, queue: &mut ActiveQueue) -> Next {
        for _ in 0..BATCH_REQUESTS_MAX {
            match queue.ring.pop(&mut self.chain) {
                Ok(false) => return Next::Kick,
                Ok(true) => {
                    let wanted_bytes = segments::len_bytes(&self.chain.writable).min(REQUEST_BYTES_MAX);
                    if let Err(at) = self.admit(wanted_bytes) {
                        // Left in the ring, so that a stop finds nothing in flight.
                        queue.ring.unpop();
                        self.counts.throttled.fetch_add(1, Ordering::Relaxed);
                        return Next::Tokens(at);
                    }
                    let written_bytes = self.fill(wanted_bytes);
                    self.counts.requests.fetch_add(1, Ordering::Relaxed);
                    self.counts
                        .bytes
                        .fetch_add(u64::from(written_bytes), Ordering::Relaxed);
                    queue.ring.push(self.chain.head, written_bytes);
                }
                Err(PopError::Malformed { head, .. }) => {
                    self.counts.guest_faults.fetch_add(1, Ordering::Relaxed);
                    queue.ring.push(head, 0);
                }
                Err(PopError::Broken(fault)) => {
                    let what = format_args!(
                        "the guest's entropy driver broke its queue, which needs a reset: {fault}"
                    );
                    self.complaints.complain(what);
                    self.counts.guest_faults.fetch_add(1, Ordering::Relaxed);
                    return Next::Reset;
                }
            }
        }
        Next::More
    }
}
