//! How a guest ends itself: the exit port, and ACPI's sleep and reset registers (ACPI 6.5, 4.8.3.6, 4.8.3.7).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::wait::borrow;

/// The first of [`POWER_PORTS`] I/O ports of the power device.
pub const POWER_PORT: u16 = 0x600;
/// How many ports it has.
pub const POWER_PORTS: u16 = 8;
/// FADT: the sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = POWER_PORT;
/// FADT: the sleep status register.
pub const SLEEP_STATUS_PORT: u16 = POWER_PORT + 1;
/// FADT: the reset register.
pub const RESET_PORT: u16 = POWER_PORT + 2;
/// FADT: what a guest writes to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 6;
/// DSDT: the sleep type of `_S5`, soft off.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// The port that takes the guest's exit status, one byte.
pub const EXIT_PORT: u16 = POWER_PORT + 4;

const SLEEP_CONTROL: u64 = (SLEEP_CONTROL_PORT - POWER_PORT) as u64;
const RESET: u64 = (RESET_PORT - POWER_PORT) as u64;
const EXIT: u64 = (EXIT_PORT - POWER_PORT) as u64;
const SLEEP_ENABLE: u8 = 1 << 5;

/// How a guest ended by its own will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It wrote an exit status.
    Exit(u8),
    /// It powered the machine off.
    PowerOff,
    /// It reset the machine.
    Reset,
}

/// The one end of a guest, told by whichever device hears of it first.
#[derive(Debug)]
pub struct EndSignal {
    end: OnceLock<GuestEnd>,
    event: EventFd,
}

impl EndSignal {
    /// A guest that has not ended.
    ///
    /// # Errors
    ///
    /// When no eventfd can be made.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            end: OnceLock::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    /// The guest has ended; the first end is the one that counts.
    pub fn signal(&self, end: GuestEnd) {
        if self.end.set(end).is_ok() {
            // Refused only by a full counter: this is the first and only write.
            let _ = self.event.write(1);
        }
    }

    /// How the guest has ended, if it has.
    pub fn end(&self) -> Option<GuestEnd> {
        self.end.get().copied()
    }
}

/// Readable, for ever, once the guest has ended.
impl AsFd for EndSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.event)
    }
}

/// The power device at [`POWER_PORT`].
#[derive(Debug)]
pub struct Power {
    end: Arc<EndSignal>,
}

impl Power {
    /// A device that tells `end`.
    pub fn new(end: Arc<EndSignal>) -> Self {
        Self { end }
    }
}

impl BusDevice for Power {
    /// The sleep status is never "woken up", and nothing else can be read.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Takes the first byte of a write of any width at the register itself.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else {
            return;
        };
        let off = SLEEP_ENABLE | SLEEP_TYPE_OFF << 2;
        match offset {
            // The other bits of the register are reserved or do not matter here.
            SLEEP_CONTROL if value & (SLEEP_ENABLE | 7 << 2) == off => self.end.signal(GuestEnd::PowerOff),
            RESET if value == RESET_VALUE => self.end.signal(GuestEnd::Reset),
            EXIT => self.end.signal(GuestEnd::Exit(value)),
            _ => {}
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// The end that a guest's writes lead to.
    fn end_of(writes: &[(u64, &[u8])]) -> Option<GuestEnd> {
        let end = EndSignal::new().unwrap();
        let mut power = Power::new(Arc::clone(&end));
        for (offset, data) in writes {
            power.write(*offset, data);
        }
        assert_eq!(end.event.read().is_ok(), end.end().is_some());
        end.end()
    }

    #[test]
    fn an_exit_status_ends_the_guest() {
        assert_eq!(end_of(&[(4, &[0])]), Some(GuestEnd::Exit(0)));
        assert_eq!(end_of(&[(4, &[42, 0, 0, 0])]), Some(GuestEnd::Exit(42)));
    }

    #[test]
    fn soft_off_is_the_only_sleep() {
        assert_eq!(end_of(&[(0, &[0x34])]), Some(GuestEnd::PowerOff));
        for value in [0x14, 0x20, 0x30, 0x2c] {
            assert_eq!(end_of(&[(0, &[value])]), None, "sleep control {value:#x}");
        }
    }

    #[test]
    fn the_reset_register_takes_its_value_only() {
        assert_eq!(end_of(&[(2, &[6])]), Some(GuestEnd::Reset));
        assert_eq!(
            end_of(&[(2, &[1]), (1, &[6]), (3, &[6]), (7, &[6]), (4, &[])]),
            None
        );
    }

    #[test]
    fn the_first_end_counts() {
        assert_eq!(
            end_of(&[(4, &[1]), (2, &[6]), (4, &[2])]),
            Some(GuestEnd::Exit(1))
        );
    }

    #[test]
    fn whoever_waits_for_the_end_is_woken() {
        let end = EndSignal::new().unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let started = Instant::now();
                crate::wait::wait(&[&end.event], Some(Duration::from_secs(10)));
                (end.end(), started.elapsed() < Duration::from_secs(10))
            });
            end.signal(GuestEnd::Reset);
            assert_eq!(waiter.join().unwrap(), (Some(GuestEnd::Reset), true));
        });
    }

    #[test]
    fn the_sleep_status_reads_as_zero() {
        let mut data = [0xee; 2];
        Power::new(EndSignal::new().unwrap()).read(1, &mut data);
        assert_eq!(data, [0, 0]);
    }
}
