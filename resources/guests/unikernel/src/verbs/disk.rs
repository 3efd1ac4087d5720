//! What is written to a disk and read back.

use instrument::cmdline::Command;
use instrument::pattern::{self, Mismatch, SECTOR_BYTES};
use instrument::width::{low16, size};

use super::Failure;
use super::pastime::pass;
use crate::machine::Machine;
use crate::memory::Buffer;
use crate::virtio::blk::{self, Disk, Request, Setup, Status, kind};
use crate::virtio::mmio::{Kind, Transport};
use crate::wait::Wait;
use crate::{cpu, say};

/// A range of a disk, in blocks, by several requests at a time.
struct Sweep {
    first_sector: u64,
    sectors: u64,
    block_sectors: u64,
    depth: u16,
    wait: Wait,
}

/// What a sweep does with each block: it fills the words before a write, or looks at them after a read.
type Visit<'a> = &'a mut dyn FnMut(&mut [u64], u64) -> Result<(), Failure>;

const SECTOR: u64 = SECTOR_BYTES as u64;
const MIB_SECTORS: u64 = (1 << 20) / SECTOR;
/// Between two looks for a disk.
const AWAIT_MS: u64 = 5;
/// The largest block: what a request's one data descriptor holds.
const BLOCK_BYTES_MAX: u64 = 4 << 20;

/// Writes the pattern of a seed.
pub fn pattern_write(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "mib", "offset_mib", "seed", "bs", "depth", "wait"])?;
    let seed = command.number("seed", 1)?;
    sweep(machine, command, kind::WRITE, &mut |words, sector| {
        pattern::fill(words, seed, sector);
        Ok(())
    })
}

/// Reads the pattern of a seed back and compares every byte.
pub fn pattern_verify(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "mib", "offset_mib", "seed", "bs", "depth", "wait"])?;
    let seed = command.number("seed", 1)?;
    sweep(machine, command, kind::READ, &mut |words, sector| {
        Ok(pattern::verify(words, seed, sector)?)
    })
}

/// Reads, and finds nothing but zeroes.
pub fn read_check_zero(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "mib", "offset_mib", "bs", "depth", "wait"])?;
    sweep(machine, command, kind::READ, &mut |words, sector| match words
        .iter()
        .enumerate()
        .find(|(_, word)| **word != 0)
    {
        None => Ok(()),
        Some((index, &found)) => {
            let (sectors, word) = (index / pattern::SECTOR_WORDS, index % pattern::SECTOR_WORDS);
            Err(Mismatch::Corrupt {
                sector: sector + sectors as u64,
                word,
                expected: 0,
                found,
            }
            .into())
        }
    })
}

/// Has everything written reach the disk.
pub fn flush(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "wait"])?;
    let wait = machine.wait(command)?;
    let mut disk = machine.disk(Setup::of(command.number("dev", 0)?))?;
    wait.prepare(&disk.transport, 1)?;
    if !disk.has(blk::feature::FLUSH) {
        return Err(Failure::Unsuitable("the device does not offer FLUSH"));
    }
    expect(
        &mut disk,
        &wait,
        &Request {
            kind: kind::FLUSH,
            sector: 0,
            data: None,
        },
        Status::OK,
    )?;
    machine.keep(disk);
    say!("flush: ok\n");
    Ok(())
}

/// Waits until a disk is there that was not, or has gone.
pub fn await_disk(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "gone"])?;
    let index = command.number("dev", 0)?;
    let gone = command.number("gone", 0)? != 0;
    let clock = machine.clock()?;
    while Transport::find(machine.line, Kind::Block, index).is_ok() == gone {
        // Each look is an exit for every window.
        pass(clock, cpu::ticks(), AWAIT_MS);
    }
    say!("await-disk: ok\n");
    Ok(())
}

/// Lets go of a disk: a reset, after which nobody drives it.
pub fn release(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev"])?;
    let index = command.number("dev", 0)?;
    machine.forget_disk(index);
    Transport::find(machine.line, Kind::Block, index)?.reset()?;
    say!("release-disk: ok\n");
    Ok(())
}

/// Sends one request and compares its answer.
pub fn expect(disk: &mut Disk, wait: &Wait, request: &Request, expected: Status) -> Result<(), Failure> {
    let lane = disk.lane()?;
    lane.submit(0, request);
    lane.queue.kick();
    let found = wait.finished(lane)?.status;
    if found == expected {
        Ok(())
    } else {
        Err(Failure::Answer {
            sector: request.sector,
            expected,
            found,
        })
    }
}

/// Runs over the range that a command names.
fn sweep(
    machine: &mut Machine,
    command: &Command<'static>,
    kind: u32,
    visit: Visit<'_>,
) -> Result<(), Failure> {
    let block_bytes = command.within("bs", 65536, SECTOR..=BLOCK_BYTES_MAX, "512 to 4194304")?;
    if block_bytes % SECTOR != 0 {
        return Err(Failure::Unsuitable("bs is no multiple of 512"));
    }
    let wait = machine.wait(command)?;
    let mut disk = machine.disk(Setup::of(command.number("dev", 0)?))?;
    wait.prepare(&disk.transport, 1)?;
    let (first_sector, sectors) = range(command, disk.capacity_sectors)?;
    let slots = disk.lane()?.queue.slots();
    let depth = command.within("depth", 8, 1..=u64::from(slots), "1 to the size of the queue")?;
    let plan = Sweep {
        first_sector,
        sectors,
        block_sectors: block_bytes / SECTOR,
        depth: low16(depth),
        wait,
    };
    let mut buffer = machine.memory.allocate(size(depth * block_bytes))?;
    plan.run(&mut disk, kind, &mut buffer, visit)?;
    machine.keep(disk);
    say!("{}: ok sectors={sectors}\n", command.verb);
    Ok(())
}

/// The first sector and the number of sectors that a command names: by default all that the disk has.
pub fn range(command: &Command<'static>, capacity_sectors: u64) -> Result<(u64, u64), Failure> {
    let first = command.number("offset_mib", 0)?.saturating_mul(MIB_SECTORS);
    let left = capacity_sectors.saturating_sub(first);
    let sectors = match command.text("mib") {
        None => left,
        Some(_) => command.number("mib", 0)?.saturating_mul(MIB_SECTORS),
    };
    if sectors > left {
        return Err(Failure::Unsuitable("the disk ends before the range does"));
    }
    Ok((first, sectors))
}

impl Sweep {
    fn run(&self, disk: &mut Disk, kind: u32, buffer: &mut Buffer, visit: Visit<'_>) -> Result<(), Failure> {
        let lane = disk.lane()?;
        let blocks = self.sectors.div_ceil(self.block_sectors);
        let mut block_of_slot = [0u64; blk::SLOTS_MAX];
        let mut next = 0;
        while next < blocks.min(u64::from(self.depth)) {
            let slot = low16(next);
            self.submit(lane, kind, (slot, next), buffer, visit)?;
            if let Some(place) = block_of_slot.get_mut(usize::from(slot)) {
                *place = next;
            }
            next += 1;
        }
        lane.queue.kick();
        while lane.in_flight() > 0 {
            let finished = self.wait.finished(lane)?;
            let place = block_of_slot.get_mut(usize::from(finished.slot));
            let place = place.expect("the queue returns only slots that it has");
            let (sector, words) = self.block(*place, finished.slot, buffer);
            if finished.status != Status::OK {
                return Err(Failure::Answer {
                    sector,
                    expected: Status::OK,
                    found: finished.status,
                });
            }
            if kind == kind::READ {
                visit(words, sector)?;
            }
            if next < blocks {
                *place = next;
                self.submit(lane, kind, (finished.slot, next), buffer, visit)?;
                lane.queue.kick();
                next += 1;
            }
        }
        Ok(())
    }

    fn submit(
        &self,
        lane: &mut blk::Lane,
        kind: u32,
        (slot, block): (u16, u64),
        buffer: &mut Buffer,
        visit: Visit<'_>,
    ) -> Result<(), Failure> {
        let (sector, words) = self.block(block, slot, buffer);
        if kind == kind::WRITE {
            visit(words, sector)?;
        } else {
            // A device that answers without reading is found out.
            words.fill(!0);
        }
        let data = blk::data(
            words.as_ptr().addr() as u64,
            size_of_val(words) as u64,
            kind == kind::READ,
        );
        lane.submit(
            slot,
            &Request {
                kind,
                sector,
                data: Some(data),
            },
        );
        Ok(())
    }

    /// The first sector of a block, and its words in the buffer of its slot; the last block may be shorter.
    fn block<'a>(&self, block: u64, slot: u16, buffer: &'a mut Buffer) -> (u64, &'a mut [u64]) {
        let offset = block * self.block_sectors;
        let words = size(self.block_sectors.min(self.sectors - offset)) * pattern::SECTOR_WORDS;
        let start = usize::from(slot) * size(self.block_sectors) * pattern::SECTOR_WORDS;
        (self.first_sector + offset, buffer.words_mut(start, words))
    }
}
