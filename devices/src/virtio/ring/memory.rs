//! Guest addresses to addresses of this process: the unsafe core of a virtqueue.
#![expect(
    unsafe_code,
    reason = "turns checked guest ranges into references and segments"
)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use coracle_storage::request::Segment;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::virtio::mem::Blocks;

/// What may be looked at in memory that the guest changes meanwhile.
///
/// # Safety
///
/// Any bit pattern is a value, and access through a shared reference is atomic.
pub(super) unsafe trait Cell {}

// SAFETY: an atomic integer has no invalid values, and is accessed atomically.
unsafe impl Cell for AtomicU8 {}
// SAFETY: as above.
unsafe impl Cell for AtomicU16 {}
// SAFETY: as above.
unsafe impl Cell for AtomicU32 {}
// SAFETY: as above.
unsafe impl Cell for AtomicU64 {}

/// The guest's memory with each region's host address at hand, so that a translation is a
/// comparison and an addition.
#[derive(Debug)]
pub(super) struct Map {
    regions: Box<[Region]>,
    /// Of the region that they are of, what is memory.
    blocks: Option<Arc<Blocks>>,
    memory: Arc<GuestMemoryMmap>,
}

#[derive(Debug)]
struct Region {
    start: u64,
    len_bytes: u64,
    host: *mut u8,
}

// SAFETY: the pointers lead to a mapping that is shared with the guest anyway and that `memory`
// keeps; nothing about them belongs to one thread.
unsafe impl Send for Map {}

impl Map {
    pub(super) fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        let regions = memory
            .iter()
            .map(|region| Region {
                start: region.start_addr().raw_value(),
                len_bytes: region.len(),
                host: region.as_ptr(),
            })
            .collect();
        Self {
            regions,
            blocks: None,
            memory,
        }
    }

    /// From now on what is not plugged of `blocks` is no memory.
    pub(super) fn restrict(&mut self, blocks: Arc<Blocks>) {
        self.blocks = Some(blocks);
    }

    /// The host address of `address`, and how many bytes from there lie in the same region; or at least as many as are wanted.
    #[inline]
    fn locate(&self, address: u64, wanted_bytes: u64) -> Option<(NonNull<u8>, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = address.wrapping_sub(region.start);
            if offset >= region.len_bytes {
                return None;
            }
            let host = region.host.wrapping_add(usize::try_from(offset).ok()?);
            let room_bytes = match &self.blocks {
                Some(blocks) if blocks.start() == region.start => blocks.plugged_from(offset, wanted_bytes),
                _ => region.len_bytes - offset,
            };
            Some((NonNull::new(host)?, room_bytes)).filter(|_| room_bytes > 0)
        })
    }

    /// `count` cells at `address`; `None` unless they are aligned and lie wholly inside one region.
    pub(super) fn cells<T: Cell>(&self, address: u64, count: usize) -> Option<&[T]> {
        let len_bytes = u64::try_from(count.checked_mul(size_of::<T>())?).ok()?;
        let (host, room_bytes) = self.locate(address, len_bytes)?;
        let cells = host.cast::<T>();
        if len_bytes > room_bytes || !cells.is_aligned() {
            return None;
        }
        // SAFETY: the range lies inside one mapping, which `self.memory` keeps for as long as the
        // borrow lasts, the pointer is aligned, and cells have no invalid value and are atomic.
        Some(unsafe { NonNull::slice_from_raw_parts(cells, count).as_ref() })
    }

    /// As [`Self::cells`], for as long as the caller likes: the area keeps the memory.
    pub(super) fn area<T: Cell>(&self, address: u64, count: usize) -> Option<Area<T>> {
        let cells = NonNull::from(self.cells::<T>(address, count)?);
        Some(Area {
            cells,
            _memory: Arc::clone(&self.memory),
        })
    }

    /// Appends `len_bytes` at `address` to `segments`, one segment for each region touched.
    ///
    /// # Errors
    ///
    /// The first address that is not memory.
    #[inline]
    pub(super) fn append(
        &self,
        address: u64,
        len_bytes: u32,
        segments: &mut Vec<Segment>,
    ) -> Result<(), u64> {
        let (mut address, mut left_bytes) = (address, u64::from(len_bytes));
        while left_bytes > 0 {
            let (host, room_bytes) = self.locate(address, left_bytes).ok_or(address)?;
            let piece_bytes = left_bytes.min(room_bytes);
            let len = usize::try_from(piece_bytes).map_err(|_| address)?;
            // SAFETY: the range lies inside one mapping. A queue's session holds the memory, and a
            // device gives its session back only when no request is in flight.
            segments.push(unsafe { Segment::new(host, len) });
            left_bytes -= piece_bytes;
            // Wraps only at the very end of the address space; guest memory does not reach it.
            address = address.wrapping_add(piece_bytes);
        }
        Ok(())
    }
}

/// Cells of guest memory, and the memory with them.
#[derive(Debug)]
pub(super) struct Area<T> {
    cells: NonNull<[T]>,
    _memory: Arc<GuestMemoryMmap>,
}

// SAFETY: shared references to atomics may be used from any thread.
unsafe impl<T: Cell + Sync> Send for Area<T> {}

impl<T: Cell> Area<T> {
    #[inline]
    pub(super) fn cells(&self) -> &[T] {
        // SAFETY: made from a valid slice, whose mapping the Arc beside it keeps.
        unsafe { self.cells.as_ref() }
    }

    /// The cell at `index`, which the caller has kept below the count that it asked for.
    #[inline]
    pub(super) fn at(&self, index: usize) -> &T {
        self.cells()
            .get(index)
            .expect("ring positions are masked by the size that made the area")
    }
}
