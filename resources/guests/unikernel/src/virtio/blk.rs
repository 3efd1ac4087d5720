//! A virtio block device (virtio 1.2, section 5.2).

#![expect(
    unsafe_code,
    reason = "writes request headers and reads status bytes that it shares with the device"
)]

use instrument::width::low32;

use super::mmio::{Kind, Transport};
use super::queue::{Part, Queue, QueueMemory, SIZE_MAX};
use super::{Error, feature as ring_feature};
use crate::machine::Machine;
use crate::memory::{Buffer, Memory, OutOfMemory};

/// Features of the device (section 5.2.3).
pub mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const GEOMETRY: u64 = 1 << 4;
    pub const READ_ONLY: u64 = 1 << 5;
    pub const BLOCK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MULTI_QUEUE: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// What is agreed to wherever it is offered.
    pub const ALL: u64 = SIZE_MAX
        | SEG_MAX
        | GEOMETRY
        | READ_ONLY
        | BLOCK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MULTI_QUEUE
        | DISCARD
        | WRITE_ZEROES;
}

/// Types of requests (section 5.2.6).
pub mod kind {
    pub const READ: u32 = 0;
    pub const WRITE: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const IDENTITY: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Offsets in the configuration space (section 5.2.4).
pub mod config {
    pub const SIZE_MAX: u64 = 8;
    pub const SEG_MAX: u64 = 12;
    pub const BLOCK_SIZE: u64 = 20;
    pub const WRITEBACK: u64 = 32;
    pub const QUEUES: u64 = 34;
    pub const DISCARD_SECTORS_MAX: u64 = 36;
    pub const WRITE_ZEROES_SECTORS_MAX: u64 = 48;
}

/// What a device answered (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u8);

impl Status {
    pub const OK: Self = Self(0);
    pub const IO_ERROR: Self = Self(1);
    pub const UNSUPPORTED: Self = Self(2);
    /// What the status byte holds until the device writes it.
    const UNWRITTEN: Self = Self(0xff);
}

/// How a device is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Which block device.
    pub index: u64,
    /// Features of the rings that are agreed to if offered.
    pub ring_features: u64,
    /// Queues.
    pub queues: u16,
}

impl Setup {
    /// Block device `index` with one queue and everything that it offers.
    pub const fn of(index: u64) -> Self {
        Self {
            index,
            ring_features: ring_feature::INDIRECT | ring_feature::EVENT_IDX,
            queues: 1,
        }
    }
}

/// A block device that is set up. It stays so from command to command.
#[derive(Debug)]
pub struct Disk {
    /// How it was set up.
    pub setup: Setup,
    /// Its registers.
    pub transport: Transport,
    /// What was agreed.
    pub features: u64,
    /// Size in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// One lane for each queue.
    pub lanes: [Option<Lane>; QUEUES_MAX],
}

/// A disk's memory, which outlives each time that it is set up.
#[derive(Debug)]
pub struct DiskMemory {
    queues: [Option<(QueueMemory, Buffer)>; QUEUES_MAX],
}

/// The requests of one queue.
#[derive(Debug)]
pub struct Lane {
    /// The queue, for those who wait on it.
    pub queue: Queue,
    /// For each slot, [`Envelope`].
    envelopes: u64,
    in_flight: u16,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// See [`kind`].
    pub kind: u32,
    /// The first sector, where the kind has one.
    pub sector: u64,
    /// Data, if any.
    pub data: Option<Part>,
}

/// A request that came back.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// The slot it was submitted in.
    pub slot: u16,
    /// The device's answer.
    pub status: Status,
}

/// Block devices that can be set up at the same time.
pub const DISKS_MAX: usize = 8;
/// Queues of a device that can be used.
pub const QUEUES_MAX: usize = 8;
/// Requests that one queue can have in flight.
pub const SLOTS_MAX: usize = SIZE_MAX as usize;

/// What surrounds a request's data.
#[repr(C)]
struct Envelope {
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
    padding: [u8; 15],
}

const HEADER_BYTES: u32 = 16;
const STATUS_OFFSET_BYTES: u64 = 16;

/// Where the configuration space has the capacity (virtio 1.2, 5.2.4).
const CAPACITY: u64 = 0;

impl Disk {
    /// Reads the capacity again: the device may have grown.
    pub fn measure(&mut self) {
        self.capacity_sectors = self.transport.config64(CAPACITY);
    }

    /// Sets the device up as `setup` says. What was in flight is forgotten.
    pub fn open(machine: &mut Machine, setup: Setup) -> Result<Self, Error> {
        let transport = Transport::find(machine.line, Kind::Block, setup.index)?;
        let features = transport.negotiate(feature::ALL | setup.ring_features)?;
        let place = usize::try_from(setup.index)
            .ok()
            .and_then(|index| machine.disk_memory.get_mut(index));
        let Some(place) = place else {
            return Err(Error::NoDevice {
                kind: "usable block",
                index: setup.index,
            });
        };
        let mut lanes = [const { None }; QUEUES_MAX];
        for ((index, lane), place) in (0..setup.queues).zip(&mut lanes).zip(&mut place.queues) {
            *lane = Some(Lane::new(transport, index, features, place, &mut machine.memory)?);
        }
        transport.start();
        Ok(Self {
            setup,
            transport,
            features,
            capacity_sectors: transport.config64(CAPACITY),
            lanes,
        })
    }

    /// Whether a feature was agreed on.
    pub const fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// The first queue, which every device has.
    pub fn lane(&mut self) -> Result<&mut Lane, Error> {
        self.lanes
            .first_mut()
            .and_then(Option::as_mut)
            .ok_or(Error::NoQueue { index: 0 })
    }
}

impl DiskMemory {
    /// No memory yet.
    pub const EMPTY: Self = Self {
        queues: [const { None }; QUEUES_MAX],
    };
}

impl Lane {
    fn new(
        transport: Transport,
        index: u16,
        features: u64,
        place: &mut Option<(QueueMemory, Buffer)>,
        memory: &mut Memory,
    ) -> Result<Self, Error> {
        if place.is_none() {
            *place = Some(Self::memory(memory)?);
        }
        let (queue_memory, envelopes) = place.as_mut().expect("it was made above where it was missing");
        let queue = Queue::new(transport, index, features, queue_memory)?;
        Ok(Self {
            queue,
            envelopes: envelopes.address(),
            in_flight: 0,
        })
    }

    fn memory(memory: &mut Memory) -> Result<(QueueMemory, Buffer), OutOfMemory> {
        let envelopes = memory.allocate_lasting(usize::from(SIZE_MAX) * size_of::<Envelope>())?;
        Ok((QueueMemory::new(memory)?, envelopes))
    }

    /// How many requests are with the device.
    pub const fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Prepares a request in a free slot; the device learns of it at the next kick of the queue.
    pub fn submit(&mut self, slot: u16, request: &Request) {
        let envelope = (self.envelopes as *mut Envelope).wrapping_add(usize::from(slot));
        let filled = Envelope {
            kind: request.kind,
            reserved: 0,
            sector: request.sector,
            status: Status::UNWRITTEN.0,
            padding: [0; 15],
        };
        // SAFETY: there is an envelope for every slot of the largest queue, and the device has given this one back.
        unsafe { envelope.write_volatile(filled) };
        let address = envelope.addr() as u64;
        let header = Part {
            address,
            bytes: HEADER_BYTES,
            device_writes: false,
        };
        let status = Part {
            address: address + STATUS_OFFSET_BYTES,
            bytes: 1,
            device_writes: true,
        };
        match request.data {
            Some(data) => self.queue.submit(slot, &[header, data, status]),
            None => self.queue.submit(slot, &[header, status]),
        }
        self.in_flight += 1;
    }

    /// The next request that came back, if any.
    pub fn poll(&mut self) -> Result<Option<Finished>, Error> {
        let Some(used) = self.queue.poll()? else {
            return Ok(None);
        };
        if self.in_flight == 0 {
            return Err(Error::ForeignChain {
                head: u32::from(used.slot),
            });
        }
        self.in_flight -= 1;
        let status = (self.envelopes as *const Envelope).wrapping_add(usize::from(used.slot));
        let status = status.cast::<u8>().wrapping_add(16);
        // SAFETY: the envelope of a slot below the queue's size; the device has given it back.
        let status = Status(unsafe { status.read_volatile() });
        Ok(Some(Finished {
            slot: used.slot,
            status,
        }))
    }
}

/// A part of a buffer as the data of a request.
pub fn data(address: u64, bytes: u64, device_writes: bool) -> Part {
    Part {
        address,
        bytes: low32(bytes),
        device_writes,
    }
}
