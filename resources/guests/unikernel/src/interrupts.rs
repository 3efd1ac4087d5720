//! Interrupts: they count, and end an idle wait.

#![expect(
    unsafe_code,
    reason = "the addresses of the interrupt controllers, and counters that assembly increments"
)]

use core::sync::atomic::{AtomicU64, Ordering};

use instrument::width::low8;

use crate::cpu::{self, Registers};
use crate::tables::{LINE_VECTOR, LINES, SPURIOUS_VECTOR};

/// The line on which vCPUs wake each other, and on which their timers tick.
pub const WAKE_LINE: usize = LINES - 1;
/// Inputs of the IOAPIC.
pub const INPUTS: u32 = 24;
/// vCPUs that an input can be routed to: bits of a flat logical destination.
pub const DESTINATIONS_MAX: usize = 8;

const LOCAL_APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;
const IO_APIC_WINDOW: u64 = 0x10;
/// The first redirection entry; each takes two registers.
const REDIRECTION: u32 = 0x10;
const LOGICAL: u32 = 1 << 11;

mod local {
    pub const TASK_PRIORITY: u64 = 0x80;
    pub const LOGICAL_DESTINATION: u64 = 0xd0;
    pub const DESTINATION_FORMAT: u64 = 0xe0;
    pub const SPURIOUS: u64 = 0xf0;
    pub const COMMAND_LOW: u64 = 0x300;
    pub const COMMAND_HIGH: u64 = 0x310;
    pub const TIMER: u64 = 0x320;
    pub const TIMER_COUNT: u64 = 0x380;
    pub const TIMER_DIVIDER: u64 = 0x3e0;
}

const ENABLE: u32 = 1 << 8;
const FLAT: u32 = u32::MAX;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0b1011;
/// About a second at the nanosecond ticks of KVM's local APIC.
const WATCHDOG_COUNT: u32 = 1 << 30;
/// Delivery modes of the command register, asserted.
const FIXED: u32 = 0x4000;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
/// The command has not been delivered yet.
const PENDING: u32 = 1 << 12;

unsafe extern "C" {
    static interrupt_counts: [AtomicU64; LINES];
}

/// Makes this vCPU, number `index`, take interrupts. A timer ends every idle wait within about a second, so that those
/// who wait can look at the clock.
pub fn enable(index: usize) {
    let apic = local_apic();
    apic.write32(local::SPURIOUS, ENABLE | u32::from(SPURIOUS_VECTOR));
    apic.write32(local::DESTINATION_FORMAT, FLAT);
    if index < DESTINATIONS_MAX {
        apic.write32(local::LOGICAL_DESTINATION, 1 << (24 + index));
    }
    apic.write32(local::TASK_PRIORITY, 0);
    apic.write32(local::TIMER_DIVIDER, DIVIDE_BY_1);
    apic.write32(local::TIMER, PERIODIC | wake_vector());
    apic.write32(local::TIMER_COUNT, WATCHDOG_COUNT);
}

/// Routes an input of the IOAPIC, which is below [`INPUTS`], to the first `cpus` vCPUs, edge-triggered.
pub fn route(irq: u32, cpus: usize) {
    // SAFETY: the IOAPIC is here on every machine of this architecture that the guest runs on.
    let io_apic = unsafe { Registers::new(IO_APIC) };
    let destinations = (1u32 << cpus.clamp(1, DESTINATIONS_MAX)) - 1;
    let vector = u32::from(LINE_VECTOR) + irq.min(INPUTS - 1);
    let entry = REDIRECTION + 2 * irq.min(INPUTS - 1);
    for (register, value) in [(entry + 1, destinations << 24), (entry, vector | LOGICAL)] {
        io_apic.write32(0, register);
        io_apic.write32(IO_APIC_WINDOW, value);
    }
}

/// How often a line has interrupted any vCPU.
pub fn counter(line: usize) -> &'static AtomicU64 {
    // SAFETY: the handlers increment these with locked instructions, as atomics do.
    let counters = unsafe { &interrupt_counts };
    counters
        .get(line)
        .expect("lines are below LINES: inputs are checked where they are routed")
}

/// The count of a line now.
pub fn count(line: usize) -> u64 {
    counter(line).load(Ordering::Acquire)
}

/// Interrupts another vCPU on the wake line.
pub fn wake(apic_id: u8) {
    command(apic_id, FIXED | wake_vector());
}

/// Resets another vCPU: it waits for [`send_startup`].
pub fn send_init(apic_id: u8) {
    command(apic_id, INIT);
}

/// Starts a vCPU that waits, in real mode at the page `page` below 1 MiB.
pub fn send_startup(apic_id: u8, page: u8) {
    command(apic_id, STARTUP | u32::from(page));
}

fn wake_vector() -> u32 {
    u32::from(LINE_VECTOR + low8(WAKE_LINE as u64))
}

fn command(apic_id: u8, low: u32) {
    let apic = local_apic();
    apic.write32(local::COMMAND_HIGH, u32::from(apic_id) << 24);
    apic.write32(local::COMMAND_LOW, low);
    while apic.read32(local::COMMAND_LOW) & PENDING != 0 {
        cpu::relax();
    }
}

fn local_apic() -> Registers {
    // SAFETY: every vCPU has its local APIC here, in xAPIC mode, from reset on.
    unsafe { Registers::new(LOCAL_APIC) }
}
