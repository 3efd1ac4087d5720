//! Which places of a machine have a device, and to which one has come: what the DSDT asks before and after the guest is told.
//!
//! ```text
//!   + 0  OCCU  a bit for each place that has a device                      read-only
//!   + 4  CHNG  a bit for each place to which one has come since            ones that are written clear their bits
//! ```
//!
//! Both have 32 bits. A guest that writes to them deceives nobody but itself: the monitor knows its devices without them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;

/// The first of [`HOTPLUG_PORTS`] I/O ports.
pub const HOTPLUG_PORT: u16 = 0x610;
/// How many ports there are.
pub const HOTPLUG_PORTS: u16 = 8;

const OCCUPIED: u64 = 0;
const CHANGED: u64 = 4;

/// The places of one machine.
#[derive(Debug)]
pub struct Hotplug {
    occupied: AtomicU32,
    changed: AtomicU32,
    line: EventFd,
}

impl Hotplug {
    /// Places without devices.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            occupied: AtomicU32::new(0),
            changed: AtomicU32::new(0),
            line: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    /// The interrupt line of the generic event device.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// A device is there from the beginning.
    ///
    /// # Panics
    ///
    /// As [`Self::came`].
    pub fn is_there(&self, place: u32) {
        self.occupied.fetch_or(bit(place), Ordering::SeqCst);
    }

    /// A device has come while the guest runs, which is told.
    ///
    /// # Panics
    ///
    /// When there cannot be such a place.
    pub fn came(&self, place: u32) {
        self.is_there(place);
        self.changed.fetch_or(bit(place), Ordering::SeqCst);
        self.raise();
    }

    /// A device has gone. The guest knows: its driver has let go of it.
    ///
    /// # Panics
    ///
    /// As [`Self::came`].
    pub fn went(&self, place: u32) {
        self.occupied.fetch_and(!bit(place), Ordering::SeqCst);
        self.changed.fetch_and(!bit(place), Ordering::SeqCst);
    }

    /// The places to which a device has come and of which the guest has not heard yet.
    pub fn unheard(&self) -> u32 {
        self.changed.load(Ordering::SeqCst)
    }

    /// Goes on with what a guest had not heard, before its first device is there.
    pub fn restore(&self, unheard: u32) {
        self.changed.store(unheard, Ordering::SeqCst);
    }

    /// Tells the guest once more, and says so, if there is anything that it has not heard: it may have had nobody yet who
    /// listens, or its interrupt controllers have become what they were before.
    pub fn again(&self) -> bool {
        let is_unheard = self.unheard() != 0;
        if is_unheard {
            self.raise();
        }
        is_unheard
    }

    fn raise(&self) {
        if let Err(error) = self.line.write(1) {
            log::error!("the guest is not told of its devices: {error}");
        }
    }
}

fn bit(place: u32) -> u32 {
    1_u32
        .checked_shl(place)
        .expect("a machine has fewer places than that")
}

/// The registers of a machine's places.
#[derive(Debug)]
pub struct HotplugRegisters(pub Arc<Hotplug>);

/// Accesses of 32 bits at a register; others read as zero and change nothing.
impl BusDevice for HotplugRegisters {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let register = match offset {
            OCCUPIED => &self.0.occupied,
            CHANGED => &self.0.changed,
            _ => return,
        };
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = register.load(Ordering::SeqCst).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (CHANGED, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) {
            self.0
                .changed
                .fetch_and(!u32::from_le_bytes(data), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn read(registers: &mut HotplugRegisters, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_guest_hears_of_a_device_once_and_sees_it_as_long_as_it_is_there() {
        let hotplug = Hotplug::new().unwrap();
        let mut registers = HotplugRegisters(Arc::clone(&hotplug));
        hotplug.is_there(0);
        assert!(
            hotplug.line().read().is_err(),
            "a guest that boots looks by itself"
        );
        assert_eq!((read(&mut registers, 0), read(&mut registers, 4)), (1, 0));
        hotplug.came(3);
        hotplug.came(17);
        assert_eq!(hotplug.line().read().unwrap(), 2);
        let heard = read(&mut registers, 4);
        assert_eq!(
            (read(&mut registers, 0), heard),
            (1 << 17 | 0b1001, 1 << 17 | 0b1000)
        );
        hotplug.came(4);
        registers.write(4, &heard.to_le_bytes());
        assert_eq!(
            read(&mut registers, 4),
            1 << 4,
            "what came meanwhile is not forgotten"
        );
        assert_eq!(hotplug.line().read().unwrap(), 1);
        assert!(hotplug.again() && hotplug.line().read().is_ok());
        hotplug.went(4);
        assert!(!hotplug.again() && hotplug.line().read().is_err());
        hotplug.went(3);
        assert_eq!(
            (read(&mut registers, 0), read(&mut registers, 4)),
            (1 << 17 | 1, 0)
        );
    }

    #[test]
    fn other_accesses_change_nothing() {
        let hotplug = Hotplug::new().unwrap();
        let mut registers = HotplugRegisters(Arc::clone(&hotplug));
        hotplug.came(1);
        for (offset, data) in [
            (0, &[0xff; 4][..]),
            (4, &[0xff; 2]),
            (5, &[0xff; 1]),
            (4, &[0xff; 8]),
            (8, &[0xff; 4]),
        ] {
            registers.write(offset, data);
            let mut other = vec![0xee; data.len()];
            registers.read(offset, &mut other);
            assert!(data.len() == 4 || other.iter().all(|byte| *byte == 0));
        }
        assert_eq!((read(&mut registers, 0), read(&mut registers, 4)), (2, 2));
    }
}
