//! `pmem-write`, `pmem-verify`, `pmem-flush`: what is stored in persistent memory and found there.

#![expect(unsafe_code, reason = "writes and reads persistent memory by address")]

use core::slice;

use instrument::cmdline::Command;
use instrument::pattern::{self, SECTOR_BYTES, SECTOR_WORDS};
use instrument::width::size;

use super::Failure;
use crate::machine::Machine;
use crate::memory::Region;
use crate::say;
use crate::virtio::blk::{self, Request, Setup, Status, kind};
use crate::virtio::pmem::{DONE, Pmem};

const MIB: u64 = 1 << 20;

/// Stores the pattern of a seed, and has it reach the medium unless `flush=0`.
pub fn write(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "mib", "offset_mib", "seed", "flush", "wait"])?;
    let seed = command.number("seed", 1)?;
    let wait = machine.wait(command)?;
    let mut pmem = Pmem::open(machine, command.number("dev", 0)?)?;
    wait.prepare(&pmem.transport, 1)?;
    let range = range(command, pmem.region)?;
    for (sector, address) in sectors(range, pmem.region) {
        // SAFETY: a sector of persistent memory, which is mapped, and which nobody else uses while a command runs.
        let words = unsafe { slice::from_raw_parts_mut(address as *mut u64, SECTOR_WORDS) };
        pattern::fill(words, seed, sector);
    }
    if command.switch("flush", true)? {
        flushed(pmem.flush(&wait)?)?;
    }
    say!("pmem-write: ok bytes={} at={:#x}\n", range.bytes(), range.base);
    Ok(())
}

/// Finds the pattern of a seed.
pub fn verify(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "mib", "offset_mib", "seed"])?;
    let seed = command.number("seed", 1)?;
    let pmem = Pmem::open(machine, command.number("dev", 0)?)?;
    let range = range(command, pmem.region)?;
    for (sector, address) in sectors(range, pmem.region) {
        // SAFETY: as above; nobody writes it.
        let words = unsafe { slice::from_raw_parts(address as *const u64, SECTOR_WORDS) };
        pattern::verify(words, seed, sector)?;
    }
    say!("pmem-verify: ok bytes={}\n", range.bytes());
    Ok(())
}

/// Has what was stored reach the medium, so often.
pub fn flush(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "wait", "count"])?;
    let wait = machine.wait(command)?;
    let mut pmem = Pmem::open(machine, command.number("dev", 0)?)?;
    wait.prepare(&pmem.transport, 1)?;
    for _ in 0..command.number("count", 1)? {
        flushed(pmem.flush(&wait)?)?;
    }
    say!("pmem-flush: ok\n");
    Ok(())
}

/// Stores one word where nothing may be stored, and finds what was there before.
pub fn read_only(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev"])?;
    let pmem = Pmem::open(machine, command.number("dev", 0)?)?;
    let word = pmem.region.base as *mut u64;
    // SAFETY: the first word of persistent memory, which is mapped.
    let before = unsafe { word.read_volatile() };
    // SAFETY: as above.
    unsafe { word.write_volatile(!before) };
    // SAFETY: as above.
    let after = unsafe { word.read_volatile() };
    if after != before {
        return Err(Failure::Damaged {
            address: pmem.region.base,
            expected: before,
            found: after,
        });
    }
    say!("pmem-read-only: ok\n");
    Ok(())
}

/// Has a disk read into persistent memory, which is no memory to it: the request fails, and nothing else does.
pub fn by_disk(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "wait"])?;
    let wait = machine.wait(command)?;
    let pmem = Pmem::open(machine, command.number("dev", 0)?)?;
    let mut disk = machine.disk(Setup::of(0))?;
    let lane = disk.lane()?;
    lane.submit(
        0,
        &Request {
            kind: kind::READ,
            sector: 0,
            data: Some(blk::data(pmem.region.base, SECTOR_BYTES as u64, true)),
        },
    );
    lane.queue.kick();
    if wait.finished(lane)?.status == Status::OK {
        return Err(Failure::Check("a disk has read into persistent memory"));
    }
    let buffer = machine.memory.allocate(SECTOR_BYTES)?;
    let honest = Request {
        kind: kind::READ,
        sector: 0,
        data: Some(blk::data(buffer.address(), SECTOR_BYTES as u64, true)),
    };
    super::disk::expect(&mut disk, &wait, &honest, Status::OK)?;
    machine.keep(disk);
    say!("pmem-by-disk: ok\n");
    Ok(())
}

fn flushed(answer: u32) -> Result<(), Failure> {
    match answer {
        DONE => Ok(()),
        _ => Err(Failure::Check("a flush has failed")),
    }
}

/// What a command names of a region: by default all of it.
fn range(command: &Command<'static>, region: Region) -> Result<Region, Failure> {
    let base = command
        .number("offset_mib", 0)?
        .saturating_mul(MIB)
        .saturating_add(region.base);
    let end = match command.text("mib") {
        None => region.end,
        Some(_) => base.saturating_add(command.number("mib", 0)?.saturating_mul(MIB)),
    };
    if base > end || end > region.end {
        return Err(Failure::Unsuitable("the device ends before the range does"));
    }
    Ok(Region { base, end })
}

/// The sectors of a range: their numbers in the region, and their addresses.
fn sectors(range: Region, region: Region) -> impl Iterator<Item = (u64, u64)> {
    let step = SECTOR_BYTES as u64;
    (range.base..range.end)
        .step_by(size(step))
        .map(move |address| ((address - region.base) / step, address))
}
