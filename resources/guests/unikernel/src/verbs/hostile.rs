//! `hostile`: a guest that means harm to its monitor, and then wants its device back.

use instrument::cmdline::{ArgumentError, Command};
use instrument::garbage::{SANDBOX_BYTES, Sandbox};
use instrument::packet::{self, End};
use instrument::stream::Stream;
use instrument::width::low32;

use super::Failure;
use super::assault::Assault;
use crate::machine::Machine;
use crate::virtio::blk::{self, Disk, Request, Setup, Status, kind};
use crate::virtio::feature as ring_feature;
use crate::virtio::mem::{self, Answer, Mem};
use crate::virtio::mmio::{Kind, Transport};
use crate::virtio::net::{Net, Sent};
use crate::virtio::pmem::{DONE, Pmem};
use crate::virtio::queue::{Part, Queue, QueueMemory};
use crate::virtio::rng::Entropy;
use crate::virtio::vsock::Vsock;
use crate::wait::Wait;
use crate::{cpu, say, serial};

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
        Some("memory") => Kind::Memory,
        Some("vsock") => Kind::Vsock,
        Some("pmem") => Kind::Pmem,
        Some(value) => {
            return Err(ArgumentError::Impossible {
                key: "kind",
                value,
                choices: "blk, rng, net, balloon, memory, vsock, pmem",
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
        Kind::Balloon => {
            let page = low32(buffer.address() >> 12).to_le_bytes();
            inflates(machine, index, &page, &wait)?;
        }
        Kind::Pmem => {
            if Pmem::open(machine, index)?.flush(&wait)? != DONE {
                return Err(Failure::Check("an honest flush has failed"));
            }
        }
        Kind::Memory => {
            let answer = Mem::open(machine)?.ask(mem::Request::UnplugAll, 0, 0, &wait)?;
            if answer.kind != Answer::ACK {
                return Err(Failure::Check("memory cannot be unplugged after what has been"));
            }
        }
        Kind::Vsock => {
            let mut vsock = Vsock::open(machine)?;
            // To a port where nobody listens.
            let mut stream = Stream::new(vsock.cid(), 1024, 1);
            let call = stream
                .due()
                .ok_or(Failure::Check("a fresh stream calls nobody"))?;
            let place = vsock
                .place_to_send()?
                .ok_or(Failure::Check("a fresh queue is full"))?;
            vsock.send(place, &call);
            vsock.kick();
            vsock.flush(&wait)?;
        }
    }
    Ok(())
}

/// Sets a balloon up without its features, and gives it the pages of a list.
fn inflates(machine: &mut Machine, index: u64, pages: &[u8], wait: &Wait) -> Result<(), Failure> {
    let transport = Transport::find(machine.line, Kind::Balloon, index)?;
    let features = transport.negotiate(ring_feature::INDIRECT | ring_feature::EVENT_IDX)?;
    let [mut inflates, mut deflates] = [
        QueueMemory::new(&mut machine.memory)?,
        QueueMemory::new(&mut machine.memory)?,
    ];
    let mut queue = Queue::new(transport, 0, features, &mut inflates)?;
    Queue::new(transport, 1, features, &mut deflates)?;
    transport.start();
    let mut buffer = machine.memory.allocate(pages.len())?;
    buffer.bytes_mut().copy_from_slice(pages);
    let part = Part {
        address: buffer.address(),
        bytes: low32(pages.len() as u64),
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
