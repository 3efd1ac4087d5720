//! A device under assault: registers and rings as no driver would use them.

#![expect(unsafe_code, reason = "writes rings and descriptors that no driver would")]

use instrument::garbage::{Chunk, Garbage, LETTERS_BYTES, Sandbox, TABLES_BYTES};
use instrument::width::{low8, low16, low32, size};

use super::ports;
use crate::virtio::blk::kind;
use crate::virtio::feature;
use crate::virtio::mmio::{Kind, QueueAddresses, Transport, register, status};
use crate::virtio::queue::{Descriptor, flag};

/// A device under assault.
pub struct Assault {
    transport: Transport,
    device: Kind,
    garbage: Garbage,
    sandbox: Sandbox,
    queues: [Target; QUEUES],
    /// Register accesses, rounds of rings and ports so far.
    pub operations: u64,
    /// Resets so far.
    pub resets: u64,
}

/// A queue as the device was told of it.
#[derive(Clone, Copy, Default)]
struct Target {
    size: u16,
    table: u64,
    avail: u64,
    avail_index: u16,
}

/// Queues that are set up: fewer exist.
const QUEUES: usize = 6;
/// Where memory comes to a small machine, and a block of it.
const REGION_START: u64 = 4 << 30;
const REGION_BLOCK_BYTES: u64 = 2 << 20;
/// Of the letters, what a balloon takes for lists of pages: no ring is among them.
const PAGE_LISTS_BYTES: u64 = LETTERS_BYTES / 2;
/// Operations of one kind before another has its turn.
const BATCH: u64 = 64;
/// Registers that mean something, for half of the blind writes.
const KNOWN_REGISTERS: [u64; 16] = [
    register::DEVICE_FEATURES_SELECT,
    register::DRIVER_FEATURES,
    register::DRIVER_FEATURES_SELECT,
    register::QUEUE_SELECT,
    register::QUEUE_SIZE,
    register::QUEUE_READY,
    register::QUEUE_NOTIFY,
    register::INTERRUPT_ACK,
    register::STATUS,
    register::QUEUE_DESCRIPTORS,
    register::QUEUE_DESCRIPTORS + 4,
    register::QUEUE_AVAIL,
    register::QUEUE_USED,
    register::QUEUE_USED + 4,
    register::CONFIG,
    register::CONFIG + 32,
];
/// Types of requests that devices know, for half of the headers.
const KNOWN_KINDS: [u32; 6] = [
    kind::READ,
    kind::WRITE,
    kind::FLUSH,
    kind::IDENTITY,
    kind::DISCARD,
    kind::WRITE_ZEROES,
];

impl Assault {
    /// The assault of `seed`. The sandbox belongs to it.
    pub fn new(transport: Transport, device: Kind, seed: u64, sandbox: Sandbox) -> Self {
        let mut garbage = Garbage::new(seed, sandbox);
        // Zero to begin with: what earlier commands left behind could pass for descriptors.
        for address in (sandbox.letters..sandbox.end).step_by(8) {
            // SAFETY: the sandbox was taken out of free memory.
            unsafe { (address as *mut u64).write_volatile(0) };
        }
        let queues = [Target {
            table: garbage.table(),
            ..Target::default()
        }; QUEUES];
        Self {
            transport,
            device,
            garbage,
            sandbox,
            queues,
            operations: 0,
            resets: 0,
        }
    }

    /// Some operations of one kind.
    pub fn step(&mut self) {
        if self.garbage.once_in(3) {
            self.blind();
        } else {
            self.informed();
        }
    }

    /// Now and then, garbage on I/O ports.
    pub fn flood_ports(&mut self) {
        if self.garbage.once_in(4) {
            self.operations += ports::flood(&mut self.garbage);
        }
    }

    /// Reads and writes registers of all widths at all offsets.
    fn blind(&mut self) {
        for _ in 0..BATCH {
            let offset = if self.garbage.once_in(2) {
                self.pick(&KNOWN_REGISTERS)
            } else {
                self.garbage.below(self.transport.window_bytes - 8)
            };
            self.operations += 1;
            if self.garbage.once_in(3) {
                self.read(offset);
            } else {
                self.write(offset);
            }
        }
    }

    fn read(&mut self, offset: u64) {
        let registers = self.transport.registers();
        let _ = match self.garbage.below(8) {
            0 => u64::from(registers.read8(offset)),
            1 => u64::from(registers.read16(offset)),
            2 => registers.read64(offset),
            _ => u64::from(registers.read32(offset)),
        };
    }

    fn write(&mut self, offset: u64) {
        let registers = self.transport.registers();
        let value = self.value_for(offset);
        match self.garbage.below(8) {
            0 => registers.write8(offset, low8(value)),
            1 => registers.write16(offset, low16(value)),
            2 if !is_address(offset) => registers.write64(offset, value),
            _ => registers.write32(offset, low32(value)),
        }
    }

    /// What to write: halves of addresses must not add up to an address in the guest's own memory.
    fn value_for(&mut self, offset: u64) -> u64 {
        match offset & !3 {
            offset if !is_address(offset) => self.garbage.value(),
            offset if offset & 4 != 0 => self.garbage.any() | 0x1000,
            register::QUEUE_DESCRIPTORS if self.garbage.once_in(2) => {
                self.queues.first().map_or(0, |queue| queue.table)
            }
            register::QUEUE_USED if self.garbage.once_in(2) => {
                self.sandbox.scribble + self.garbage.below(4096)
            }
            _ => self.garbage.any() | 0xc000_0000,
        }
    }

    /// Sets the device up as a driver would, more or less, then fills its rings with nonsense.
    fn informed(&mut self) {
        self.bring_up();
        for _ in 0..self.garbage.below(4 * BATCH) {
            self.operations += 1;
            let number = size(self.garbage.below(QUEUES as u64));
            let Some(mut queue) = self.queues.get(number).copied() else {
                continue;
            };
            for _ in 0..self.garbage.below(6) {
                self.put_descriptor(&queue);
                self.put_letter();
            }
            self.put_heads(&mut queue);
            if let Some(place) = self.queues.get_mut(number) {
                *place = queue;
            }
            let index = if self.garbage.once_in(16) {
                low32(self.garbage.value())
            } else {
                low32(number as u64)
            };
            self.transport.registers().write32(register::QUEUE_NOTIFY, index);
            if self.garbage.once_in(16) {
                let offset = self.pick(&KNOWN_REGISTERS);
                self.write(offset);
            }
        }
    }

    fn bring_up(&mut self) {
        let registers = self.transport.registers();
        registers.write32(register::STATUS, 0);
        self.resets += 1;
        let mut state = status::ACKNOWLEDGE | status::DRIVER;
        registers.write32(register::STATUS, state);
        let mask = if self.garbage.once_in(2) {
            u64::MAX
        } else {
            self.garbage.any()
        };
        let mut features = self.transport.offered() & mask | feature::VERSION_1;
        if self.garbage.once_in(8) {
            features = self.garbage.value();
        }
        for (select, half) in [(0, low32(features)), (1, low32(features >> 32))] {
            registers.write32(register::DRIVER_FEATURES_SELECT, select);
            registers.write32(register::DRIVER_FEATURES, half);
        }
        if !self.garbage.once_in(16) {
            state |= status::FEATURES_OK;
            registers.write32(register::STATUS, state);
        }
        for index in 0..QUEUES {
            self.bring_up_queue(index);
        }
        if !self.garbage.once_in(16) {
            registers.write32(register::STATUS, state | status::DRIVER_OK);
        }
        self.operations += 1;
    }

    fn bring_up_queue(&mut self, index: usize) {
        let size_max = low16(u64::from(self.transport.queue_size_max(low16(index as u64))));
        let size = match self.garbage.below(4) {
            0 => low16(self.garbage.value()),
            1 => 1 << self.garbage.below(9),
            _ => size_max,
        };
        let mut avail = self.garbage.letter() & !u64::from(!self.garbage.once_in(16));
        if self.device == Kind::Balloon {
            avail = avail.max(self.sandbox.letters + PAGE_LISTS_BYTES);
        }
        let table = self.garbage.table();
        let addresses = QueueAddresses {
            descriptors: table,
            avail,
            used: self.garbage.used_ring() & !3,
        };
        self.transport.set_queue(low16(index as u64), size, &addresses);
        if let Some(place) = self.queues.get_mut(index) {
            *place = Target {
                size: size.min(256),
                table,
                avail,
                avail_index: 0,
            };
        }
    }

    fn put_descriptor(&mut self, queue: &Target) {
        let Chunk {
            address,
            bytes,
            flags,
            next,
        } = self.garbage.chunk(queue.size);
        let is_read = flags & (flag::WRITE | flag::INDIRECT) == 0;
        let (address, bytes) = if self.device == Kind::Balloon && is_read {
            self.page_list(address, bytes)
        } else {
            (address, bytes)
        };
        let descriptor = Descriptor {
            address,
            bytes,
            flags,
            next,
        };
        // Half of them where the queue looks first, the others where indirect tables may lie.
        let place = if self.garbage.once_in(2) {
            queue
                .table
                .wrapping_add(16 * self.garbage.below(u64::from(queue.size.max(1))))
        } else {
            self.sandbox.tables + 16 * self.garbage.below(TABLES_BYTES / 16)
        };
        if place >= self.sandbox.tables && place <= self.sandbox.tables + TABLES_BYTES - 16 {
            // SAFETY: among the tables of the sandbox, at a multiple of 16.
            unsafe { (place as *mut Descriptor).write_volatile(descriptor) };
        }
    }

    /// A request header, or what may pass for one.
    fn put_letter(&mut self) {
        let letter = self.letter();
        let bytes = if self.device == Kind::Balloon {
            PAGE_LISTS_BYTES
        } else {
            LETTERS_BYTES
        };
        let place = self.sandbox.letters + 16 * self.garbage.below(bytes / 16);
        // SAFETY: among the letters of the sandbox, at a multiple of 16.
        unsafe { (place as *mut [u64; 2]).write_volatile(letter) };
    }

    fn letter(&mut self) -> [u64; 2] {
        match self.device {
            Kind::Block | Kind::Entropy | Kind::Pmem => self.block_letter(),
            Kind::Balloon => [self.pages(), self.pages()],
            Kind::Memory => self.blocks(),
            Kind::Network | Kind::Vsock => [self.small(), self.small()],
        }
    }

    /// The same for a balloon, which takes what it reads there for numbers of pages: where it finds any, they are harmless ones.
    fn page_list(&mut self, address: u64, bytes: u32) -> (u64, u32) {
        if address >= self.sandbox.end {
            return (address, bytes);
        }
        let at = 4 * self.garbage.below(PAGE_LISTS_BYTES / 4);
        let left = low32(PAGE_LISTS_BYTES - at);
        (self.sandbox.letters + at, bytes.min(left))
    }

    /// A request for blocks of a region at 4 GiB, of which the next letter tells the number.
    fn blocks(&mut self) -> [u64; 2] {
        let kind = self.garbage.below(5);
        let offset = self.garbage.below(80) * REGION_BLOCK_BYTES;
        let address = if self.garbage.once_in(4) {
            self.garbage.value()
        } else {
            REGION_START + offset
        };
        [kind, address]
    }

    /// Two numbers of pages, of the sandbox or of no RAM: a device that is told of others takes them from the guest.
    fn pages(&mut self) -> u64 {
        let first = (self.sandbox.scribble >> 12) + 1;
        let page = first + self.garbage.below((self.sandbox.end >> 12) - first);
        let far = 0xf000_0000 | self.garbage.below(1 << 28);
        match self.garbage.below(3) {
            0 => page << 32 | page,
            1 => far << 32 | page,
            _ => far << 32 | far,
        }
    }

    /// Eight bytes of a header: half of them of small fields that mean something.
    fn small(&mut self) -> u64 {
        if self.garbage.once_in(2) {
            return self.garbage.value();
        }
        (0..4).fold(0, |word, _| word << 16 | self.garbage.below(20))
    }

    fn block_letter(&mut self) -> [u64; 2] {
        let kind = if self.garbage.once_in(2) {
            self.pick(&KNOWN_KINDS)
        } else {
            low32(self.garbage.value())
        };
        let sector = if self.garbage.once_in(4) {
            self.garbage.value()
        } else {
            self.garbage.below(4096)
        };
        [u64::from(kind), sector]
    }

    /// Entries of the available ring, its flags, and an index that need not follow from them.
    fn put_heads(&mut self, queue: &mut Target) {
        let count = low16(self.garbage.below(5));
        for step in 0..count {
            let entry = u64::from(queue.avail_index.wrapping_add(step) % queue.size.max(1));
            let any = if self.garbage.once_in(16) {
                u64::from(u16::MAX)
            } else {
                u64::from(queue.size.max(1))
            };
            let head = low16(self.garbage.below(any));
            self.put16(queue.avail + 4 + 2 * entry, head);
        }
        let jump = if self.garbage.once_in(16) {
            low16(self.garbage.value())
        } else {
            count
        };
        queue.avail_index = queue.avail_index.wrapping_add(jump);
        self.put16(queue.avail + 2, queue.avail_index);
        if self.garbage.once_in(8) {
            let value = low16(self.garbage.value());
            let place = if self.garbage.once_in(2) {
                0
            } else {
                4 + 2 * u64::from(queue.size)
            };
            self.put16(queue.avail + place, value);
        }
    }

    fn put16(&self, address: u64, value: u16) {
        if address >= self.sandbox.letters && address + 2 <= self.sandbox.tables {
            // SAFETY: among the letters of the sandbox; x86 writes at any alignment.
            unsafe { (address as *mut u16).write_unaligned(value) };
        }
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        let index = size(self.garbage.below(choices.len() as u64));
        *choices
            .get(index)
            .expect("the index is below the length, which is not 0")
    }
}

/// Whether a register is half of a queue's address.
const fn is_address(offset: u64) -> bool {
    offset + 8 > register::QUEUE_DESCRIPTORS && offset < register::QUEUE_USED + 8
}
