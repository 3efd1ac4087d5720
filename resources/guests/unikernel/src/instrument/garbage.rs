//! Seeded garbage for devices: anything at all, except what would have a *correct* device destroy the guest.
//!
//! A device may write wherever a descriptor says. So what it is told to write to lies in a sandbox or where no RAM is, and
//! what it could take for descriptors never comes from memory that it writes:
//!
//! ```text
//!   RAM in use | letters | tables | moat of zeroes | scribble | end of low RAM
//!               headers,   descrip-  what a table      what devices
//!               avail      tors      that overruns     may write
//!               rings                finds
//! ```

use crate::random::Random;
use crate::width::{low16, low32};

/// The parts of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// Request headers and available rings: devices read them.
    pub letters: u64,
    /// Descriptor tables: devices read them, and only the guest writes them.
    pub tables: u64,
    /// What devices may write, up to `end`.
    pub scribble: u64,
    /// The end of low RAM: whatever overruns the sandbox finds nothing.
    pub end: u64,
}

/// A descriptor that a device will see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Guest-physical address.
    pub address: u64,
    /// Length.
    pub bytes: u32,
    /// Flags.
    pub flags: u16,
    /// The next one.
    pub next: u16,
}

/// A source of garbage.
#[derive(Clone, Debug)]
pub struct Garbage {
    random: Random,
    sandbox: Sandbox,
}

/// Bytes of the letters.
pub const LETTERS_BYTES: u64 = 64 << 10;
/// Bytes of the tables.
pub const TABLES_BYTES: u64 = 64 << 10;
/// An index of 16 bits reaches 1 MiB beyond a table's start.
pub const MOAT_BYTES: u64 = (1 << 20) + (64 << 10);
/// Bytes that devices may write.
pub const SCRIBBLE_BYTES: u64 = 512 << 10;
/// Bytes of the whole sandbox.
pub const SANDBOX_BYTES: u64 = LETTERS_BYTES + TABLES_BYTES + MOAT_BYTES + SCRIBBLE_BYTES;

/// The first page, which nothing uses once the guest runs.
const FIRST_PAGE_BYTES: u64 = 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

impl Sandbox {
    /// The sandbox that ends where low RAM does.
    #[must_use]
    pub const fn below(end: u64) -> Self {
        let scribble = end - SCRIBBLE_BYTES;
        let tables = scribble - MOAT_BYTES - TABLES_BYTES;
        Self {
            letters: tables - LETTERS_BYTES,
            tables,
            scribble,
            end,
        }
    }
}

impl Garbage {
    /// The garbage of `seed` for a guest with this sandbox.
    #[must_use]
    pub const fn new(seed: u64, sandbox: Sandbox) -> Self {
        Self {
            random: Random::new(seed),
            sandbox,
        }
    }

    /// Any number.
    pub const fn any(&mut self) -> u64 {
        self.random.next()
    }

    /// A number below `bound`.
    pub const fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    /// True once in `times` times.
    pub const fn once_in(&mut self, times: u64) -> bool {
        self.random.below(times) == 0
    }

    /// A number of the kind that programs trip over.
    pub fn value(&mut self) -> u64 {
        let small = self.below(16);
        match self.below(8) {
            0 => 0,
            1 => small,
            2 => u64::MAX - small,
            3 => 1 << self.below(64),
            4 => (1 << self.below(64)) - 1,
            5 => 0x8000_0000 + small,
            6 => self.any() & 0xffff,
            _ => self.any(),
        }
    }

    /// An address where there is no RAM, whatever the guest's size: beyond it, in the window of devices, at the end of
    /// the address space.
    pub fn nowhere(&mut self) -> u64 {
        match self.below(5) {
            0 => self.sandbox.end.max(0xc000_0000) + self.below(0x1000_0000),
            1 => 0xc000_1000 + self.below(0x8000),
            2 => u64::MAX - self.below(FIRST_PAGE_BYTES),
            3 => 1 << (50 + self.below(14)),
            _ => self.any() | 1 << 63,
        }
    }

    /// Where a device may write, with a length: from the sandbox upwards over the end of RAM, nowhere, or the first page.
    pub fn writable(&mut self) -> (u64, u32) {
        let size = self.sandbox.end - self.sandbox.scribble;
        match self.below(8) {
            0 => (self.nowhere(), low32(self.below(2 * FIRST_PAGE_BYTES))),
            1 => (self.sandbox.end - self.below(FIRST_PAGE_BYTES), self.length()),
            2 => (0, low32(self.below(FIRST_PAGE_BYTES))),
            _ => (self.sandbox.scribble + self.below(size), self.length()),
        }
    }

    /// What a device may read: anything.
    pub fn readable(&mut self) -> (u64, u32) {
        match self.below(4) {
            0 => (self.nowhere(), self.length()),
            1 => (self.below(self.sandbox.end), self.length()),
            _ => (self.letter(), if self.once_in(3) { self.length() } else { 16 }),
        }
    }

    /// The address of a request header, or of anything else among the letters.
    pub fn letter(&mut self) -> u64 {
        let exact = self.sandbox.letters + 16 * self.below(LETTERS_BYTES / 16);
        if self.once_in(8) {
            exact + self.below(16)
        } else {
            exact
        }
    }

    /// The address of a descriptor table: among the tables, or nowhere.
    pub fn table(&mut self) -> u64 {
        if self.once_in(8) {
            self.nowhere()
        } else {
            self.sandbox.tables + 16 * self.below(TABLES_BYTES / 16)
        }
    }

    /// The address of a used ring: where devices may write, or nowhere.
    pub fn used_ring(&mut self) -> u64 {
        let size = self.sandbox.end - self.sandbox.scribble;
        if self.once_in(8) {
            self.nowhere()
        } else {
            self.sandbox.scribble + self.below(size)
        }
    }

    /// A descriptor for a queue of `size` entries.
    pub fn chunk(&mut self, size: u16) -> Chunk {
        let next = if self.once_in(16) {
            low16(self.any())
        } else {
            low16(self.below(u64::from(size.max(1))))
        };
        let odd = if self.once_in(16) {
            low16(self.any()) & !(WRITE | INDIRECT)
        } else {
            0
        };
        let flags = odd | if self.below(3) > 0 { NEXT } else { 0 };
        let ((address, bytes), kind) = match self.below(8) {
            0 => {
                let entries = low32(self.below(6));
                let bytes = if self.once_in(4) {
                    self.length()
                } else {
                    16 * entries
                };
                // A device that ignores INDIRECT must not write to the table.
                ((self.table(), bytes), INDIRECT)
            }
            1..4 => (self.readable(), 0),
            _ => (self.writable(), WRITE),
        };
        Chunk {
            address,
            bytes,
            flags: flags | kind,
            next,
        }
    }

    /// A length of the kind that programs trip over.
    fn length(&mut self) -> u32 {
        match self.below(8) {
            0 => 0,
            1 => 1,
            2 => 511 + low32(self.below(3)),
            3 => u32::MAX - low32(self.below(4)),
            4 => 0x8000_0000,
            5 => low32(self.below(SCRIBBLE_BYTES)),
            _ => 512 * low32(self.below(64)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDS: [u64; 4] = [16 << 20, 128 << 20, 0xc000_0000, (2 << 30) - 4096];

    /// Whether a device that checks its addresses can write this without touching what the guest uses.
    fn is_harmless(sandbox: &Sandbox, address: u64, bytes: u32) -> bool {
        let Some(end) = address.checked_add(u64::from(bytes)) else {
            return true;
        };
        end <= FIRST_PAGE_BYTES || address >= sandbox.scribble
    }

    #[test]
    fn whatever_a_device_may_write_spares_the_guest() {
        for end in ENDS {
            let sandbox = Sandbox::below(end);
            let mut garbage = Garbage::new(end, sandbox);
            for _ in 0..200_000 {
                let chunk = garbage.chunk(256);
                let writes = chunk.flags & WRITE != 0;
                assert!(
                    !writes || is_harmless(&sandbox, chunk.address, chunk.bytes),
                    "{chunk:x?}"
                );
                let used = garbage.used_ring();
                assert!(used >= sandbox.scribble, "{used:x}");
            }
        }
    }

    #[test]
    fn what_a_device_may_take_for_descriptors_is_out_of_its_own_reach() {
        for end in ENDS {
            let sandbox = Sandbox::below(end);
            let mut garbage = Garbage::new(end, sandbox);
            for _ in 0..200_000 {
                let table = garbage.table();
                let reach = table.saturating_add(16 * 65536);
                let among = table >= sandbox.tables && reach <= sandbox.scribble;
                assert!(among || table >= end, "{table:x}");
                assert!(!among || table.is_multiple_of(16), "{table:x}");
                let chunk = garbage.chunk(256);
                let both = WRITE | INDIRECT;
                assert_ne!(chunk.flags & both, both);
            }
        }
    }

    #[test]
    fn the_parts_of_the_sandbox_follow_each_other() {
        for end in ENDS {
            let sandbox = Sandbox::below(end);
            assert_eq!(sandbox.tables - sandbox.letters, LETTERS_BYTES);
            assert_eq!(sandbox.scribble - sandbox.tables, TABLES_BYTES + MOAT_BYTES);
            assert_eq!(sandbox.end - sandbox.letters, SANDBOX_BYTES);
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_garbage() {
        let sandbox = Sandbox::below(128 << 20);
        let (mut one, mut other) = (Garbage::new(9, sandbox), Garbage::new(9, sandbox));
        for _ in 0..1000 {
            assert_eq!(one.chunk(256), other.chunk(256));
            assert_eq!(one.value(), other.value());
        }
    }
}
