//! The ways in which the guest ends: the contract with the monitor about ports.

#![expect(
    unsafe_code,
    reason = "an undefined instruction without a handler is the last way out"
)]

use core::arch::asm;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use instrument::cmdline::Ending;

use crate::{cpu, tables};

/// A check failed.
pub const STATUS_FAILED: u8 = 1;
/// The command line asks for something impossible.
pub const STATUS_USAGE: u8 = 2;
/// A panic or an exception.
pub const STATUS_PANIC: u8 = 101;

/// One byte written here becomes the status of the monitor's process.
const EXIT_PORT: u16 = 0x604;
/// ACPI's sleep control register.
const SLEEP_CONTROL_PORT: u16 = 0x600;
/// SLP_EN, and SLP_TYP 5 in bits 2 to 4: S5.
const SLEEP_S5: u8 = 1 << 5 | 5 << 2;
/// The keyboard controller's command port, and its command that pulses the reset line.
const KEYBOARD_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// A few milliseconds: monitors without an exit device are common.
const EXIT_TICKS: u64 = 1 << 23;
/// A second or less.
const RESET_TICKS: u64 = 1 << 31;

static ENDING: AtomicU8 = AtomicU8::new(Ending::Exit as u8);

/// Chooses how [`finish`] ends.
pub fn choose(ending: Ending) {
    ENDING.store(ending as u8, Ordering::Relaxed);
}

/// Ends with `status` in the chosen way; where that way does not exist, in the next stronger one.
pub fn finish(status: u8) -> ! {
    let ending = ENDING.load(Ordering::Relaxed);
    if ending == Ending::Hang as u8 {
        hang()
    }
    if ending == Ending::Exit as u8 {
        end_by(EXIT_PORT, status, EXIT_TICKS);
    }
    if ending == Ending::PowerOff as u8 {
        end_by(SLEEP_CONTROL_PORT, SLEEP_S5, RESET_TICKS);
    }
    if ending != Ending::TripleFault as u8 {
        end_by(KEYBOARD_PORT, KEYBOARD_RESET, RESET_TICKS);
    }
    triple_fault()
}

/// Writes the last word, and gives the monitor some time: it may act on another thread than this one's.
fn end_by(port: u16, value: u8, ticks: u64) {
    cpu::out8(port, value);
    let start = cpu::ticks();
    while cpu::ticks().saturating_sub(start) < ticks {
        cpu::relax();
    }
}

/// An exception that has no handler, in a handler that does not exist.
pub fn triple_fault() -> ! {
    tables::empty_interrupt_descriptors();
    // SAFETY: does not return.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// Halts for ever, without burning a host's CPU.
fn hang() -> ! {
    let never = AtomicU64::new(0);
    loop {
        cpu::idle_while(&never, 0);
    }
}
