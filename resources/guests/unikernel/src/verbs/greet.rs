//! `hello`, `info` and `exit`: signs of life.

use instrument::cmdline::Command;
use instrument::width::low8;

use super::Failure;
use crate::machine::Machine;
use crate::{cpu, say};

/// Says hello: the shortest way from the monitor's start to a byte on the serial port.
pub fn hello(command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&[])?;
    say!("hello from the unikernel guest\n");
    Ok(())
}

/// Says what the machine is made of.
pub fn info(machine: &Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&[])?;
    say!(
        "info: vcpus={} memory_kib={} devices={} rsdp={:#x}\n",
        cpu::cpuid(1, 0).ebx >> 16 & 0xff,
        machine.memory.total_bytes() >> 10,
        machine.line.devices().count(),
        machine.rsdp_address
    );
    Ok(())
}

/// Ends now, with the status that was asked for.
pub fn exit(command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["status"])?;
    Err(Failure::Exit(low8(command.within(
        "status",
        0,
        0..=255,
        "0 to 255",
    )?)))
}
