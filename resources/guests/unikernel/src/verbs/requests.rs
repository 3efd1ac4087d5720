//! Single requests to a disk: what it is, what it discards, and what it must refuse.

use instrument::cmdline::Command;
use instrument::pattern::SECTOR_BYTES;
use instrument::width::size;

use super::Failure;
use super::disk::{expect, range};
use crate::machine::Machine;
use crate::say;
use crate::virtio::blk::{self, Disk, Request, Setup, Status, config, feature, kind};
use crate::wait::Wait;

const SECTOR: u64 = SECTOR_BYTES as u64;
/// Bytes of a device's identity (virtio 1.2, section 5.2.6).
const IDENTITY_BYTES: u64 = 20;
/// A segment of a discard: sector, number of sectors, flags.
const SEGMENT_BYTES: u64 = 16;
/// The flag that lets a device unmap what it zeroes.
const UNMAP: u32 = 1;
/// A type of request that no device knows.
const UNKNOWN_KIND: u32 = 0x7fff_fffe;

/// Prints what the device says it is.
pub fn capacity(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev"])?;
    let mut disk = machine.disk(Setup::of(command.number("dev", 0)?))?;
    disk.measure();
    let transport = &disk.transport;
    say!(
        "capacity: sectors={} features={:#x} offered={:#x} read_only={} block_bytes={} size_max={} seg_max={} queues={} \
         queue_size={} writeback={} discard_sectors_max={} write_zeroes_sectors_max={}\n",
        disk.capacity_sectors,
        disk.features,
        transport.offered(),
        u8::from(disk.has(feature::READ_ONLY)),
        if disk.has(feature::BLOCK_SIZE) {
            transport.config32(config::BLOCK_SIZE)
        } else {
            512
        },
        if disk.has(feature::SIZE_MAX) {
            transport.config32(config::SIZE_MAX)
        } else {
            0
        },
        if disk.has(feature::SEG_MAX) {
            transport.config32(config::SEG_MAX)
        } else {
            0
        },
        if disk.has(feature::MULTI_QUEUE) {
            transport.config16(config::QUEUES)
        } else {
            1
        },
        transport.queue_size_max(0),
        if disk.has(feature::CONFIG_WCE) {
            transport.config8(config::WRITEBACK)
        } else {
            0
        },
        if disk.has(feature::DISCARD) {
            transport.config32(config::DISCARD_SECTORS_MAX)
        } else {
            0
        },
        if disk.has(feature::WRITE_ZEROES) {
            transport.config32(config::WRITE_ZEROES_SECTORS_MAX)
        } else {
            0
        },
    );
    machine.keep(disk);
    Ok(())
}

/// Prints the device's identity, which is what `id=` says where that is given.
pub fn identity(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "id", "wait"])?;
    let (mut disk, wait) = open(machine, command)?;
    let mut buffer = machine.memory.allocate(size(IDENTITY_BYTES))?;
    let data = blk::data(buffer.address(), IDENTITY_BYTES, true);
    expect(
        &mut disk,
        &wait,
        &Request {
            kind: kind::IDENTITY,
            sector: 0,
            data: Some(data),
        },
        Status::OK,
    )?;
    machine.keep(disk);
    let bytes = buffer.bytes_mut();
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let identity = core::str::from_utf8(bytes.get(..end).unwrap_or_default()).unwrap_or("(not UTF-8)");
    say!("identity: id={identity}\n");
    match command.text("id") {
        Some(expected) if expected != identity => Err(Failure::Check("the identity is another")),
        _ => Ok(()),
    }
}

/// Discards a range.
pub fn discard(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "mib", "offset_mib", "wait"])?;
    let (disk, wait) = open(machine, command)?;
    if !disk.has(feature::DISCARD) {
        return Err(Failure::Unsuitable("the device does not offer DISCARD"));
    }
    let most = disk.transport.config32(config::DISCARD_SECTORS_MAX);
    clear(machine, command, (disk, wait), (kind::DISCARD, most, 0))
}

/// Writes zeroes to a range without sending them.
pub fn write_zeroes(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "mib", "offset_mib", "unmap", "wait"])?;
    let (disk, wait) = open(machine, command)?;
    if !disk.has(feature::WRITE_ZEROES) {
        return Err(Failure::Unsuitable("the device does not offer WRITE_ZEROES"));
    }
    let most = disk.transport.config32(config::WRITE_ZEROES_SECTORS_MAX);
    let flags = if command.switch("unmap", false)? { UNMAP } else { 0 };
    clear(machine, command, (disk, wait), (kind::WRITE_ZEROES, most, flags))
}

/// Sends one segment after the other, each as large as the device takes.
fn clear(
    machine: &mut Machine,
    command: &Command<'static>,
    (mut disk, wait): (Disk, Wait),
    (kind, sectors_max, flags): (u32, u32, u32),
) -> Result<(), Failure> {
    let (first, sectors) = range(command, disk.capacity_sectors)?;
    let step = u64::from(sectors_max.max(1));
    let mut buffer = machine.memory.allocate(size(SEGMENT_BYTES))?;
    let mut done = 0;
    while done < sectors {
        let count = step.min(sectors - done);
        if let [place, shape] = buffer.words_mut(0, 2) {
            *place = first + done;
            *shape = count | u64::from(flags) << 32;
        }
        let data = Some(blk::data(buffer.address(), SEGMENT_BYTES, false));
        expect(
            &mut disk,
            &wait,
            &Request {
                kind,
                sector: 0,
                data,
            },
            Status::OK,
        )?;
        done += count;
    }
    machine.keep(disk);
    say!("{}: ok sectors={sectors}\n", command.verb);
    Ok(())
}

/// Asks for sectors that do not exist: each request must fail, and the device must stay usable.
pub fn out_of_range(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "wait"])?;
    let (mut disk, wait) = open(machine, command)?;
    let buffer = machine.memory.allocate(size(2 * SECTOR))?;
    let end = disk.capacity_sectors;
    let places = [
        (end, 1),
        (end.saturating_sub(1), 2),
        (end + 1, 1),
        (u64::MAX, 1),
        (u64::MAX / SECTOR, 2),
    ];
    for (sector, sectors) in places {
        for kind in [kind::READ, kind::WRITE] {
            let data = Some(blk::data(buffer.address(), sectors * SECTOR, kind == kind::READ));
            expect(
                &mut disk,
                &wait,
                &Request { kind, sector, data },
                Status::IO_ERROR,
            )?;
        }
    }
    let data = Some(blk::data(buffer.address(), SECTOR, true));
    expect(
        &mut disk,
        &wait,
        &Request {
            kind: kind::READ,
            sector: 0,
            data,
        },
        Status::OK,
    )?;
    machine.keep(disk);
    say!("out-of-range: ok\n");
    Ok(())
}

/// Sends a request of a type that nobody knows: it must be answered so.
pub fn unsupported(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "wait"])?;
    let (mut disk, wait) = open(machine, command)?;
    let buffer = machine.memory.allocate(size(SECTOR))?;
    let data = Some(blk::data(buffer.address(), SECTOR, true));
    expect(
        &mut disk,
        &wait,
        &Request {
            kind: UNKNOWN_KIND,
            sector: 0,
            data,
        },
        Status::UNSUPPORTED,
    )?;
    machine.keep(disk);
    say!("unsupported: ok\n");
    Ok(())
}

/// Writes to a read-only disk: it must say that it is one, and refuse.
pub fn read_only(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "wait"])?;
    let (mut disk, wait) = open(machine, command)?;
    if !disk.has(feature::READ_ONLY) {
        return Err(Failure::Check("the device does not say that it is read-only"));
    }
    let buffer = machine.memory.allocate(size(SECTOR))?;
    let data = Some(blk::data(buffer.address(), SECTOR, false));
    expect(
        &mut disk,
        &wait,
        &Request {
            kind: kind::WRITE,
            sector: 0,
            data,
        },
        Status::IO_ERROR,
    )?;
    machine.keep(disk);
    say!("read-only: ok\n");
    Ok(())
}

fn open(machine: &mut Machine, command: &Command<'static>) -> Result<(Disk, Wait), Failure> {
    let wait = machine.wait(command)?;
    let disk = machine.disk(Setup::of(command.number("dev", 0)?))?;
    wait.prepare(&disk.transport, 1)?;
    Ok((disk, wait))
}
