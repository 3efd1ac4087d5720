//! Finds out how fast the TSC ticks.

use core::fmt;

use instrument::cmdline::{ArgumentError, CommandLine};
use instrument::time::Clock;

use crate::cpu;

/// Why the frequency is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// `tsc_khz=` is no number.
    Malformed(ArgumentError<'static>),
    /// `tsc_khz=` is a number that no TSC has.
    Impossible {
        /// The number.
        khz: u64,
    },
    /// Nobody says it, and the timer that would tell does not run.
    NoSource,
}

impl fmt::Display for Unknown {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(error) => error.fmt(out),
            Self::Impossible { khz } => write!(out, "no TSC has {khz} kHz"),
            Self::NoSource => write!(
                out,
                "the TSC's frequency is unknown: pass tsc_khz=N on the command line"
            ),
        }
    }
}

const TSC_LEAF: u32 = 0x15;
const HYPERVISOR_LEAF: u32 = 0x4000_0000;
const HYPERVISOR_TSC_LEAF: u32 = 0x4000_0010;

/// The PIT's third channel, its control port, and the port that gates and shows it.
const PIT_CHANNEL2: u16 = 0x42;
const PIT_CONTROL: u16 = 0x43;
const PIT_GATE: u16 = 0x61;
/// Channel 2, low byte then high byte, mode 0: the output rises at the end of the count.
const PIT_COUNT_DOWN: u8 = 0b1011_0000;
const PIT_OUTPUT: u8 = 1 << 5;
/// 20 ms at 1 193 182 Hz.
const PIT_COUNT: u16 = 23_864;
const PIT_MICROSECONDS: u64 = 20_000;
const PIT_MEASUREMENTS: u32 = 5;
/// A PIT that has not ended after so many reads does not run: each read is an exit of some microseconds.
const PIT_READS_MAX: u32 = 1_000_000;

/// The clock that the command line names, else the CPU or the hypervisor, else measured by the PIT in a tenth of a
/// second.
pub fn find(line: CommandLine<'static>) -> Result<Clock, Unknown> {
    if let Some(khz) = line.number("tsc_khz").map_err(Unknown::Malformed)? {
        return Clock::new(khz).ok_or(Unknown::Impossible { khz });
    }
    from_cpu()
        .or_else(from_hypervisor)
        .or_else(from_pit)
        .ok_or(Unknown::NoSource)
}

fn from_cpu() -> Option<Clock> {
    if cpu::cpuid(0, 0).eax < TSC_LEAF {
        return None;
    }
    let leaf = cpu::cpuid(TSC_LEAF, 0);
    let hertz = u64::from(leaf.ecx) * u64::from(leaf.ebx);
    Clock::new(hertz.checked_div(u64::from(leaf.eax))? / 1000)
}

fn from_hypervisor() -> Option<Clock> {
    if cpu::cpuid(HYPERVISOR_LEAF, 0).eax < HYPERVISOR_TSC_LEAF {
        return None;
    }
    Clock::new(u64::from(cpu::cpuid(HYPERVISOR_TSC_LEAF, 0).eax))
}

/// The shortest of several measurements: a host that was busy elsewhere only makes them longer.
fn from_pit() -> Option<Clock> {
    let ticks = (0..PIT_MEASUREMENTS).map_while(|_| measure_pit()).min()?;
    Clock::new(ticks * 1000 / PIT_MICROSECONDS)
}

/// How many ticks the PIT's count takes; `None` if it does not end.
fn measure_pit() -> Option<u64> {
    let gate = cpu::in8(PIT_GATE) & !0b11;
    cpu::out8(PIT_GATE, gate | 1);
    cpu::out8(PIT_CONTROL, PIT_COUNT_DOWN);
    let [low, high] = PIT_COUNT.to_le_bytes();
    cpu::out8(PIT_CHANNEL2, low);
    let start = cpu::ticks();
    cpu::out8(PIT_CHANNEL2, high);
    let ended = (0..PIT_READS_MAX).any(|_| cpu::in8(PIT_GATE) & PIT_OUTPUT != 0);
    ended.then(|| cpu::ticks() - start)
}
