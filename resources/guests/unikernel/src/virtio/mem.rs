//! Memory that comes and goes (virtio 1.2, section 5.15).

use super::mmio::{Kind, Transport};
use super::queue::{Part, Queue, QueueMemory};
use super::{Error, feature};
use crate::cpu;
use crate::machine::Machine;
use crate::memory::Buffer;
use crate::wait::Wait;

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const REQUEST_BYTES: u32 = 24;
const RESPONSE_BYTES: u32 = 10;
/// Where the response lies behind the request.
const RESPONSE_AT: usize = 64;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Blocks are to come.
    Plug = 0,
    /// Blocks go.
    Unplug = 1,
    /// All go.
    UnplugAll = 2,
    /// Whether blocks are there.
    State = 3,
}

/// The type of an answer, and the state that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// One of the constants.
    pub kind: u16,
    /// Of a question for the state.
    pub state: u16,
}

impl Answer {
    pub const ACK: u16 = 0;
    pub const NACK: u16 = 1;
    pub const ERROR: u16 = 3;
    pub const PLUGGED: u16 = 0;
    pub const UNPLUGGED: u16 = 1;
}

/// A device that is set up.
#[derive(Debug)]
pub struct Mem {
    /// Its registers.
    pub transport: Transport,
    queue: Queue,
    buffer: Buffer,
}

/// The fields of the configuration space, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// A block.
    pub block: u64,
    /// Where the region begins.
    pub start: u64,
    /// The region.
    pub region: u64,
    /// What of it can be plugged.
    pub usable: u64,
    /// What is plugged.
    pub plugged: u64,
    /// What is to be plugged.
    pub requested: u64,
}

impl Mem {
    /// Sets the device up. What is plugged stays so.
    pub fn open(machine: &mut Machine) -> Result<Self, Error> {
        let transport = Transport::find(machine.line, Kind::Memory, 0)?;
        let wanted = feature::INDIRECT | feature::EVENT_IDX | UNPLUGGED_INACCESSIBLE;
        let features = transport.negotiate(wanted)?;
        if machine.mem_memory.is_none() {
            machine.mem_memory = Some(QueueMemory::new(&mut machine.memory)?);
        }
        let buffer = machine.memory.allocate(2 * RESPONSE_AT)?;
        let memory = machine.mem_memory.as_mut().expect("it was made above");
        let queue = Queue::new(transport, 0, features, memory)?;
        transport.start();
        Ok(Self {
            transport,
            queue,
            buffer,
        })
    }

    /// What the configuration space says.
    pub fn space(&self) -> Space {
        let field = |number: u64| self.transport.config64(8 * number);
        Space {
            block: field(0),
            start: field(2),
            region: field(3),
            usable: field(4),
            plugged: field(5),
            requested: field(6),
        }
    }

    /// Asks, and returns the answer.
    pub fn ask(&mut self, request: Request, address: u64, blocks: u16, wait: &Wait) -> Result<Answer, Error> {
        let bytes = self.buffer.bytes_mut();
        bytes.fill(0xee);
        let fields = [
            (0, u64::from(request as u16), 8),
            (8, address, 8),
            (16, u64::from(blocks), 8),
        ];
        for (at, value, width) in fields {
            for (byte, source) in bytes.iter_mut().skip(at).zip(value.to_le_bytes()).take(width) {
                *byte = source;
            }
        }
        let address = self.buffer.address();
        let part = |at: usize, bytes, device_writes| Part {
            address: address + at as u64,
            bytes,
            device_writes,
        };
        self.queue.submit(
            0,
            &[
                part(0, REQUEST_BYTES, false),
                part(RESPONSE_AT, RESPONSE_BYTES, true),
            ],
        );
        self.queue.kick();
        let start = cpu::ticks();
        while self.queue.poll()?.is_none() {
            wait.pause(&mut self.queue, start)?;
        }
        let bytes = self.buffer.bytes_mut();
        let half = |at: usize| {
            let byte = |at: usize| bytes.get(RESPONSE_AT + at).copied().map_or(0, u16::from);
            byte(at) | byte(at + 1) << 8
        };
        Ok(Answer {
            kind: half(0),
            state: half(8),
        })
    }
}
