//! A virtio pmem device (virtio 1.2, section 5.19).

use super::mmio::{Kind, Transport};
use super::queue::{Part, Queue, QueueMemory};
use super::{Error, feature};
use crate::cpu;
use crate::machine::Machine;
use crate::memory::{Buffer, Region};
use crate::wait::Wait;

/// Persistent memory that is set up.
#[derive(Debug)]
pub struct Pmem {
    /// Its registers.
    pub transport: Transport,
    /// Where it is.
    pub region: Region,
    queue: Queue,
    /// A request and its answer.
    buffer: Buffer,
}

/// Devices that can be used.
pub const DEVICES_MAX: usize = 2;
/// VIRTIO_PMEM_REQ_TYPE_FLUSH, and the answer to one that was carried out.
const FLUSH: u32 = 0;
pub const DONE: u32 = 0;
/// What no device answers.
const UNANSWERED: u32 = 0x5555_5555;
const REQUEST_BYTES: u32 = 4;
const ANSWER_OFFSET: usize = 8;

impl Pmem {
    /// Sets device `index` up, and maps what it has.
    pub fn open(machine: &mut Machine, index: u64) -> Result<Self, Error> {
        let transport = Transport::find(machine.line, Kind::Pmem, index)?;
        let features = transport.negotiate(feature::INDIRECT | feature::EVENT_IDX)?;
        let region = Region {
            base: transport.config64(0),
            end: transport.config64(0).saturating_add(transport.config64(8)),
        };
        machine.memory.map(region)?;
        let place = usize::try_from(index)
            .ok()
            .and_then(|index| machine.pmem_memory.get_mut(index));
        let Some(place) = place else {
            return Err(Error::NoDevice {
                kind: "usable pmem",
                index,
            });
        };
        if place.is_none() {
            *place = Some(QueueMemory::new(&mut machine.memory)?);
        }
        let memory = place.as_mut().expect("it was made above where it was missing");
        let queue = Queue::new(transport, 0, features, memory)?;
        transport.start();
        let buffer = machine.memory.allocate(64)?;
        Ok(Self {
            transport,
            region,
            queue,
            buffer,
        })
    }

    /// Has what was stored reach the medium; returns the device's answer.
    pub fn flush(&mut self, wait: &Wait) -> Result<u32, Error> {
        let words: &mut [u8] = self.buffer.bytes_mut();
        words.fill(0);
        if let Some(kind) = words.first_chunk_mut() {
            *kind = FLUSH.to_le_bytes();
        }
        if let Some(answer) = words.get_mut(ANSWER_OFFSET..).and_then(<[u8]>::first_chunk_mut) {
            *answer = UNANSWERED.to_le_bytes();
        }
        let request = self.buffer.address();
        let parts =
            [(request, false), (request + ANSWER_OFFSET as u64, true)].map(|(address, device_writes)| Part {
                address,
                bytes: REQUEST_BYTES,
                device_writes,
            });
        self.queue.submit(0, &parts);
        self.queue.kick();
        let start = cpu::ticks();
        while self.queue.poll()?.is_none() {
            wait.pause(&mut self.queue, start)?;
        }
        let answer = self
            .buffer
            .bytes_mut()
            .get(ANSWER_OFFSET..)
            .and_then(<[u8]>::first_chunk);
        Ok(answer.map_or(UNANSWERED, |answer| u32::from_le_bytes(*answer)))
    }
}
