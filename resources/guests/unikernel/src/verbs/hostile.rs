//! `hostile`: a guest that means harm to its monitor, and then wants its device back.

use instrument::cmdline::{ArgumentError, Command};
use instrument::garbage::{SANDBOX_BYTES, Sandbox};

use super::Failure;
use super::assault::Assault;
use crate::machine::Machine;
use crate::virtio::blk::{self, Disk, Request, Setup, Status, kind};
use crate::virtio::mmio::{Kind, Transport};
use crate::virtio::rng::Entropy;
use crate::{cpu, say, serial};

/// Bytes of the honest request.
const HONEST_BYTES: u32 = 512;

/// Assaults a device for a time, then resets it and has it answer one honest request.
pub fn hostile(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["kind", "dev", "seconds", "operations", "seed", "ports"])?;
    let device = match command.text("kind") {
        None | Some("blk") => Kind::Block,
        Some("rng") => Kind::Entropy,
        Some(value) => {
            return Err(ArgumentError::Impossible {
                key: "kind",
                value,
                choices: "blk, rng",
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
    let mut assault = Assault::new(Transport::find(machine.line, device, index)?, seed, sandbox);
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
    }
    Ok(())
}
