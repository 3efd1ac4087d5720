//! Single instructions: ports, device registers, the time stamp, CPUID.

#![expect(unsafe_code, reason = "instructions that Rust has no words for")]

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, _mm_pause, _rdtsc, CpuidResult};

/// Writes a byte to an I/O port. No port of these machines makes anything touch memory.
pub fn out8(port: u16, value: u8) {
    // SAFETY: the task state permits every port, and ports do not touch memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads a byte from an I/O port.
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: the task state permits every port, and ports do not touch memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// The time stamp counter.
pub fn ticks() -> u64 {
    // SAFETY: CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// Tells the CPU that it is in a loop which waits.
pub fn relax() {
    _mm_pause();
}

/// CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// The registers of a device, each access one plain `mov` of the width that it is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Registers(u64);

macro_rules! access {
    ($read:ident, $write:ident, $integer:ty, $class:ident, $modifier:literal) => {
        /// Reads a register of this width.
        pub fn $read(self, offset: u64) -> $integer {
            let value: $integer;
            // SAFETY: `new` was promised that these are device registers, where reading harms no memory.
            unsafe {
                asm!(concat!("mov {value", $modifier, "}, [{address}]"), value = out($class) value,
                    address = in(reg) self.0 + offset, options(nostack, preserves_flags));
            }
            value
        }

        /// Writes a register of this width.
        pub fn $write(self, offset: u64, value: $integer) {
            // SAFETY: `new` was promised that these are device registers; what the device then does to memory
            // is the concern of whoever gave it addresses.
            unsafe {
                asm!(concat!("mov [{address}], {value", $modifier, "}"), value = in($class) value,
                    address = in(reg) self.0 + offset, options(nostack, preserves_flags));
            }
        }
    };
}

impl Registers {
    /// The registers at `base`.
    ///
    /// # Safety
    ///
    /// Nothing but device registers lies within the offsets that are accessed, and they are mapped.
    pub const unsafe fn new(base: u64) -> Self {
        Self(base)
    }

    access!(read8, write8, u8, reg_byte, "");
    access!(read16, write16, u16, reg, ":x");
    access!(read32, write32, u32, reg, ":e");
    access!(read64, write64, u64, reg, ":r");
}

/// Halts until an interrupt if `counter` is still `seen`; an interrupt that counted before is not missed.
pub fn idle_while(counter: &core::sync::atomic::AtomicU64, seen: u64) {
    // SAFETY: int3 enters `service_idle`, which compares, halts and returns, and keeps every register but the flags.
    unsafe { asm!("int3", in("rdi") counter.as_ptr(), in("rax") seen) };
}
