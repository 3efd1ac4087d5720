//! From the tap to the guest.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use coracle_storage::request::Segment;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::tap::{FRAME_BYTES_MAX, HEADER_BYTES};
use super::worker::{NetCounts, Next, Way, locked};
use crate::mmds::Stack;
use crate::virtio::device::ActiveQueue;
use crate::virtio::ring::{CHAIN_SEGMENTS_MAX, Chain, PopError, Virtqueue};
use crate::virtio::segments;

/// Frames received before the other direction has its turn.
const BATCH_FRAMES_MAX: usize = 64;
/// When a tap is looked at again that cannot be read: what waits for it would be told at once, and again and again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Where a header says in how many buffers its frame is (5.1.6).
const NUM_BUFFERS_AT: usize = 10;

/// Reads frames into the buffers that the guest has offered.
///
/// With VIRTIO_NET_F_MRG_RXBUF a frame may fill several of them, and how many is known when it has been read. So as many are
/// taken out of the queue as the longest frame needs; those that the frame did not need are there for the next.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    /// Buffers that are taken and empty.
    lent: VecDeque<Chain>,
    lent_bytes: u64,
    /// Chains without content, so that none is allocated twice.
    spare: Vec<Chain>,
    /// What is read into: all of `lent`, one after the other.
    segments: Vec<Segment>,
    merges: bool,
    /// The driver has once offered room for the longest frame, so it is worth waiting for.
    is_generous: bool,
}

impl Receiver {
    /// A driver has begun, with these features.
    pub(super) fn begin(&mut self, features: u64) {
        self.merges = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        self.is_generous = false;
    }

    /// Puts back what was taken: nothing is in flight then.
    pub(super) fn end(&mut self, queue: &mut ActiveQueue) {
        for chain in self.lent.drain(..) {
            queue.ring.unpop();
            self.spare.push(chain);
        }
        self.lent_bytes = 0;
        self.segments.clear();
    }

    /// Receives some frames, and says what there is to wait for.
    pub(super) fn turn(&mut self, queue: &mut ActiveQueue, way: &Way<'_>) -> Result<Next, PopError> {
        let (counts, limiter) = (way.counts, &way.limiters.rx);
        // Once in a turn: what the guest says is answered when it comes.
        let mut metadata = way.metadata.map(locked);
        if !metadata
            .as_mut()
            .is_some_and(|stack| stack.is_ready(Instant::now()))
        {
            metadata = None;
        }
        for _ in 0..BATCH_FRAMES_MAX {
            if let Some(stack) = &mut metadata
                && stack.has_frames()
            {
                if !self.borrow(&mut queue.ring, counts)? {
                    return Ok(Next::Kick);
                }
                self.hand_over(&mut queue.ring, stack, counts);
                continue;
            }
            if limiter.is_limiting() {
                let now = Instant::now();
                // How long a frame is shows when it is here: the next one waits for what this one has cost.
                let at = limiter.ready_at(1, now);
                if at > now {
                    counts.rx_throttled.fetch_add(1, Relaxed);
                    return Ok(Next::Then(at));
                }
            }
            if !self.borrow(&mut queue.ring, counts)? {
                return Ok(Next::Kick);
            }
            let bytes = match way.tap.read(&self.segments) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Next::TapGives),
                Err(error) => {
                    counts.rx_fails.fetch_add(1, Relaxed);
                    if error.raw_os_error() == Some(libc::EBADFD) {
                        // The tap is gone, or the queue detached.
                        return Ok(Next::Then(Instant::now() + LOOK_AGAIN));
                    }
                    continue;
                }
            };
            // A frame that fills all there is may have been longer: what was cut would only look like one.
            if bytes <= HEADER_BYTES || (bytes as u64 == self.lent_bytes && bytes < FRAME_BYTES_MAX) {
                counts.rx_dropped.fetch_add(1, Relaxed);
                continue;
            }
            self.give_back(&mut queue.ring, bytes as u64);
            counts.rx_frames.fetch_add(1, Relaxed);
            counts.rx_bytes.fetch_add((bytes - HEADER_BYTES) as u64, Relaxed);
            if limiter.is_limiting() {
                limiter.reserve(bytes as u64, Instant::now());
            }
        }
        Ok(Next::More)
    }

    /// Gives the guest a frame of the metadata service, which a limit is not for.
    fn hand_over(&mut self, ring: &mut Virtqueue, stack: &mut Stack, counts: &NetCounts) {
        let Some(frame) = stack.give(Instant::now()) else {
            return;
        };
        let bytes = HEADER_BYTES + frame.len();
        if self.lent_bytes < bytes as u64 {
            counts.rx_dropped.fetch_add(1, Relaxed);
            return;
        }
        segments::scatter(&self.segments, 0, &[0; HEADER_BYTES]);
        segments::scatter(&self.segments, HEADER_BYTES, &frame);
        self.give_back(ring, bytes as u64);
        counts.rx_frames.fetch_add(1, Relaxed);
        counts.rx_bytes.fetch_add(frame.len() as u64, Relaxed);
    }

    /// Takes buffers for one frame; false if there are too few.
    ///
    /// Only what was taken last can be put back, so nothing between two that are kept is thrown away: a chain that is of no
    /// use stays in the queue until it is the first.
    fn borrow(&mut self, ring: &mut Virtqueue, counts: &NetCounts) -> Result<bool, PopError> {
        while !self.has_enough() {
            let mut chain = self.spare.pop().unwrap_or_default();
            let popped = ring.pop(&mut chain);
            let (head, bytes) = (chain.head, segments::len_bytes(&chain.writable));
            let fits = self.segments.len() + chain.writable.len() <= CHAIN_SEGMENTS_MAX;
            match popped {
                Ok(true) if fits && bytes >= HEADER_BYTES as u64 => {
                    self.segments.extend_from_slice(&chain.writable);
                    self.lent_bytes += bytes;
                    self.lent.push_back(chain);
                    continue;
                }
                Err(PopError::Broken(fault)) => return Err(PopError::Broken(fault)),
                Ok(false) => {
                    self.spare.push(chain);
                    // One that never offers as much gets what fits.
                    return Ok(!self.lent.is_empty() && !self.is_generous);
                }
                Ok(true) | Err(PopError::Malformed { .. }) => self.spare.push(chain),
            }
            if !self.lent.is_empty() {
                ring.unpop();
                return Ok(true);
            }
            counts.rx_guest_faults.fetch_add(1, Relaxed);
            ring.push(head, 0);
        }
        Ok(true)
    }

    fn has_enough(&mut self) -> bool {
        if !self.merges {
            return !self.lent.is_empty();
        }
        let has_enough = self.lent_bytes >= FRAME_BYTES_MAX as u64;
        self.is_generous |= has_enough;
        has_enough
    }

    /// Gives back the buffers that the frame of so many bytes is in, and says in the first how many they are.
    fn give_back(&mut self, ring: &mut Virtqueue, frame_bytes: u64) {
        let mut left_bytes = frame_bytes;
        let mut count: u16 = 0;
        let mut filled = 0;
        for chain in &self.lent {
            count += 1;
            let bytes = segments::len_bytes(&chain.writable);
            filled += chain.writable.len();
            left_bytes = left_bytes.saturating_sub(bytes);
            if left_bytes == 0 {
                break;
            }
        }
        segments::scatter(&self.segments, NUM_BUFFERS_AT, &count.to_le_bytes());
        left_bytes = frame_bytes;
        for _ in 0..count {
            let Some(chain) = self.lent.pop_front() else {
                break;
            };
            let bytes = segments::len_bytes(&chain.writable);
            let written = left_bytes.min(bytes);
            left_bytes -= written;
            self.lent_bytes -= bytes;
            ring.push(chain.head, u32::try_from(written).unwrap_or(u32::MAX));
            self.spare.push(chain);
        }
        self.segments.drain(..filled);
    }
}
