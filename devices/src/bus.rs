//! From a guest address to the device behind it, for port I/O and for MMIO.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What answers accesses to a range of addresses.
///
/// Both calls come from vCPU threads, with any offset and width that a guest can produce inside the
/// range (1, 2, 4 or 8 bytes). They never wait for the guest or for a peer.
pub trait BusDevice: Send {
    /// Fills all of `data` from the registers at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes a write of `data` to the registers at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Addresses from `start`, `len` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusRange {
    /// The first address.
    pub start: u64,
    /// How many addresses.
    pub len: u64,
}

impl BusRange {
    fn last(&self) -> u64 {
        self.start.saturating_add(self.len - 1)
    }
}

impl fmt::Display for BusRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.last())
    }
}

/// Why a device could not be put on a bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// It has no addresses, or some beyond the end of the address space.
    #[error("`{name}` asks for {len} addresses at {start:#x}")]
    Range {
        /// The device.
        name: String,
        /// Its first address.
        start: u64,
        /// How many.
        len: u64,
    },
    /// Its addresses are taken.
    #[error("`{name}` at {range} overlaps `{other}` at {other_range}")]
    Overlap {
        /// The device.
        name: String,
        /// Where it should go.
        range: BusRange,
        /// The device that is there.
        other: String,
        /// Its addresses.
        other_range: BusRange,
    },
}

struct Slot {
    range: BusRange,
    name: String,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// One address space. Filled when the machine is built, then shared by its vCPU threads; each device has its own lock.
#[derive(Default)]
pub struct Bus {
    /// Sorted by address, without overlaps.
    slots: Vec<Slot>,
    unclaimed_reads: AtomicU64,
    unclaimed_writes: AtomicU64,
}

impl Bus {
    /// A bus on which nothing answers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `range`; `name` is for messages.
    ///
    /// # Errors
    ///
    /// When the range is empty or not free.
    pub fn insert(
        &mut self,
        range: BusRange,
        name: &str,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let BusRange { start, len } = range;
        let name = name.to_owned();
        if len == 0 || start.checked_add(len - 1).is_none() {
            return Err(BusError::Range { name, start, len });
        }
        let overlapping = |slot: &&Slot| slot.range.start <= range.last() && start <= slot.range.last();
        if let Some(taken) = self.slots.iter().find(overlapping) {
            let (other, other_range) = (taken.name.clone(), taken.range);
            return Err(BusError::Overlap {
                name,
                range,
                other,
                other_range,
            });
        }
        let at = self.slots.partition_point(|slot| slot.range.start < start);
        self.slots.insert(at, Slot { range, name, device });
        Ok(())
    }

    /// Carries a read to its device; where nothing answers the bus floats high, and all bits read as one.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((slot, offset)) => slot.locked(|device| device.read(offset, data)),
            None => {
                self.unclaimed_reads.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
    }

    /// Carries a write to its device, or nowhere.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address, data.len()) {
            Some((slot, offset)) => slot.locked(|device| device.write(offset, data)),
            None => {
                self.unclaimed_writes.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Reads that no device answered, so far.
    pub fn unclaimed_reads(&self) -> u64 {
        self.unclaimed_reads.load(Ordering::Relaxed)
    }

    /// Writes that no device took, so far.
    pub fn unclaimed_writes(&self) -> u64 {
        self.unclaimed_writes.load(Ordering::Relaxed)
    }

    /// The device that has all of the access, and the offset into it.
    fn find(&self, address: u64, len_bytes: usize) -> Option<(&Slot, u64)> {
        let after = self.slots.partition_point(|slot| slot.range.start <= address);
        let slot = self.slots.get(after.checked_sub(1)?)?;
        let offset = address - slot.range.start;
        let len = u64::try_from(len_bytes).ok()?;
        (offset < slot.range.len && len <= slot.range.len - offset).then_some((slot, offset))
    }
}

impl Slot {
    fn locked(&self, access: impl FnOnce(&mut dyn BusDevice)) {
        // A panic ends the process, so a poisoned lock is only ever seen by tests.
        access(&mut *self.device.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.slots.iter().map(|slot| (slot.range.to_string(), &slot.name)))
            .finish()
    }
}

#[cfg(test)]
#[expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]
mod tests {
    use super::*;

    /// Reads as its offset, remembers the last write.
    #[derive(Default)]
    struct Echo(Option<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0 = Some((offset, data.to_vec()));
        }
    }

    fn bus(ranges: &[(u64, u64, &str)]) -> (Bus, Vec<Arc<Mutex<Echo>>>) {
        let mut bus = Bus::new();
        let devices = ranges.iter().map(|&(start, len, name)| {
            let device = Arc::new(Mutex::new(Echo::default()));
            bus.insert(
                BusRange { start, len },
                name,
                Arc::clone(&device) as Arc<Mutex<dyn BusDevice>>,
            )
            .unwrap();
            device
        });
        let devices = devices.collect();
        (bus, devices)
    }

    #[test]
    fn an_access_reaches_its_device_with_its_offset() {
        let (bus, devices) = bus(&[(0x3f8, 8, "serial"), (0x60, 5, "i8042"), (0x600, 8, "power")]);
        let mut data = [0];
        bus.read(0x3fd, &mut data);
        assert_eq!(data, [5]);
        bus.write(0x604, &[1, 2]);
        assert_eq!(devices[2].lock().unwrap().0, Some((4, vec![1, 2])));
        assert_eq!((bus.unclaimed_reads(), bus.unclaimed_writes()), (0, 0));
    }

    #[test]
    fn where_nothing_answers_all_bits_are_one_and_writes_are_counted() {
        let (bus, devices) = bus(&[(0x60, 5, "i8042"), (u64::MAX, 1, "last")]);
        for (address, len) in [(0x5f, 1), (0x65, 1), (0x64, 2), (0, 8), (u64::MAX, 8)] {
            let mut data = vec![0; len];
            bus.read(address, &mut data);
            assert_eq!(data, vec![0xff; len], "at {address:#x}");
            bus.write(address, &data);
        }
        assert_eq!((bus.unclaimed_reads(), bus.unclaimed_writes()), (5, 5));
        assert!(devices.iter().all(|device| device.lock().unwrap().0.is_none()));
    }

    #[test]
    fn overlapping_ranges_are_refused_by_both_names() {
        let (mut bus, _) = bus(&[(0x100, 0x10, "first")]);
        for (start, len) in [(0xff, 2), (0x10f, 1), (0x100, 0x10), (0, 0x1000)] {
            let device = Arc::new(Mutex::new(Echo::default()));
            let error = bus.insert(BusRange { start, len }, "second", device).unwrap_err();
            assert!(matches!(error, BusError::Overlap { .. }));
            assert!(
                error.to_string().contains("`second`")
                    && error.to_string().contains("`first` at 0x100-0x10f")
            );
        }
    }

    #[test]
    fn a_range_that_is_empty_or_leaves_the_address_space_is_refused() {
        let mut bus = Bus::new();
        for (start, len) in [(0x100, 0), (u64::MAX, 2)] {
            let error = bus.insert(
                BusRange { start, len },
                "odd",
                Arc::new(Mutex::new(Echo::default())),
            );
            assert_eq!(
                error.unwrap_err(),
                BusError::Range {
                    name: "odd".to_owned(),
                    start,
                    len
                }
            );
        }
    }
}
