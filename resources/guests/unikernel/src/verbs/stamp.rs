//! `stamp`: a writer who says of each block that it is his, and what of it is safe.

use instrument::cmdline::Command;
use instrument::pattern::{SECTOR_BYTES, SECTOR_WORDS};
use instrument::stamp::{Stamp, block_of};
use instrument::width::size;

use super::Failure;
use super::disk::expect;
use super::pastime::pass;
use crate::machine::Machine;
use crate::virtio::blk::{self, Disk, Request, Setup, Status, feature, kind};
use crate::wait::Wait;
use crate::{cpu, say};

/// Sectors of a block: what one request writes.
const BLOCK_SECTORS: u64 = 8;
const BLOCK_BYTES: u64 = BLOCK_SECTORS * SECTOR_BYTES as u64;

/// Writes blocks with the stamp of one writer, flushes after every few, and then says how far it has come.
pub fn stamp(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "writer", "blocks", "count", "flush_every", "ms", "wait"])?;
    let clock = machine.clock()?;
    let wait = machine.wait(command)?;
    let writer = command.number("writer", 1)?;
    let count = command.number("count", u64::MAX)?;
    let flush_every = command.within("flush_every", 8, 1..=u64::MAX, "1 or more")?;
    let milliseconds = command.number("ms", 0)?;
    let mut disk = machine.disk(Setup::of(command.number("dev", 0)?))?;
    if !disk.has(feature::FLUSH) {
        return Err(Failure::Unsuitable("the device does not offer FLUSH"));
    }
    wait.prepare(&disk.transport, 1)?;
    let held = disk.capacity_sectors / BLOCK_SECTORS;
    let blocks = command.within("blocks", held, 1..=held, "1 to what the disk holds")?;
    let mut buffer = machine.memory.allocate(size(BLOCK_BYTES))?;
    say!("stamp: ready writer={writer} blocks={blocks}\n");
    for sequence in 1..=count {
        let start = cpu::ticks();
        let sector = block_of(writer, sequence, blocks) * BLOCK_SECTORS;
        let words = buffer.words_mut(0, size(BLOCK_SECTORS) * SECTOR_WORDS);
        for (words, sector) in words.chunks_exact_mut(SECTOR_WORDS).zip(sector..) {
            let stamp = Stamp {
                writer,
                sequence,
                sector,
            };
            stamp.fill(words);
        }
        write(&mut disk, &wait, sector, words)?;
        if sequence % flush_every == 0 || sequence == count {
            flush(&mut disk, &wait)?;
            say!("stamp: acked={sequence}\n");
        }
        pass(clock, start, milliseconds);
    }
    machine.keep(disk);
    say!("stamp: ok\n");
    Ok(())
}

fn write(disk: &mut Disk, wait: &Wait, sector: u64, words: &[u64]) -> Result<(), Failure> {
    let data = blk::data(words.as_ptr().addr() as u64, BLOCK_BYTES, false);
    let request = Request {
        kind: kind::WRITE,
        sector,
        data: Some(data),
    };
    expect(disk, wait, &request, Status::OK)
}

fn flush(disk: &mut Disk, wait: &Wait) -> Result<(), Failure> {
    let request = Request {
        kind: kind::FLUSH,
        sector: 0,
        data: None,
    };
    expect(disk, wait, &request, Status::OK)
}
