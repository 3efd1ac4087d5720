//! The serial port: text out, bytes in.

use core::fmt;

use crate::cpu;

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const MODEM_CONTROL: u16 = DATA + 4;
const LINE_STATUS: u16 = DATA + 5;
/// Eight data bits, and the data registers where they belong.
const EIGHT_BITS: u8 = 3;
/// DTR, RTS and OUT2; no loopback.
const READY: u8 = 0b1011;
const DATA_READY: u8 = 1;

/// The IOAPIC input of the port.
pub const IRQ: u32 = 4;

/// Prints as `format!` formats. Each byte is an exit to the monitor: some 30 µs on hosts that emulate.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => { $crate::serial::print(format_args!($($argument)*)) };
}

/// What `say!` calls.
pub fn print(text: fmt::Arguments<'_>) {
    use fmt::Write;
    // The port never refuses a byte, and a value's own formatting that fails has no better place to say so.
    let _ = Port.write_fmt(text);
}

/// One byte of input, if there is any.
pub fn read() -> Option<u8> {
    (cpu::in8(LINE_STATUS) & DATA_READY != 0).then(|| cpu::in8(DATA))
}

/// Has input raise an interrupt.
pub fn enable_input_interrupt() {
    cpu::out8(INTERRUPT_ENABLE, 1);
}

/// Sets the port up as monitors hand it over, whatever was written to it before.
pub fn restore() {
    for (port, value) in [
        (LINE_CONTROL, EIGHT_BITS),
        (INTERRUPT_ENABLE, 0),
        (FIFO_CONTROL, 0),
        (MODEM_CONTROL, READY),
    ] {
        cpu::out8(port, value);
    }
}

struct Port;

impl fmt::Write for Port {
    /// Does not wait for the transmitter: the ports of monitors are always ready, and asking doubles the cost.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| cpu::out8(DATA, byte));
        Ok(())
    }
}
