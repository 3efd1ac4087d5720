//! A split virtqueue whose requests have fixed places: slot n always uses the same descriptors.

#![expect(unsafe_code, reason = "shares memory with a device")]

use core::sync::atomic::{Ordering, fence};

use instrument::ring::{DESCRIPTOR_BYTES, Layout, passes};
use instrument::width::low32;

use super::mmio::{QueueAddresses, Transport};
use super::{Error, feature};
use crate::memory::{Buffer, Memory, OutOfMemory};

/// The largest queue that is used: what Firecracker's devices have.
pub const SIZE_MAX: u16 = 256;
/// Descriptors of the longest request: header, data, status.
pub const PARTS_MAX: u16 = 3;

/// The memory of a queue of the largest size, used again whenever its device is set up anew.
#[derive(Debug)]
pub struct QueueMemory {
    rings: Buffer,
    /// One table of [`PARTS_MAX`] descriptors for each slot.
    tables: Buffer,
}

/// A queue that its device has.
#[derive(Debug)]
pub struct Queue {
    /// How many interrupts of its line were acknowledged by those who wait on this queue.
    pub interrupts_seen: u64,
    transport: Transport,
    index: u16,
    layout: Layout,
    base: u64,
    tables: u64,
    indirect: bool,
    event_idx: bool,
    /// The next free entry of the available ring; published by [`Self::kick`].
    avail: u16,
    published: u16,
    /// The next entry of the used ring to look at.
    used: u16,
}

/// One part of a request.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Guest-physical address.
    pub address: u64,
    /// Length.
    pub bytes: u32,
    /// Whether the device writes it.
    pub device_writes: bool,
}

/// A request that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The slot it was submitted in.
    pub slot: u16,
    /// What the device says it wrote.
    pub written_bytes: u32,
}

/// A descriptor, as it lies in memory.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Descriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Length.
    pub bytes: u32,
    /// See [`flag`].
    pub flags: u16,
    /// The next one's index, where there is one.
    pub next: u16,
}

/// Flags of a descriptor (section 2.7.5).
pub mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// "Do not interrupt me", in the available ring; "do not notify me", in the used one.
const NO_EVENTS: u16 = 1;
/// Offset of the index in a ring; the flags are at 0, the entries at 4.
const INDEX_BYTES: usize = 2;
const ENTRIES_BYTES: usize = 4;
const USED_ENTRY_BYTES: usize = 8;

impl QueueMemory {
    /// Memory for one queue, for as long as the guest lives.
    pub fn new(memory: &mut Memory) -> Result<Self, OutOfMemory> {
        let tables_bytes = usize::from(SIZE_MAX) * usize::from(PARTS_MAX) * DESCRIPTOR_BYTES;
        Ok(Self {
            rings: memory.allocate_lasting(Layout::new(SIZE_MAX).total_bytes)?,
            tables: memory.allocate_lasting(tables_bytes)?,
        })
    }
}

impl Queue {
    /// Sets queue `index` up in `memory`, after the negotiation of `features` and before the device starts.
    pub fn new(
        transport: Transport,
        index: u16,
        features: u64,
        memory: &mut QueueMemory,
    ) -> Result<Self, Error> {
        let size_max = transport.queue_size_max(index);
        let size = u16::try_from(size_max).unwrap_or(SIZE_MAX).min(SIZE_MAX);
        if size == 0 {
            return Err(Error::NoQueue { index });
        }
        let layout = Layout::new(1 << size.ilog2());
        memory.rings.bytes_mut().fill(0);
        let queue = Self {
            interrupts_seen: 0,
            transport,
            index,
            layout,
            base: memory.rings.address(),
            tables: memory.tables.address(),
            indirect: features & feature::INDIRECT != 0,
            event_idx: features & feature::EVENT_IDX != 0,
            avail: 0,
            published: 0,
            used: 0,
        };
        queue.silence();
        transport.set_queue(index, layout.size, &queue.addresses());
        Ok(queue)
    }

    /// The device that it belongs to.
    pub const fn transport(&self) -> &Transport {
        &self.transport
    }

    /// How many requests can be in flight.
    pub const fn slots(&self) -> u16 {
        if self.indirect {
            self.layout.size
        } else {
            self.layout.size / PARTS_MAX
        }
    }

    /// Prepares the request of a free slot; the device learns of it at the next [`Self::kick`].
    pub fn submit(&mut self, slot: u16, parts: &[Part]) {
        debug_assert!(slot < self.slots() && parts.len() <= usize::from(PARTS_MAX));
        let first = slot * PARTS_MAX;
        let head = if self.indirect {
            let table = self.tables + u64::from(first) * DESCRIPTOR_BYTES as u64;
            self.fill(table, 0, parts);
            let bytes = low32((parts.len() * DESCRIPTOR_BYTES) as u64);
            self.put(
                self.base,
                slot,
                Descriptor {
                    address: table,
                    bytes,
                    flags: flag::INDIRECT,
                    next: 0,
                },
            );
            slot
        } else {
            self.fill(self.base, first, parts);
            first
        };
        let entry = ENTRIES_BYTES + 2 * usize::from(self.avail % self.layout.size);
        self.write16(self.layout.avail_bytes + entry, head);
        self.avail = self.avail.wrapping_add(1);
    }

    /// Lets the device write the place of a free slot in `buffer`, where each has `bytes`.
    pub fn offer(&mut self, slot: u16, buffer: &Buffer, bytes: u32) {
        let part = Part {
            address: buffer.address() + u64::from(slot) * u64::from(bytes),
            bytes,
            device_writes: true,
        };
        self.submit(slot, &[part]);
    }

    /// Publishes what was submitted and notifies the device if it wants that.
    pub fn kick(&mut self) {
        if self.avail == self.published {
            return;
        }
        // The entries before the index.
        fence(Ordering::Release);
        self.write16(self.layout.avail_bytes + INDEX_BYTES, self.avail);
        // The index before the question whether the device sleeps: one of the two sees the other.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let avail_event =
                self.layout.used_bytes + ENTRIES_BYTES + USED_ENTRY_BYTES * usize::from(self.layout.size);
            passes(self.read16(avail_event), self.avail, self.published)
        } else {
            self.read16(self.layout.used_bytes) & NO_EVENTS == 0
        };
        self.published = self.avail;
        if wanted {
            self.transport.notify(self.index);
        }
    }

    /// The next request that came back, if any.
    pub fn poll(&mut self) -> Result<Option<Used>, Error> {
        if !self.has_used() {
            return Ok(None);
        }
        // The index before the entry, and before the data.
        fence(Ordering::Acquire);
        let entry = self.layout.used_bytes
            + ENTRIES_BYTES
            + USED_ENTRY_BYTES * usize::from(self.used % self.layout.size);
        let (head, written_bytes) = (self.read32(entry), self.read32(entry + 4));
        self.used = self.used.wrapping_add(1);
        if self.event_idx {
            self.silence();
        }
        let scale = if self.indirect { 1 } else { u32::from(PARTS_MAX) };
        match u16::try_from(head / scale) {
            Ok(slot) if head % scale == 0 && slot < self.slots() => Ok(Some(Used { slot, written_bytes })),
            _ => Err(Error::ForeignChain { head }),
        }
    }

    /// Whether a request came back that [`Self::poll`] has not returned yet.
    pub fn has_used(&self) -> bool {
        self.read16(self.layout.used_bytes + INDEX_BYTES) != self.used
    }

    /// Asks for an interrupt when the next request comes back. Look at [`Self::has_used`] afterwards.
    pub fn arm(&self) {
        if self.event_idx {
            self.write16(self.used_event(), self.used);
        } else {
            self.write16(self.layout.avail_bytes, 0);
        }
        // The wish before the look at the used ring: one of the two sees the other.
        fence(Ordering::SeqCst);
    }

    /// Asks for no interrupts.
    pub fn silence(&self) {
        if self.event_idx {
            // The entry that was just seen: the device comes by it after 65536 more.
            self.write16(self.used_event(), self.used.wrapping_sub(1));
        } else {
            self.write16(self.layout.avail_bytes, NO_EVENTS);
        }
    }

    const fn addresses(&self) -> QueueAddresses {
        QueueAddresses {
            descriptors: self.base,
            avail: self.base + self.layout.avail_bytes as u64,
            used: self.base + self.layout.used_bytes as u64,
        }
    }

    const fn used_event(&self) -> usize {
        self.layout.avail_bytes + ENTRIES_BYTES + 2 * self.layout.size as usize
    }

    /// Chains `parts` from entry `first` of `table` on.
    fn fill(&self, table: u64, first: u16, parts: &[Part]) {
        let last = parts.len().saturating_sub(1);
        for ((number, part), index) in parts.iter().enumerate().zip(first..) {
            let more = if number < last { flag::NEXT } else { 0 };
            let flags = more | if part.device_writes { flag::WRITE } else { 0 };
            let descriptor = Descriptor {
                address: part.address,
                bytes: part.bytes,
                flags,
                next: index + 1,
            };
            self.put(table, index, descriptor);
        }
    }

    fn put(&self, table: u64, index: u16, descriptor: Descriptor) {
        let slot = (table as *mut Descriptor).wrapping_add(usize::from(index));
        // SAFETY: slots and parts are bounded, so the entry lies in this queue's table; the device reads it only
        // once it is published, and has given it back.
        unsafe { slot.write_volatile(descriptor) };
    }

    fn read16(&self, offset: usize) -> u16 {
        // SAFETY: the offset lies in the layout, at a multiple of two.
        unsafe { ((self.base as *const u8).wrapping_add(offset).cast::<u16>()).read_volatile() }
    }

    fn read32(&self, offset: usize) -> u32 {
        // SAFETY: the offset lies in the layout, at a multiple of four.
        unsafe { ((self.base as *const u8).wrapping_add(offset).cast::<u32>()).read_volatile() }
    }

    fn write16(&self, offset: usize, value: u16) {
        // SAFETY: the offset lies in the layout, at a multiple of two, in a part that the driver writes.
        unsafe { ((self.base as *mut u8).wrapping_add(offset).cast::<u16>()).write_volatile(value) }
    }
}
