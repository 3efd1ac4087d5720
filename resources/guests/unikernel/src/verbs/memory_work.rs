//! `dirty` and `checksum`: memory that changes at a known rate and can be told from any other.

#![expect(unsafe_code, reason = "writes and reads free RAM by address")]

use instrument::cmdline::Command;
use instrument::random::mix;
use instrument::time::{Clock, Microseconds};

use super::Failure;
use crate::machine::Machine;
use crate::memory::FreePages;
use crate::{cpu, say};

const PAGE_WORDS: u64 = 512;
const MIB_PAGES: u64 = 256;

/// A working set and what was written to it: write number w went to page w mod `pages`.
struct WorkingSet {
    free: FreePages,
    pages: u64,
    seed: u64,
    writes: u64,
}

/// The longest time in which the guest did not run.
#[derive(Default)]
struct Gap {
    ticks: u64,
    start: u64,
}

/// Dirties a working set at a rate, then finds everything where it was written.
pub fn dirty(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["mib", "rate_mib_s", "seconds", "ms", "seed"])?;
    let clock = machine.clock()?;
    let free = machine.memory.free()?;
    let pages = command.number("mib", 64)?.saturating_mul(MIB_PAGES);
    if pages == 0 || pages > free.count() {
        return Err(Failure::Unsuitable("mib is 0, or more than the guest has free"));
    }
    let pages_per_second = match command.text("rate_mib_s") {
        None | Some("max") => u64::MAX,
        Some(_) => command.number("rate_mib_s", 0)?.saturating_mul(MIB_PAGES),
    };
    let milliseconds = command.number("seconds", 5)?.saturating_mul(1000);
    let milliseconds = command.number("ms", milliseconds)?;
    let mut set = WorkingSet {
        free,
        pages,
        seed: command.number("seed", 1)?,
        writes: 0,
    };
    // The first round makes the memory resident; what that costs is not the gap that is looked for.
    (0..pages).for_each(|_| set.write());
    say!("dirty: ready\n");
    let start = cpu::ticks();
    let gap = set.run(clock, clock.ticks(milliseconds), pages_per_second);
    let ticks = cpu::ticks() - start;
    set.verify()?;
    say!(
        "dirty: ok mib={} pages={} ms={} gap_us={} gap_tsc={} checksum={:#018x}\n",
        pages / MIB_PAGES,
        set.writes - pages,
        clock.nanoseconds(ticks) / 1_000_000,
        Microseconds(clock.nanoseconds(gap.ticks)),
        gap.start,
        checksum_of(&set.free, pages)
    );
    Ok(())
}

/// Prints a checksum of the memory that `dirty` would use first.
pub fn checksum(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["mib"])?;
    let free = machine.memory.free()?;
    let pages = match command.text("mib") {
        None => free.count(),
        Some(_) => command.number("mib", 0)?.saturating_mul(MIB_PAGES),
    };
    if pages > free.count() {
        return Err(Failure::Unsuitable("the guest has less free memory"));
    }
    say!(
        "checksum: mib={} checksum={:#018x}\n",
        pages / MIB_PAGES,
        checksum_of(&free, pages)
    );
    Ok(())
}

/// Depends on every word and on its place.
fn checksum_of(free: &FreePages, pages: u64) -> u64 {
    (0..pages).map(|page| free.page(page)).fold(0, |sum, page| {
        (0..PAGE_WORDS).fold(sum, |sum: u64, word| {
            (sum.rotate_left(5) ^ read(page + 8 * word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        })
    })
}

impl WorkingSet {
    /// Writes for a time, never ahead of the rate; returns the longest time between two looks at the clock.
    fn run(&mut self, clock: Clock, duration_ticks: u64, pages_per_second: u64) -> Gap {
        let start = cpu::ticks();
        let first = self.writes;
        let mut gap = Gap::default();
        let mut now = start;
        while now.saturating_sub(start) < duration_ticks {
            let due = match pages_per_second {
                u64::MAX => u64::MAX,
                rate => u64::try_from(
                    u128::from(now - start) * u128::from(rate) / (u128::from(clock.khz()) * 1000),
                )
                .unwrap_or(u64::MAX),
            };
            if self.writes - first < due {
                self.write();
            } else {
                cpu::relax();
            }
            let next = cpu::ticks();
            if next.saturating_sub(now) > gap.ticks {
                gap = Gap {
                    ticks: next - now,
                    start: now,
                };
            }
            now = next;
        }
        gap
    }

    fn write(&mut self) {
        let address = self.address(self.writes % self.pages);
        // SAFETY: a word of a free page, which nobody else uses while a command runs.
        unsafe { (address as *mut u64).write_volatile(mix(self.seed ^ self.writes)) };
        self.writes += 1;
    }

    /// Finds in every page what was written to it last.
    fn verify(&self) -> Result<(), Failure> {
        for page in 0..self.pages {
            let last_write = page + (self.writes - 1 - page) / self.pages * self.pages;
            let expected = mix(self.seed ^ last_write);
            let address = self.address(page);
            let found = read(address);
            if found != expected {
                return Err(Failure::Damaged {
                    address,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }

    /// The word of a page that is written: another place in each, for the caches' sake.
    fn address(&self, page: u64) -> u64 {
        self.free.page(page) + 8 * (page % PAGE_WORDS)
    }
}

fn read(address: u64) -> u64 {
    // SAFETY: a word of a free page; all are mapped.
    unsafe { (address as *const u64).read_volatile() }
}
