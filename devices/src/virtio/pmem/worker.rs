//! The data half of persistent memory: a thread of its own, as a flush waits for the host.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coracle_storage::limit::SharedLimiter;

use super::medium::{FlushError, Medium};
use crate::complaints::Complaints;
use crate::virtio::device::ActiveQueue;
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;
use crate::virtio::service::Mailbox;
use crate::virtio::single::{Next, Single};

/// How long a file may be shorter than what its guest sees before somebody notices who is not asked to flush it. Not every KVM
/// says that a guest waits for a page that nobody has.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// Requests that one flush answers at most; what comes meanwhile waits for the next.
const BATCH_REQUESTS_MAX: usize = 64;
/// The one type of request (5.19.6).
const VIRTIO_PMEM_REQ_TYPE_FLUSH: u32 = 0;
/// What is answered (5.19.7): done, or not.
const DONE: i32 = 0;
const FAILED: i32 = -1;

/// What persistent memory has done, for metrics.
#[derive(Debug, Default)]
pub struct PmemCounts {
    /// Times that there were requests.
    pub queue_events: AtomicU64,
    /// Flushes that were carried out.
    pub flushes: AtomicU64,
    /// Flushes that failed.
    pub flush_fails: AtomicU64,
    /// Requests that made no sense, and rings that broke.
    pub guest_faults: AtomicU64,
    /// Times that a request had to wait for the rate limiter.
    pub throttled: AtomicU64,
    /// Times that the rate limiter let the next one by.
    pub refilled: AtomicU64,
}

/// Hears that the file is cut, as often as that is noticed.
pub(super) type OnCut = Box<dyn FnMut(&FlushError) + Send>;

pub(super) struct Worker {
    medium: Arc<Medium>,
    on_cut: OnCut,
    limiter: Arc<SharedLimiter>,
    counts: Arc<PmemCounts>,
    /// Chains that were taken, and those that will be.
    chains: Vec<Chain>,
    complaints: Complaints,
}

impl Worker {
    pub(super) fn new(
        (medium, on_cut): (Arc<Medium>, OnCut),
        limiter: Arc<SharedLimiter>,
        counts: Arc<PmemCounts>,
    ) -> Self {
        Self {
            medium,
            on_cut,
            limiter,
            counts,
            chains: Vec::new(),
            complaints: Complaints::default(),
        }
    }

    /// Looks whether the file is still there.
    fn check_whole(&mut self) {
        if let Err(error @ FlushError::Cut { .. }) = self.medium.check_whole() {
            (self.on_cut)(&error);
        }
    }

    /// Takes the requests that are there into the first of the chains, and says how many these are. What makes no sense is given
    /// back.
    fn take(&mut self, queue: &mut ActiveQueue) -> (usize, Next) {
        let mut taken = 0;
        for _ in 0..BATCH_REQUESTS_MAX {
            if self.chains.len() == taken {
                self.chains.push(Chain::default());
            }
            let chain = self.chains.get_mut(taken).expect("it was made just now");
            match queue.ring.pop(chain) {
                Ok(false) => return (taken, Next::Kick),
                // One flush is one operation, whoever asked.
                Ok(true) if taken == 0 => {
                    if let Err(at) = self.admit() {
                        // Left in the ring, so that a stop finds nothing in flight.
                        queue.ring.unpop();
                        self.counts.throttled.fetch_add(1, Ordering::Relaxed);
                        return (0, Next::Tokens(at));
                    }
                    taken += 1;
                }
                Ok(true) => taken += 1,
                Err(PopError::Malformed { head, .. }) => {
                    self.counts.guest_faults.fetch_add(1, Ordering::Relaxed);
                    queue.ring.push(head, 0);
                }
                Err(PopError::Broken(fault)) => {
                    self.complaints.complain(format_args!(
                        "the guest's pmem driver broke its queue, which needs a reset: {fault}"
                    ));
                    self.counts.guest_faults.fetch_add(1, Ordering::Relaxed);
                    return (taken, Next::Reset);
                }
            }
        }
        (taken, Next::More)
    }

    /// Answers the first `taken` of the chains. All of them were taken before the flush begins, and so it is for all of them.
    fn answer(&mut self, queue: &mut ActiveQueue, taken: usize) {
        if taken == 0 {
            return;
        }
        self.counts.queue_events.fetch_add(1, Ordering::Relaxed);
        let mut flushed = None;
        for at in 0..taken {
            let chain = self.chains.get(at).expect("so many were taken");
            let (head, is_flush) = (chain.head, is_flush(chain));
            let answer = if is_flush {
                let answer = flushed.unwrap_or_else(|| self.flush());
                flushed = Some(answer);
                answer
            } else {
                self.counts.guest_faults.fetch_add(1, Ordering::Relaxed);
                FAILED
            };
            let chain = self.chains.get(at).expect("so many were taken");
            let written = segments::scatter(&chain.writable, 0, &answer.to_le_bytes());
            queue.ring.push(head, u32::try_from(written).unwrap_or_default());
        }
    }

    /// Flushes, and says what is to be answered.
    fn flush(&mut self) -> i32 {
        let Err(error) = self.medium.flush() else {
            self.counts.flushes.fetch_add(1, Ordering::Relaxed);
            return DONE;
        };
        self.counts.flush_fails.fetch_add(1, Ordering::Relaxed);
        self.complaints.complain(format_args!(
            "persistent memory is not flushed: {}",
            chain_of_causes(&error)
        ));
        if matches!(error, FlushError::Cut { .. }) {
            (self.on_cut)(&error);
        }
        FAILED
    }

    fn admit(&self) -> Result<(), Instant> {
        if self.limiter.is_limiting() {
            self.limiter.admit(self.medium.size_bytes(), Instant::now())
        } else {
            Ok(())
        }
    }
}

impl Single for Worker {
    const LOOK_PERIOD: Option<Duration> = Some(LOOK_PERIOD);

    fn turn(&mut self, _mailbox: &Mailbox, queue: &mut ActiveQueue) -> Next {
        let (taken, next) = self.take(queue);
        self.answer(queue, taken);
        next
    }

    fn has_waited(&mut self, next: Next) {
        match next {
            Next::Tokens(_) => {
                self.counts.refilled.fetch_add(1, Ordering::Relaxed);
            }
            _ => self.check_whole(),
        }
    }
}

/// Whether a chain asks for a flush, and has room for the answer.
fn is_flush(chain: &Chain) -> bool {
    let mut kind = [0; 4];
    let read = segments::gather(&chain.readable, 0, &mut kind);
    let room_bytes = segments::len_bytes(&chain.writable);
    read == kind.len()
        && u32::from_le_bytes(kind) == VIRTIO_PMEM_REQ_TYPE_FLUSH
        && room_bytes >= size_of::<i32>() as u64
}

fn chain_of_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    causes.join(": ")
}
