//! A virtio socket device (virtio 1.2, section 5.10).

use instrument::stream::{DATA_BYTES_MAX, HEADER_BYTES, Packet};
use instrument::width::{low32, size};

use super::mmio::{Kind, Transport};
use super::outbox::{Outbox, PLACES};
use super::queue::{Part, Queue, QueueMemory};
use super::{Error, feature as ring_feature};
use crate::machine::Machine;
use crate::memory::Buffer;
use crate::wait::Wait;

/// A device that is set up.
#[derive(Debug)]
pub struct Vsock {
    /// Its registers.
    pub transport: Transport,
    /// What comes.
    pub receives: Queue,
    transmits: Outbox,
    received: Buffer,
    headers: Buffer,
    data: Buffer,
}

/// The memory of its queues.
#[derive(Debug)]
pub struct VsockMemory([QueueMemory; 3]);

const RECEIVES: u16 = 0;
const TRANSMITS: u16 = 1;
const EVENTS: u16 = 2;
/// What Linux gives: a page for header and data.
const RECEIVE_BYTES: usize = 4096;
const RECEIVES_MAX: u16 = 128;

impl Vsock {
    /// Sets the device up.
    pub fn open(machine: &mut Machine) -> Result<Self, Error> {
        let transport = Transport::find(machine.line, Kind::Vsock, 0)?;
        let features = transport.negotiate(ring_feature::INDIRECT | ring_feature::EVENT_IDX)?;
        let mut memory = match machine.vsock_memory.take() {
            Some(memory) => memory,
            None => VsockMemory([
                QueueMemory::new(&mut machine.memory)?,
                QueueMemory::new(&mut machine.memory)?,
                QueueMemory::new(&mut machine.memory)?,
            ]),
        };
        let VsockMemory([for_receives, for_transmits, for_events]) = &mut memory;
        let receives = Queue::new(transport, RECEIVES, features, for_receives)?;
        let transmits = Queue::new(transport, TRANSMITS, features, for_transmits)?;
        Queue::new(transport, EVENTS, features, for_events)?;
        machine.vsock_memory = Some(memory);
        let mut vsock = Self {
            transport,
            receives,
            transmits: Outbox::new(transmits),
            received: machine
                .memory
                .allocate(usize::from(RECEIVES_MAX) * RECEIVE_BYTES)?,
            headers: machine.memory.allocate(usize::from(PLACES) * HEADER_BYTES)?,
            data: machine.memory.allocate(size(u64::from(DATA_BYTES_MAX)))?,
        };
        transport.start();
        for slot in 0..vsock.receives.slots().min(RECEIVES_MAX) {
            vsock.offer(slot);
        }
        vsock.receives.kick();
        Ok(vsock)
    }

    /// The guest's address.
    pub fn cid(&self) -> u64 {
        self.transport.config64(0)
    }

    fn offer(&mut self, slot: u16) {
        self.receives
            .offer(slot, &self.received, low32(RECEIVE_BYTES as u64));
    }

    /// What has come, if anything, without its data.
    pub fn receive(&mut self) -> Result<Option<Packet>, Error> {
        let Some(used) = self.receives.poll()? else {
            return Ok(None);
        };
        let at = usize::from(used.slot) * RECEIVE_BYTES;
        let packet = Packet::read(self.received.slice_mut(at, HEADER_BYTES));
        self.offer(used.slot);
        Ok(packet)
    }

    /// A place for a packet, if there is one.
    pub fn place_to_send(&mut self) -> Result<Option<u16>, Error> {
        self.transmits.place()
    }

    /// Sends a packet from a free place, with whatever its data are.
    pub fn send(&mut self, place: u16, packet: &Packet) {
        let at = usize::from(place) * HEADER_BYTES;
        self.headers
            .slice_mut(at, HEADER_BYTES)
            .copy_from_slice(&packet.header());
        let header = Part {
            address: self.headers.address() + at as u64,
            bytes: low32(HEADER_BYTES as u64),
            device_writes: false,
        };
        let data = Part {
            address: self.data.address(),
            bytes: packet.data_bytes,
            device_writes: false,
        };
        let parts: &[Part] = if packet.data_bytes > 0 {
            &[header, data]
        } else {
            &[header]
        };
        self.transmits.send(place, parts);
    }

    /// Waits until all that was sent is on its way.
    pub fn flush(&mut self, wait: &Wait) -> Result<(), Error> {
        self.transmits.flush(wait)
    }

    /// Tells the device of all that was sent and given back.
    pub fn kick(&mut self) {
        self.transmits.kick();
        self.receives.kick();
    }
}
