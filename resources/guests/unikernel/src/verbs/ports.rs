//! Garbage on I/O ports, but for the values that would end the guest.

use instrument::garbage::Garbage;
use instrument::width::low8;

use crate::cpu;

/// Ports that monitors serve: the serial port, the keyboard controller, the timer, the clock, power, exit, and places of devices.
const PORTS: [u16; 32] = [
    0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x60, 0x64, 0x40, 0x41, 0x42, 0x43, 0x61, 0x70,
    0x71, 0x600, 0x601, 0x602, 0x603, 0x605, 0x606, 0x607, 0x610, 0x611, 0x612, 0x613, 0x614, 0x615, 0x616,
    0x617,
];
/// Accesses of one flood.
const ACCESSES: u64 = 32;
const SERIAL_DATA: u16 = 0x3f8;

/// Reads and writes ports; returns how often.
pub fn flood(garbage: &mut Garbage) -> u64 {
    for _ in 0..ACCESSES {
        let index = garbage.below(PORTS.len() as u64);
        let port = PORTS
            .get(usize::from(low8(index)))
            .copied()
            .unwrap_or(SERIAL_DATA);
        let value = low8(garbage.value());
        if garbage.once_in(3) {
            cpu::in8(port);
        } else if !ends_the_guest(port, value) {
            cpu::out8(port, value);
        }
    }
    ACCESSES
}

/// Whether a monitor would take this for the wish to end.
const fn ends_the_guest(port: u16, value: u8) -> bool {
    match port {
        // The reset line, directly, and through the controller's output port.
        0x64 => value >= 0xf0 || value == 0xd1,
        // The sleep bit: of the sleep types, only S5 ends the guest, but a monitor may not tell them apart.
        0x600 => value & 1 << 5 != 0,
        // The reset register's value.
        0x602 => value == 6,
        _ => false,
    }
}
