//! The VMClock page: how often the guest's time was disrupted (the UAPI group's specification of `vmclock_abi`, version 1).
//!
//! The DSDT tells the guest where it is. Programs map it, and see by one number that their guest has gone on from a snapshot or
//! on another host: clocks have jumped, and after a snapshot there may be another guest with the same memory. It says nothing of
//! the time itself, as Firecracker's does not: its counter is none, and its clock's status unknown.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// The whole page is the device's.
pub const VMCLOCK_BYTES: u32 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
const VERSION: u16 = 1;
const COUNTER_INVALID: u8 = 0xff;
const FLAG_VM_GEN_COUNTER_PRESENT: u64 = 1 << 8;
const FLAG_NOTIFICATION_PRESENT: u64 = 1 << 9;

/// Offsets of fields, each little-endian.
mod field {
    pub(super) const MAGIC: u64 = 0;
    pub(super) const SIZE: u64 = 4;
    pub(super) const VERSION: u64 = 8;
    pub(super) const COUNTER_ID: u64 = 10;
    pub(super) const SEQ_COUNT: u64 = 12;
    pub(super) const DISRUPTION_MARKER: u64 = 16;
    pub(super) const FLAGS: u64 = 24;
    pub(super) const VM_GENERATION_COUNTER: u64 = 104;
}

/// What has happened to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disruption {
    /// It goes on elsewhere.
    Moved,
    /// It goes on from a snapshot, from which others may go on too.
    Restored,
}

/// The page could not be written.
#[derive(Debug, thiserror::Error)]
#[error("the VMClock page at {address:#x} cannot be written")]
pub struct VmClockError {
    address: u64,
    #[source]
    source: GuestMemoryError,
}

/// Where a guest looks for the page.
#[derive(Clone, Copy, Debug)]
pub struct VmClock(pub GuestAddress);

impl VmClock {
    /// Writes the page of a guest that boots.
    ///
    /// # Errors
    ///
    /// When it is no memory.
    pub fn write(self, memory: &GuestMemoryMmap) -> Result<(), VmClockError> {
        let flags = FLAG_VM_GEN_COUNTER_PRESENT | FLAG_NOTIFICATION_PRESENT;
        self.put(memory, field::SIZE, &VMCLOCK_BYTES.to_le_bytes())?;
        self.put(memory, field::VERSION, &VERSION.to_le_bytes())?;
        self.put(memory, field::COUNTER_ID, &[COUNTER_INVALID])?;
        self.put(memory, field::FLAGS, &flags.to_le_bytes())?;
        self.put(memory, field::MAGIC, &MAGIC.to_le_bytes())
    }

    /// Tells whoever looks at the page what has happened, before the guest goes on. Where there is no such page, because an older
    /// version has booted the guest, nothing is written. What the guest itself has written there is its own affair.
    ///
    /// # Errors
    ///
    /// When it is no memory.
    pub fn disrupt(self, memory: &GuestMemoryMmap, what: Disruption) -> Result<(), VmClockError> {
        if u32::from_le_bytes(self.get(memory, field::MAGIC)?) != MAGIC {
            return Ok(());
        }
        let begun = u32::from_le_bytes(self.get(memory, field::SEQ_COUNT)?) | 1;
        self.put(memory, field::SEQ_COUNT, &begun.to_le_bytes())?;
        fence(Ordering::Release);
        self.count(memory, field::DISRUPTION_MARKER)?;
        if what == Disruption::Restored {
            self.count(memory, field::VM_GENERATION_COUNTER)?;
        }
        fence(Ordering::Release);
        self.put(memory, field::SEQ_COUNT, &begun.wrapping_add(1).to_le_bytes())
    }

    fn count(self, memory: &GuestMemoryMmap, field: u64) -> Result<(), VmClockError> {
        let now = u64::from_le_bytes(self.get(memory, field)?);
        self.put(memory, field, &now.wrapping_add(1).to_le_bytes())
    }

    fn get<const N: usize>(self, memory: &GuestMemoryMmap, field: u64) -> Result<[u8; N], VmClockError> {
        let mut bytes = [0; N];
        memory
            .read_slice(&mut bytes, GuestAddress(self.0.0 + field))
            .map_err(|source| self.failed(source))?;
        Ok(bytes)
    }

    fn put(self, memory: &GuestMemoryMmap, field: u64, bytes: &[u8]) -> Result<(), VmClockError> {
        memory
            .write_slice(bytes, GuestAddress(self.0.0 + field))
            .map_err(|source| self.failed(source))
    }

    fn failed(self, source: GuestMemoryError) -> VmClockError {
        VmClockError {
            address: self.0.0,
            source,
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;
    use crate::virtio::testing::memory;

    const CLOCK: VmClock = VmClock(GuestAddress(0x2000));

    /// Sequence, disruptions and generations, as a guest reads them.
    fn seen(memory: &GuestMemoryMmap) -> (u32, u64, u64) {
        (
            u32::from_le_bytes(CLOCK.get(memory, 12).unwrap()),
            u64::from_le_bytes(CLOCK.get(memory, 16).unwrap()),
            u64::from_le_bytes(CLOCK.get(memory, 104).unwrap()),
        )
    }

    #[test]
    fn the_page_is_as_the_specification_has_it() {
        let memory = memory(0x4000);
        CLOCK.write(&memory).unwrap();
        let mut page = [0_u8; 112];
        memory.read_slice(&mut page, CLOCK.0).unwrap();
        let mut expected = [0_u8; 112];
        for (at, bytes) in [
            (0, &b"VCLK"[..]),
            (4, &[0, 0x10, 0, 0]),
            (8, &[1, 0]),
            (10, &[0xff]),
            (24, &[0, 3, 0, 0, 0, 0, 0, 0]),
        ] {
            expected
                .get_mut(at..at + bytes.len())
                .unwrap()
                .copy_from_slice(bytes);
        }
        assert_eq!(page, expected);
    }

    #[test]
    fn a_move_is_a_disruption_and_a_restore_another_generation_too() {
        let memory = memory(0x4000);
        CLOCK.write(&memory).unwrap();
        assert_eq!(seen(&memory), (0, 0, 0));
        CLOCK.disrupt(&memory, Disruption::Moved).unwrap();
        assert_eq!(seen(&memory), (2, 1, 0));
        CLOCK.disrupt(&memory, Disruption::Restored).unwrap();
        assert_eq!(seen(&memory), (4, 2, 1));
        // Whatever the guest has made of it, it reads an even number again.
        CLOCK.put(&memory, 12, &u32::MAX.to_le_bytes()).unwrap();
        CLOCK.put(&memory, 16, &u64::MAX.to_le_bytes()).unwrap();
        CLOCK.disrupt(&memory, Disruption::Restored).unwrap();
        assert_eq!(seen(&memory), (0, 0, 2));
    }

    #[test]
    fn where_there_is_no_page_nothing_is_written() {
        let memory = memory(0x4000);
        CLOCK.disrupt(&memory, Disruption::Restored).unwrap();
        assert_eq!(seen(&memory), (0, 0, 0));
        let beyond = VmClock(GuestAddress(0x4000));
        assert!(beyond.write(&memory).is_err() && beyond.disrupt(&memory, Disruption::Moved).is_err());
    }
}
