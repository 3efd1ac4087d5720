//! `hostile`: a guest that means harm to its monitor, and then wants its device back.

use instrument::cmdline::{ArgumentError, Command};
use instrument::garbage::{SANDBOX_BYTES, Sandbox};
use instrument::packet::{self, End};
use instrument::width::low32;

use super::Failure;
use super::assault::Assault;
use crate::machine::Machine;
use crate::virtio::blk::{self, Disk, Request, Setup, Status, kind};
use crate::virtio::feature as ring_feature;
use crate::virtio::mmio::{Kind, Transport};
use crate::virtio::net::{Net, Sent};
use crate::virtio::queue::{Part, Queue, QueueMemory};
use crate::virtio::rng::Entropy;
use crate::wait::Wait;
use crate::{cpu, say, serial};

/// `struct virtio_vsock_hdr`, and one from CID 3, port 1024, to port 1 of CID 2 that asks for a stream (virtio 1.2, 5.10.6).
const VSOCK_HEADER_BYTES: usize = 44;
const VSOCK_REQUEST: [u8; 40] = [
    3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0,
    0, 0, 0, 1, 0,
];
/// Bytes of the honest request.
const HONEST_BYTES: u32 = 512;

/// Assaults a device for a time, then resets it and has it answer one honest request.
pub fn hostile(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["kind", "dev", "seconds", "operations", "seed", "ports"])?;
    let device = match command.text("kind") {
        None | Some("blk") => Kind::Block,
        Some("rng") => Kind::Entropy,
        Some("net") => Kind::Network,
        Some("balloon") => Kind::Balloon,
        Some("vsock") => Kind::Vsock,
        Some(value) => {
            return Err(ArgumentError::Impossible {
                key: "kind",
                value,
                choices: "blk, rng, net, balloon, vsock",
            }
            .into());
        }
    };
    let index = command.number("dev", 0)?;
    let seed = command.number("seed", 1)?;
    let with_ports = command.switch("ports", false)?;
    let operations = command.number("operations", u64::MAX)?;
    let duration_ticks = machine
        .clock()?
        .ticks(command.number("seconds", 5)?.saturating_mul(1000));
    machine.forget_disk(index);
    let sandbox = Sandbox::below(machine.memory.take_end(SANDBOX_BYTES)?);
    let mut assault = Assault::new(
        Transport::find(machine.line, device, index)?,
        device,
        seed,
        sandbox,
    );
    say!("hostile: seed={seed}\n");
    let start = cpu::ticks();
    while assault.operations < operations && cpu::ticks().saturating_sub(start) < duration_ticks {
        if with_ports {
            assault.flood_ports();
        }
        assault.step();
    }
    if with_ports {
        serial::restore();
        say!("\n");
    }
    honest(machine, command, device, index)?;
    say!(
        "hostile: ok seed={seed} operations={} resets={}\n",
        assault.operations,
        assault.resets
    );
    Ok(())
}

/// Resets the device and sets it up properly; it must serve a request as if nothing had been.
fn honest(
    machine: &mut Machine,
    command: &Command<'static>,
    device: Kind,
    index: u64,
) -> Result<(), Failure> {
    let wait = machine.wait(command)?;
    let buffer = machine.memory.allocate(HONEST_BYTES as usize)?;
    match device {
        Kind::Block => {
            let mut disk = Disk::open(machine, Setup::of(index))?;
            let data = Some(blk::data(buffer.address(), u64::from(HONEST_BYTES), true));
            super::disk::expect(
                &mut disk,
                &wait,
                &Request {
                    kind: kind::READ,
                    sector: 0,
                    data,
                },
                Status::OK,
            )?;
            machine.keep(disk);
        }
        Kind::Entropy => {
            let written = Entropy::open(machine, index)?.fill(buffer.address(), HONEST_BYTES, &wait)?;
            if written == 0 || written > HONEST_BYTES {
                return Err(Failure::Check(
                    "the source returned no bytes, or more than there was room for",
                ));
            }
        }
        Kind::Network => {
            let mut net = Net::open(machine, index)?;
            let asker = End {
                mac: net.mac(),
                ..End::default()
            };
            let slot = net
                .slot_to_send()?
                .ok_or(Failure::Check("a fresh queue is full"))?;
            packet::ask(net.frame_to_send(slot), &asker, [172, 16, 0, 1]);
            net.send(slot, packet::ARP_BYTES, Sent::Whole);
            net.kick();
            net.flush(&wait)?;
        }
        // A page that is given away, and a packet to a port where nobody listens.
        Kind::Balloon => {
            let page = low32(buffer.address() >> 12).to_le_bytes();
            served(machine, device, index, (3, 0), &page, &wait)?;
        }
        Kind::Vsock => {
            let mut packet = [0; VSOCK_HEADER_BYTES];
            packet[..40].copy_from_slice(&VSOCK_REQUEST);
            served(machine, device, index, (3, 1), &packet, &wait)?;
        }
    }
    Ok(())
}

/// Sets a device of so many queues up, and has one of them take what is in `bytes`.
fn served(
    machine: &mut Machine,
    device: Kind,
    index: u64,
    (queues, asked): (u16, u16),
    bytes: &[u8],
    wait: &Wait,
) -> Result<(), Failure> {
    let transport = Transport::find(machine.line, device, index)?;
    let features = transport.negotiate(ring_feature::INDIRECT | ring_feature::EVENT_IDX)?;
    let mut queue = None;
    // A balloon has no more than two without its features.
    for number in 0..queues {
        if transport.queue_size_max(number) == 0 {
            continue;
        }
        let mut memory = QueueMemory::new(&mut machine.memory)?;
        let set_up = Queue::new(transport, number, features, &mut memory)?;
        if number == asked {
            queue = Some(set_up);
        }
    }
    let mut queue = queue.ok_or(Failure::Check("the queue is not there"))?;
    transport.start();
    let mut buffer = machine.memory.allocate(bytes.len())?;
    buffer.bytes_mut().copy_from_slice(bytes);
    let part = Part {
        address: buffer.address(),
        bytes: low32(bytes.len() as u64),
        device_writes: false,
    };
    queue.submit(0, &[part]);
    queue.kick();
    let start = cpu::ticks();
    while queue.poll()?.is_none() {
        wait.pause(&mut queue, start)?;
    }
    // The memory of its queues is not used again.
    transport.reset()?;
    Ok(())
}
