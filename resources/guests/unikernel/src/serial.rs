//! The serial port: text out, bytes in.

use core::fmt;

use crate::cpu;

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const LINE_STATUS: u16 = DATA + 5;
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

struct Port;

impl fmt::Write for Port {
    /// Does not wait for the transmitter: the ports of monitors are always ready, and asking doubles the cost.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| cpu::out8(DATA, byte));
        Ok(())
    }
}
