//! Firecracker's boot timer: a guest that has booted writes a byte, and the log says how long it took.

use std::fmt;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::bus::BusDevice;

/// The byte that says "booted", at offset 0.
const BOOTED: u8 = 123;
/// As many reports are logged: a guest that goes on reporting fills no log.
const REPORTS_MAX: u8 = 16;

/// Measures from its making to each report of the guest. It has no state that would go on elsewhere: after a restore it
/// measures from the restore.
#[derive(Debug)]
pub struct BootTimer {
    begun: Instant,
    begun_cpu: Duration,
    reports: u8,
}

impl BootTimer {
    /// A timer that begins now.
    pub fn begin() -> Self {
        Self {
            begun: Instant::now(),
            begun_cpu: process_cpu_time(),
            reports: 0,
        }
    }

    /// How long it took, if this write says that the guest has booted.
    fn take(&mut self, offset: u64, data: &[u8]) -> Option<BootTime> {
        if (offset, data) != (0, &[BOOTED]) || self.reports == REPORTS_MAX {
            return None;
        }
        self.reports += 1;
        Some(BootTime {
            wall: self.begun.elapsed(),
            cpu: process_cpu_time().saturating_sub(self.begun_cpu),
        })
    }
}

/// Only a write of one byte is looked at; reads give zero.
impl BusDevice for BootTimer {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(time) = self.take(offset, data) {
            log::info!("{time}");
        }
    }
}

/// Time on the clock, and CPU time of the whole process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BootTime {
    wall: Duration,
    cpu: Duration,
}

/// Tools look for this line: it is Firecracker's to the letter.
impl fmt::Display for BootTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wall, cpu } = self;
        write!(
            f,
            "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
            wall.as_micros(),
            wall.as_millis(),
            cpu.as_micros(),
            cpu.as_millis()
        )
    }
}

fn process_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).expect("a process has used no negative time")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_the_one_that_tools_look_for() {
        let time = BootTime {
            wall: Duration::from_micros(61_234),
            cpu: Duration::from_micros(9_876_543),
        };
        assert_eq!(
            time.to_string(),
            "Guest-boot-time =  61234 us 61 ms, 9876543 CPU us 9876 CPU ms"
        );
    }

    #[test]
    fn a_report_has_the_time_since_the_beginning_on_both_clocks() {
        let mut timer = BootTimer::begin();
        let spun = Duration::from_millis(3);
        while process_cpu_time() < timer.begun_cpu + spun || timer.begun.elapsed() < spun {}
        let time = timer.take(0, &[123]).unwrap();
        assert!(time.wall >= spun && time.cpu >= spun, "{time}");
    }

    #[test]
    fn only_the_byte_that_says_so_is_a_report() {
        let mut timer = BootTimer::begin();
        for (offset, data) in [(0, &[122][..]), (1, &[123]), (0, &[123, 0, 0, 0]), (0, &[])] {
            assert_eq!(timer.take(offset, data), None, "{offset} {data:?}");
        }
        let mut data = [0xee; 4];
        timer.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn a_guest_that_goes_on_reporting_fills_no_log() {
        let mut timer = BootTimer::begin();
        let reports = (0..1000).filter(|_| timer.take(0, &[123]).is_some()).count();
        assert_eq!(reports, 16);
    }
}
