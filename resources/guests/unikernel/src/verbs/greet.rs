//! `hello`, `info` and `exit`: signs of life.

#![expect(unsafe_code, reason = "reads ACPI's tables by their addresses")]

use instrument::acpi;
use instrument::cmdline::Command;
use instrument::width::low8;

use super::Failure;
use crate::machine::Machine;
use crate::say;

/// Says hello: the shortest way from the monitor's start to a byte on the serial port.
pub fn hello(command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&[])?;
    say!("hello from the unikernel guest\n");
    Ok(())
}

/// Says what the machine is made of: vCPUs as ACPI counts them, 0 without ACPI.
pub fn info(machine: &Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&[])?;
    say!(
        "info: vcpus={} memory_kib={} devices={} rsdp={:#x}\n",
        acpi::vcpus(machine.rsdp_address, &physical).unwrap_or(0),
        machine.memory.total_bytes() >> 10,
        machine.line.devices().count(),
        machine.rsdp_address
    );
    Ok(())
}

/// Physical memory below 3 GiB, where no device has its registers.
fn physical(address: u64, bytes: usize) -> Option<&'static [u8]> {
    if address == 0 || address.checked_add(bytes as u64)? > 0xc000_0000 {
        return None;
    }
    // SAFETY: the low 4 GiB are mapped; the guest writes nothing of what firmware tables occupy.
    Some(unsafe { core::slice::from_raw_parts(address as *const u8, bytes) })
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
