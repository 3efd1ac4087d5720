//! The region, and what requests do to it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::blocks::{BlockState, Blocks};
use super::request::{Request, RequestedRange, Response};
use super::{MemState, Slots};
use crate::complaints::Complaints;
use crate::virtio::state::DeviceStateError;

/// How a region is divided.
#[derive(Clone, Debug)]
pub struct Geometry {
    /// Its blocks.
    pub blocks: Arc<Blocks>,
    /// Bytes of a slot, which is whole blocks; the region is whole slots.
    pub slot_bytes: u64,
}

/// How much there is of what, in bytes (5.15.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) requested: u64,
    /// Only this much of the region may be plugged from: as many slots as what was ever requested fills.
    pub(super) usable: u64,
    pub(super) plugged: u64,
}

/// [`Sizes`], which the API, the driver's registers and its requests change and see.
#[derive(Debug, Default)]
pub(super) struct SharedSizes(Mutex<Sizes>);

impl SharedSizes {
    pub(super) fn lock(&self) -> MutexGuard<'_, Sizes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was done for requests of one kind.
#[derive(Debug, Default)]
pub struct OfRequest {
    /// How many there were.
    pub count: AtomicU64,
    /// How many of them were not done.
    pub fails: AtomicU64,
    /// Microseconds that the shortest took; 0 for none.
    pub min_us: AtomicU64,
    /// Microseconds that the longest took.
    pub max_us: AtomicU64,
    /// Microseconds that all took together.
    pub sum_us: AtomicU64,
}

/// What the device has done, for metrics.
#[derive(Debug, Default)]
pub struct MemCounts {
    /// Requests to plug.
    pub plug: OfRequest,
    /// Bytes that were plugged.
    pub plug_bytes: AtomicU64,
    /// Requests to unplug.
    pub unplug: OfRequest,
    /// Bytes that were unplugged.
    pub unplug_bytes: AtomicU64,
    /// Requests to unplug everything.
    pub unplug_all: OfRequest,
    /// Pieces of what was unplugged that the host did not take back.
    pub discard_fails: AtomicU64,
    /// Requests for the state of blocks.
    pub state: OfRequest,
    /// Requests in all.
    pub requests: AtomicU64,
    /// Requests that made no sense, and rings that broke.
    pub guest_faults: AtomicU64,
}

/// What has come of letting the guest reach slots.
enum Showing {
    Done,
    /// The host has not let it.
    Refused,
    /// It was to stop before.
    Recalled,
}

impl OfRequest {
    fn note(&self, begun: Instant, response: Response) {
        let us = u64::try_from(begun.elapsed().as_micros())
            .unwrap_or(u64::MAX)
            .max(1);
        self.count.fetch_add(1, Relaxed);
        if !matches!(response, Response::Ack | Response::State(_)) {
            self.fails.fetch_add(1, Relaxed);
        }
        // One thread counts.
        let least = match self.min_us.load(Relaxed) {
            0 => us,
            least => least.min(us),
        };
        self.min_us.store(least, Relaxed);
        self.max_us.fetch_max(us, Relaxed);
        self.sum_us.fetch_add(us, Relaxed);
    }
}

/// Memory that goes back to the host at a time, in bytes: so long a stop waits. Whole huge pages.
const PIECE_BYTES: u64 = 16 << 20;

/// What requests change: the blocks, and what the guest reaches.
///
/// ```text
///   UNPLUG ──► not plugged, all at once ──► answered
///                └─► hidden, slot by slot ──► discarded, piece by piece ──► the next request is taken
/// ```
///
/// What follows may take long, so a stop may come between, and then it is gone on with in the next session. No request is ever
/// done in part for that: what is unplugged is unplugged, and one to plug that is recalled is undone. So a request that is taken
/// again is none that has to be known again, and a saved state has nothing of all that: there, what is not plugged is not there.
pub(super) struct Region {
    geometry: Geometry,
    /// How many blocks are plugged of each slot, which may have very many.
    plugged_of: Vec<u64>,
    /// Slots that the guest is to reach no more, none of whose blocks is plugged.
    to_hide: VecDeque<u64>,
    /// What is to be discarded then, in bytes from the beginning of the region.
    to_discard: VecDeque<Range<u64>>,
    slots: Box<dyn Slots>,
    sizes: Arc<SharedSizes>,
    counts: Arc<MemCounts>,
    complaints: Complaints,
}

impl Region {
    pub(super) fn new(
        geometry: Geometry,
        slots: Box<dyn Slots>,
        sizes: Arc<SharedSizes>,
        counts: Arc<MemCounts>,
    ) -> Self {
        assert!(
            geometry.slot_bytes.is_multiple_of(geometry.blocks.block_bytes())
                && geometry.blocks.size_bytes().is_multiple_of(geometry.slot_bytes),
            "slots are whole blocks, and the region is whole slots"
        );
        let count = geometry.blocks.size_bytes() / geometry.slot_bytes;
        Self {
            geometry,
            plugged_of: vec![0; usize_of(count)],
            to_hide: VecDeque::new(),
            to_discard: VecDeque::new(),
            slots,
            sizes,
            counts,
            complaints: Complaints::default(),
        }
    }

    /// Does what a request says, and gives back what there is to be given back until `is_recalled`. Of earlier requests there is
    /// nothing. `None` if it was recalled before it was done; then the request is to be taken again.
    pub(super) fn answer(&mut self, request: Request, is_recalled: &dyn Fn() -> bool) -> Option<Response> {
        let begun = Instant::now();
        let counts = Arc::clone(&self.counts);
        let (response, of_kind) = match request {
            Request::Plug(range) => (self.plug(range, is_recalled)?, &counts.plug),
            Request::Unplug(range) => (self.unplug(range), &counts.unplug),
            Request::UnplugAll => (self.unplug_all(), &counts.unplug_all),
            Request::State(range) => (self.state(range), &counts.state),
        };
        self.give_back(is_recalled);
        counts.requests.fetch_add(1, Relaxed);
        of_kind.note(begun, response);
        Some(response)
    }

    /// Takes what is not plugged from the guest's processors, and gives it back to the host. Says whether all of it is: it may
    /// have been recalled before.
    pub(super) fn give_back(&mut self, is_recalled: &dyn Fn() -> bool) -> bool {
        while let Some(slot) = self.to_hide.front().copied() {
            if is_recalled() {
                return false;
            }
            self.to_hide.pop_front();
            if let Err(error) = self.slots.hide(slot) {
                let what = format_args!("the guest still reaches memory that it has unplugged: {error}");
                self.complaints.complain(what);
            }
        }
        while let Some(range) = self.to_discard.front_mut() {
            if is_recalled() {
                return false;
            }
            let end = range.end.min((range.start / PIECE_BYTES + 1) * PIECE_BYTES);
            let piece = range.start..end;
            range.start = end;
            if range.is_empty() {
                self.to_discard.pop_front();
            }
            if let Err(error) = self.slots.discard(piece) {
                self.counts.discard_fails.fetch_add(1, Relaxed);
                self.complaints.complain(format_args!(
                    "unplugged memory does not go back to the host: {error}"
                ));
            }
        }
        true
    }

    /// The numbers of the blocks that the driver names, if it may name them.
    fn blocks_of(&self, range: RequestedRange) -> Option<Range<u64>> {
        let Geometry { blocks, .. } = &self.geometry;
        let offset = range.address.checked_sub(blocks.start())?;
        let first = offset / blocks.block_bytes();
        let end = first.checked_add(u64::from(range.blocks))?;
        let usable = self.sizes.lock().usable / blocks.block_bytes();
        let is_one = offset.is_multiple_of(blocks.block_bytes()) && first < end && end <= usable;
        is_one.then_some(first..end)
    }

    fn plug(&mut self, range: RequestedRange, is_recalled: &dyn Fn() -> bool) -> Option<Response> {
        let Some(blocks) = self.blocks_of(range) else {
            return Some(Response::Error);
        };
        let map = Arc::clone(&self.geometry.blocks);
        if map.state(blocks.clone()) != BlockState::Unplugged {
            return Some(Response::Error);
        }
        let block_bytes = map.block_bytes();
        let bytes = (blocks.end - blocks.start) * block_bytes;
        let sizes = *self.sizes.lock();
        if sizes.plugged + bytes > sizes.requested {
            return Some(Response::Nack);
        }
        match self.show(self.slots_of(&blocks), is_recalled) {
            Showing::Done => {}
            Showing::Refused => return Some(Response::Busy),
            Showing::Recalled => return None,
        }
        self.set(blocks.clone(), BlockState::Plugged);
        // Afterwards: whoever begins to look at pages drops the marks that are there, and then sees this block or has its mark.
        self.slots
            .came(blocks.start * block_bytes..blocks.end * block_bytes);
        self.sizes.lock().plugged += bytes;
        self.counts.plug_bytes.fetch_add(bytes, Relaxed);
        Some(Response::Ack)
    }

    /// Lets the guest reach those of `slots` that it does not; none of them for long, if one cannot be.
    fn show(&mut self, slots: Range<u64>, is_recalled: &dyn Fn() -> bool) -> Showing {
        let hidden: Vec<u64> = slots.filter(|slot| self.is_empty(*slot)).collect();
        for (done, slot) in hidden.iter().enumerate() {
            let refused = match is_recalled() {
                true => Some(Showing::Recalled),
                false => self.slots.show(*slot).err().map(|error| {
                    let what = format_args!("memory cannot be plugged for now: {error}");
                    self.complaints.complain(what);
                    Showing::Refused
                }),
            };
            if let Some(refused) = refused {
                let slot_bytes = self.geometry.slot_bytes;
                for slot in hidden.iter().take(done) {
                    self.to_hide.push_back(*slot);
                    // A processor may have written there, and KVM does not tell of a slot that is hidden.
                    self.to_discard
                        .push_back(slot * slot_bytes..(slot + 1) * slot_bytes);
                }
                return refused;
            }
        }
        Showing::Done
    }

    fn unplug(&mut self, range: RequestedRange) -> Response {
        let Some(blocks) = self.blocks_of(range) else {
            return Response::Error;
        };
        if self.geometry.blocks.state(blocks.clone()) != BlockState::Plugged {
            return Response::Error;
        }
        self.take_back(blocks);
        Response::Ack
    }

    /// Takes plugged blocks from devices. Processors lose them next, with those slots that have no others, and the host has them.
    fn take_back(&mut self, blocks: Range<u64>) {
        let block_bytes = self.geometry.blocks.block_bytes();
        self.set(blocks.clone(), BlockState::Unplugged);
        let slot_bytes = self.geometry.slot_bytes;
        let mut bytes = blocks.start * block_bytes..blocks.end * block_bytes;
        let unplugged = bytes.end - bytes.start;
        for slot in self.slots_of(&blocks) {
            if self.is_empty(slot) {
                self.to_hide.push_back(slot);
                // What it may have written beside its blocks goes, too.
                bytes = bytes.start.min(slot * slot_bytes)..bytes.end.max((slot + 1) * slot_bytes);
            }
        }
        self.slots.goes(bytes.clone());
        self.to_discard.push_back(bytes);
        self.sizes.lock().plugged -= unplugged;
        self.counts.unplug_bytes.fetch_add(unplugged, Relaxed);
    }

    fn unplug_all(&mut self) -> Response {
        let plugged_of = self.plugged_of.clone();
        self.forget();
        let slot_bytes = self.geometry.slot_bytes;
        for (slot, _) in (0..).zip(plugged_of).filter(|(_, plugged)| *plugged > 0) {
            let bytes = slot * slot_bytes..(slot + 1) * slot_bytes;
            self.slots.goes(bytes.clone());
            self.to_hide.push_back(slot);
            self.to_discard.push_back(bytes);
        }
        let mut sizes = self.sizes.lock();
        self.counts.unplug_bytes.fetch_add(sizes.plugged, Relaxed);
        sizes.plugged = 0;
        // Once nothing is plugged, less may be usable.
        sizes.usable = sizes.requested.next_multiple_of(slot_bytes);
        Response::Ack
    }

    fn state(&self, range: RequestedRange) -> Response {
        match self.blocks_of(range) {
            Some(blocks) => Response::State(self.geometry.blocks.state(blocks)),
            None => Response::Error,
        }
    }

    /// The slots that `blocks` lie in.
    fn slots_of(&self, blocks: &Range<u64>) -> Range<u64> {
        let per_slot = self.blocks_per_slot();
        blocks.start / per_slot..blocks.end.div_ceil(per_slot)
    }

    fn blocks_per_slot(&self) -> u64 {
        self.geometry.slot_bytes / self.geometry.blocks.block_bytes()
    }

    /// Whether no block of `slot` is plugged.
    fn is_empty(&self, slot: u64) -> bool {
        self.plugged_of.get(usize_of(slot)) == Some(&0)
    }

    /// Plugs or unplugs the blocks with these numbers, all of which are not so.
    fn set(&mut self, blocks: Range<u64>, state: BlockState) {
        self.geometry.blocks.set(blocks.clone(), state);
        let per_slot = self.blocks_per_slot();
        for slot in self.slots_of(&blocks) {
            let first = blocks.start.max(slot * per_slot);
            let changed = blocks.end.min((slot + 1) * per_slot) - first;
            let plugged = self.plugged_of.get_mut(usize_of(slot));
            let plugged = plugged.expect("blocks are checked to be in the region");
            match state {
                BlockState::Plugged => *plugged += changed,
                BlockState::Unplugged => *plugged -= changed,
                BlockState::Mixed => unreachable!("a block is plugged or not"),
            }
        }
    }

    /// Counts what is plugged of each slot.
    fn count(&mut self) {
        self.plugged_of.fill(0);
        let Geometry { blocks, slot_bytes } = &self.geometry;
        for mut range in blocks.plugged() {
            while range.start < range.end {
                let slot = range.start / slot_bytes;
                let end = range.end.min((slot + 1) * slot_bytes);
                let plugged = self.plugged_of.get_mut(usize_of(slot));
                *plugged.expect("blocks lie in the region") += (end - range.start) / blocks.block_bytes();
                range.start = end;
            }
        }
    }

    pub(super) fn save(&self) -> MemState {
        let sizes = *self.sizes.lock();
        MemState {
            requested_bytes: sizes.requested,
            usable_bytes: sizes.usable,
            plugged: self.geometry.blocks.save(),
        }
    }

    /// Takes up what [`Self::save`] gave elsewhere, and lets the guest reach what it has plugged.
    pub(super) fn restore(&mut self, state: &MemState) -> Result<(), DeviceStateError> {
        let wrong = DeviceStateError::Memory;
        let Geometry { blocks, slot_bytes } = self.geometry.clone();
        let size = blocks.size_bytes();
        if state.requested_bytes > size || !state.requested_bytes.is_multiple_of(blocks.block_bytes()) {
            return Err(wrong("more is requested of it than there is"));
        }
        let is_usable = state.usable_bytes <= size
            && state.usable_bytes >= state.requested_bytes
            && state.usable_bytes.is_multiple_of(slot_bytes);
        if !is_usable {
            return Err(wrong(
                "more of it is usable than there is, or less than is requested",
            ));
        }
        if !blocks.restore(&state.plugged) {
            return Err(wrong("it has other blocks"));
        }
        let is_beyond = blocks.plugged().any(|range| range.end > state.usable_bytes);
        if is_beyond {
            self.forget();
            return Err(wrong("a block of it is plugged that is not usable"));
        }
        self.count();
        for slot in 0..size / slot_bytes {
            if !self.is_empty(slot)
                && let Err(error) = self.slots.show(slot)
            {
                self.forget();
                let errno = error.raw_os_error().unwrap_or(0);
                return Err(DeviceStateError::Slot { slot, errno });
            }
        }
        *self.sizes.lock() = Sizes {
            requested: state.requested_bytes,
            usable: state.usable_bytes,
            plugged: blocks.plugged_count() * blocks.block_bytes(),
        };
        Ok(())
    }

    /// Takes nothing for plugged.
    fn forget(&mut self) {
        let Geometry { blocks, .. } = &self.geometry;
        let count = blocks.save().len();
        let restored = blocks.restore(&vec![0; count]);
        assert!(restored, "no block is plugged of as many as there are");
        self.count();
    }
}

fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("this is a 64-bit monitor")
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region")
            .field("geometry", &self.geometry)
            .finish_non_exhaustive()
    }
}
