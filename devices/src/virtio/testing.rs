//! The driver's side of a queue, for tests: puts rings and buffers into guest memory and looks at what came back.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{ActiveQueue, Interrupt, Session};
use super::ring::{QueueLayout, Virtqueue};

/// Flag of a descriptor: another follows.
pub(crate) const NEXT: u16 = 1;
/// Flag of a descriptor: the device writes.
pub(crate) const WRITE: u16 = 2;
/// Flag of a descriptor: it holds a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// One piece of a chain to be offered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Piece {
    /// The device reads `len` bytes at the address.
    Readable(u64, u32),
    /// The device writes `len` bytes at the address.
    Writable(u64, u32),
}

/// A session of a device with one queue, which is that of `driver`.
pub(crate) fn session(driver: &DriverRing) -> Session {
    let memory = Arc::clone(driver.memory());
    let eventfd = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let ring = Virtqueue::new(Arc::clone(&memory), driver.layout(), 0).unwrap();
    let queues = vec![Some(ActiveQueue {
        ring,
        kick: eventfd(),
    })];
    Session {
        memory,
        features: 0,
        queues,
        interrupt: Interrupt::new(Arc::default(), eventfd()),
    }
}

/// `len_bytes` of guest memory at address 0.
pub(crate) fn memory(len_bytes: usize) -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len_bytes)]).unwrap())
}

/// A driver that owns one queue, laid out from one address upwards.
pub(crate) struct DriverRing {
    memory: Arc<GuestMemoryMmap>,
    layout: QueueLayout,
    next_descriptor: u16,
    next_avail: u16,
    next_used: u16,
}

impl DriverRing {
    /// Lays out an empty queue of `size` at `base`, which is aligned to 16.
    pub(crate) fn new(memory: &Arc<GuestMemoryMmap>, base: u64, size: u16) -> Self {
        let descriptors = base;
        let avail = descriptors + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let layout = QueueLayout {
            size,
            descriptors,
            avail,
            used,
        };
        let driver = Self {
            memory: Arc::clone(memory),
            layout,
            next_descriptor: 0,
            next_avail: 0,
            next_used: 0,
        };
        let end = used + 6 + 8 * u64::from(size);
        driver.write(base, &vec![0; usize::try_from(end - base).unwrap()]);
        driver
    }

    /// Another look at the same queue, as it is now.
    pub(crate) fn same(&self) -> Self {
        Self {
            memory: Arc::clone(&self.memory),
            ..*self
        }
    }

    /// Where the queue is.
    pub(crate) fn layout(&self) -> QueueLayout {
        self.layout
    }

    /// The memory that it is in.
    pub(crate) fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// Writes guest memory.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Reads guest memory.
    pub(crate) fn read(&self, address: u64, len_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes one descriptor into the table at `table`.
    pub(crate) fn descriptor_at(&self, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        let (address, len_bytes, flags, next) = fields;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len_bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    /// Writes one descriptor into the queue's own table.
    pub(crate) fn descriptor(&self, index: u16, fields: (u64, u32, u16, u16)) {
        self.descriptor_at(self.layout.descriptors, index, fields);
    }

    /// Makes `head` available, whatever it leads to.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.layout.size);
        self.memory
            .store(
                head,
                GuestAddress(self.layout.avail + 4 + 2 * slot),
                Ordering::Relaxed,
            )
            .unwrap();
        self.set_avail_index(self.next_avail.wrapping_add(1));
    }

    /// Writes the available index, whatever it says.
    pub(crate) fn set_avail_index(&mut self, index: u16) {
        self.next_avail = index;
        self.memory
            .store(index, GuestAddress(self.layout.avail + 2), Ordering::SeqCst)
            .unwrap();
    }

    /// Puts a chain into the next free descriptors and makes it available; returns its head.
    pub(crate) fn offer_chain(&mut self, pieces: &[Piece]) -> u16 {
        let size = self.layout.size;
        let head = self.next_descriptor;
        for (at, piece) in pieces.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % size;
            let (address, len_bytes, write) = fields(*piece);
            let next = if at + 1 < pieces.len() { NEXT } else { 0 };
            self.descriptor(index, (address, len_bytes, write | next, self.next_descriptor));
        }
        self.offer(head);
        head
    }

    /// Puts a chain into an indirect table at `table` and makes it available; returns its head.
    pub(crate) fn offer_indirect(&mut self, table: u64, pieces: &[Piece]) -> u16 {
        for (at, piece) in pieces.iter().enumerate() {
            let (address, len_bytes, write) = fields(*piece);
            let next = if at + 1 < pieces.len() { NEXT } else { 0 };
            let at = u16::try_from(at).unwrap();
            self.descriptor_at(table, at, (address, len_bytes, write | next, at + 1));
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.layout.size;
        self.descriptor(
            head,
            (table, u32::try_from(16 * pieces.len()).unwrap(), INDIRECT, 0),
        );
        self.offer(head);
        head
    }

    /// The head that the next chain gets.
    pub(crate) fn next_head(&self) -> u16 {
        self.next_descriptor
    }

    /// How many chains the device has given back in all, modulo 2^16.
    pub(crate) fn used_index(&self) -> u16 {
        self.memory
            .load(GuestAddress(self.layout.used + 2), Ordering::SeqCst)
            .unwrap()
    }

    /// The next chain that came back: its head and how much was written.
    pub(crate) fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.next_used {
            return None;
        }
        let element = self.layout.used + 4 + 8 * u64::from(self.next_used % self.layout.size);
        self.next_used = self.next_used.wrapping_add(1);
        let load = |address| {
            self.memory
                .load::<u32>(GuestAddress(address), Ordering::SeqCst)
                .unwrap()
        };
        Some((load(element), load(element + 4)))
    }

    /// Writes the flags of the available ring.
    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.memory
            .store(flags, GuestAddress(self.layout.avail), Ordering::SeqCst)
            .unwrap();
    }

    /// Reads the flags of the used ring.
    pub(crate) fn used_flags(&self) -> u16 {
        self.memory
            .load(GuestAddress(self.layout.used), Ordering::SeqCst)
            .unwrap()
    }

    /// Asks for an interrupt when the used index passes `index`.
    pub(crate) fn set_used_event(&self, index: u16) {
        let address = self.layout.avail + 4 + 2 * u64::from(self.layout.size);
        self.memory
            .store(index, GuestAddress(address), Ordering::SeqCst)
            .unwrap();
    }

    /// The available index at whose passing the device wants a kick.
    pub(crate) fn avail_event(&self) -> u16 {
        let address = self.layout.used + 4 + 8 * u64::from(self.layout.size);
        self.memory.load(GuestAddress(address), Ordering::SeqCst).unwrap()
    }
}

fn fields(piece: Piece) -> (u64, u32, u16) {
    match piece {
        Piece::Readable(address, len_bytes) => (address, len_bytes, 0),
        Piece::Writable(address, len_bytes) => (address, len_bytes, WRITE),
    }
}
