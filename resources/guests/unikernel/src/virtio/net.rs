//! A virtio network interface (virtio 1.2, section 5.1).

use instrument::packet::{CHECKSUM_AT, Mac, TCP_AT};
use instrument::width::{low8, low32, size};

use super::mmio::{Kind, Transport};
use super::outbox::{Outbox, PLACES};
use super::queue::{Part, Queue, QueueMemory, SIZE_MAX};
use super::{Error, feature as ring_feature};
use crate::machine::Machine;
use crate::memory::Buffer;
use crate::wait::Wait;

/// An interface that is set up.
#[derive(Debug)]
pub struct Net {
    /// Its registers.
    pub transport: Transport,
    /// What comes.
    pub receives: Queue,
    /// The features agreed on.
    pub features: u64,
    transmits: Outbox,
    /// [`RECEIVE_BYTES`] for each slot.
    received: Buffer,
    /// [`TRANSMIT_BYTES`] for each slot.
    transmitted: Buffer,
}

/// The memory of an interface's queues.
#[derive(Debug)]
pub struct NetMemory {
    receives: QueueMemory,
    transmits: QueueMemory,
}

/// Something that came: its slots are the device's again after [`Net::give_back`].
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    slot: u16,
    /// Bytes in the first slot.
    bytes: usize,
}

/// Interfaces that can be used.
pub const INTERFACES_MAX: usize = 2;

/// Bits of the feature word (section 5.1.3).
pub mod feature {
    /// VIRTIO_NET_F_CSUM.
    pub const CHECKSUM: u64 = 1;
    /// VIRTIO_NET_F_GUEST_CSUM.
    pub const GUEST_CHECKSUM: u64 = 1 << 1;
    /// VIRTIO_NET_F_MAC.
    pub const MAC: u64 = 1 << 5;
    /// VIRTIO_NET_F_GUEST_TSO4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// VIRTIO_NET_F_HOST_TSO4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// VIRTIO_NET_F_MRG_RXBUF.
    pub const MERGEABLE: u64 = 1 << 15;
}

const RECEIVES: u16 = 0;
const TRANSMITS: u16 = 1;
/// What a driver with mergeable buffers gives: a page.
const RECEIVE_BYTES: usize = 4096;
/// The largest segment that a device cuts, with its headers.
const TRANSMIT_BYTES: usize = 65536 + 4096;
/// `struct virtio_net_hdr` of virtio 1.
const HEADER_BYTES: usize = 12;
/// VIRTIO_NET_HDR_F_NEEDS_CSUM and VIRTIO_NET_HDR_GSO_TCPV4.
const NEEDS_CHECKSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;

/// How the device is to send a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// As it is.
    Whole,
    /// With its TCP checksum completed, and cut into segments of so much data where it has more, behind so many bytes of headers.
    Tcp {
        /// Bytes of headers.
        head_bytes: u16,
        /// Data of a segment; 0 for one that is not cut.
        mss: u16,
    },
}

impl NetMemory {
    fn new(machine: &mut Machine) -> Result<Self, Error> {
        Ok(Self {
            receives: QueueMemory::new(&mut machine.memory)?,
            transmits: QueueMemory::new(&mut machine.memory)?,
        })
    }
}

impl Net {
    /// Sets interface `index` up, with every offload.
    pub fn open(machine: &mut Machine, index: u64) -> Result<Self, Error> {
        let transport = Transport::find(machine.line, Kind::Network, index)?;
        let wanted = feature::CHECKSUM
            | feature::GUEST_CHECKSUM
            | feature::MAC
            | feature::GUEST_TSO4
            | feature::HOST_TSO4
            | feature::MERGEABLE;
        let features = transport.negotiate(wanted | ring_feature::INDIRECT | ring_feature::EVENT_IDX)?;
        let place = usize::try_from(index)
            .ok()
            .filter(|index| *index < INTERFACES_MAX);
        let Some(place) = place else {
            return Err(Error::NoDevice {
                kind: "usable network",
                index,
            });
        };
        let mut memory = match machine.net_memory.get_mut(place).and_then(Option::take) {
            Some(memory) => memory,
            None => NetMemory::new(machine)?,
        };
        let receives = Queue::new(transport, RECEIVES, features, &mut memory.receives)?;
        let transmits = Queue::new(transport, TRANSMITS, features, &mut memory.transmits)?;
        if let Some(kept) = machine.net_memory.get_mut(place) {
            *kept = Some(memory);
        }
        let mut net = Self {
            transport,
            features,
            received: machine.memory.allocate(usize::from(SIZE_MAX) * RECEIVE_BYTES)?,
            transmitted: machine.memory.allocate(usize::from(PLACES) * TRANSMIT_BYTES)?,
            receives,
            transmits: Outbox::new(transmits),
        };
        transport.start();
        for slot in 0..net.receives.slots() {
            net.offer(slot);
        }
        net.receives.kick();
        Ok(net)
    }

    /// Whether the device has agreed on all of `features`.
    pub const fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// The hardware address that the device gives; one of a local administration if it gives none.
    pub fn mac(&self) -> Mac {
        if !self.has(feature::MAC) {
            return [6, 0, 0, 0, 0, 1];
        }
        core::array::from_fn(|number| self.transport.config8(number as u64))
    }

    fn offer(&mut self, slot: u16) {
        self.receives
            .offer(slot, &self.received, low32(RECEIVE_BYTES as u64));
    }

    /// What has come, if anything; what is behind the first slot of a packet is dropped.
    pub fn receive(&mut self) -> Result<Option<Packet>, Error> {
        let Some(used) = self.receives.poll()? else {
            return Ok(None);
        };
        let packet = Packet {
            slot: used.slot,
            bytes: size(u64::from(used.written_bytes)).min(RECEIVE_BYTES),
        };
        let [low, high] = match *self.slot(packet) {
            [.., low, high] if packet.bytes >= HEADER_BYTES => [low, high],
            _ => [1, 0],
        };
        let mut more = u16::from_le_bytes([low, high]).saturating_sub(1);
        while more > 0 && self.has(feature::MERGEABLE) {
            // The device returns all slots of a packet at once.
            let Some(used) = self.receives.poll()? else { break };
            self.offer(used.slot);
            more -= 1;
        }
        Ok(Some(packet))
    }

    /// Its header of virtio.
    fn slot(&mut self, packet: Packet) -> &[u8] {
        let at = usize::from(packet.slot) * RECEIVE_BYTES;
        self.received.slice_mut(at, HEADER_BYTES)
    }

    /// The beginning of a frame.
    pub fn frame(&mut self, packet: Packet) -> &[u8] {
        let at = usize::from(packet.slot) * RECEIVE_BYTES;
        let frame = packet.bytes.saturating_sub(HEADER_BYTES);
        self.received.slice_mut(at + HEADER_BYTES, frame)
    }

    /// Lets the device use the first slot of a packet again.
    pub fn give_back(&mut self, packet: Packet) {
        self.offer(packet.slot);
    }

    /// A slot for a frame, if there is one.
    pub fn slot_to_send(&mut self) -> Result<Option<u16>, Error> {
        self.transmits.place()
    }

    /// Where the frame of a free slot goes.
    pub fn frame_to_send(&mut self, slot: u16) -> &mut [u8] {
        let at = usize::from(slot) * TRANSMIT_BYTES;
        self.transmitted
            .slice_mut(at + HEADER_BYTES, TRANSMIT_BYTES - HEADER_BYTES)
    }

    /// Sends the frame of a free slot, of so many bytes.
    pub fn send(&mut self, slot: u16, bytes: usize, how: Sent) {
        let at = usize::from(slot) * TRANSMIT_BYTES;
        let mut header = [0; HEADER_BYTES];
        if let Sent::Tcp { head_bytes, mss } = how {
            let [head_low, head_high] = head_bytes.to_le_bytes();
            let [mss_low, mss_high] = mss.to_le_bytes();
            let gso = if mss > 0 { GSO_TCPV4 } else { 0 };
            let (start, offset) = (low8(TCP_AT as u64), low8(CHECKSUM_AT as u64));
            header = [
                NEEDS_CHECKSUM,
                gso,
                head_low,
                head_high,
                mss_low,
                mss_high,
                start,
                0,
                offset,
                0,
                0,
                0,
            ];
        }
        self.transmitted
            .slice_mut(at, HEADER_BYTES)
            .copy_from_slice(&header);
        let part = Part {
            address: self.transmitted.address() + at as u64,
            bytes: low32((HEADER_BYTES + bytes) as u64),
            device_writes: false,
        };
        self.transmits.send(slot, &[part]);
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
