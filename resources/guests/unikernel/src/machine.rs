//! The machine as the commands see it, and their sequence.

use instrument::cmdline::{Command, CommandLine};
use instrument::time::Clock;

use crate::memory::Memory;
use crate::verbs::{self, Failure};
use crate::virtio::blk::{DISKS_MAX, Disk, DiskMemory, Setup};
use crate::virtio::net::{INTERFACES_MAX, NetMemory};
use crate::virtio::pmem::DEVICES_MAX;
use crate::virtio::queue::QueueMemory;
use crate::virtio::rng::SOURCES_MAX;
use crate::virtio::vsock::VsockMemory;
use crate::wait::{Mode, Wait};
use crate::{clock, ending, say};

/// What the commands work on.
pub struct Machine {
    /// What was asked.
    pub line: CommandLine<'static>,
    /// The RAM.
    pub memory: Memory,
    /// Where the monitor says that ACPI's root pointer is; 0 for nowhere.
    pub rsdp_address: u64,
    /// Memory of block devices, by index.
    pub disk_memory: [DiskMemory; DISKS_MAX],
    /// Memory of entropy sources, by index.
    pub entropy_memory: [Option<QueueMemory>; SOURCES_MAX],
    /// Memory of the device that memory comes and goes by.
    pub mem_memory: Option<QueueMemory>,
    /// Memory of pmem devices, by index.
    pub pmem_memory: [Option<QueueMemory>; DEVICES_MAX],
    /// Memory of the socket device.
    pub vsock_memory: Option<VsockMemory>,
    /// Memory of network interfaces, by index.
    pub net_memory: [Option<NetMemory>; INTERFACES_MAX],
    disks: [Option<Disk>; DISKS_MAX],
    clock: Option<Clock>,
}

/// How long a device may take, unless `timeout_s=` says otherwise.
const TIMEOUT_SECONDS: u64 = 60;

/// Runs the commands in order, up to the first that fails, and ends with its status or 0.
pub fn run(line: CommandLine<'static>, memory: Memory, rsdp_address: u64) -> ! {
    match line.ending() {
        Ok(chosen) => ending::choose(chosen),
        Err(error) => {
            say!("{error}\n");
            ending::finish(ending::STATUS_USAGE)
        }
    }
    let mut machine = Machine {
        line,
        memory,
        rsdp_address,
        disk_memory: [const { DiskMemory::EMPTY }; DISKS_MAX],
        entropy_memory: [const { None }; SOURCES_MAX],
        mem_memory: None,
        pmem_memory: [const { None }; DEVICES_MAX],
        vsock_memory: None,
        net_memory: [const { None }; INTERFACES_MAX],
        disks: [const { None }; DISKS_MAX],
        clock: None,
    };
    for command in line.commands() {
        machine.memory.release();
        match verbs::run(&mut machine, &command) {
            Ok(()) => {}
            Err(Failure::Exit(status)) => ending::finish(status),
            Err(failure) => {
                say!("{}: {failure}\n", command.verb);
                ending::finish(failure.status())
            }
        }
    }
    ending::finish(0)
}

impl Machine {
    /// The clock, found when it is first needed.
    pub fn clock(&mut self) -> Result<Clock, Failure> {
        if let Some(clock) = self.clock {
            return Ok(clock);
        }
        let clock = clock::find(self.line)?;
        self.clock = Some(clock);
        Ok(clock)
    }

    /// The block device of `setup`: as the last command left it where that is how it was set up, else set up anew.
    /// It is taken out, so that a command can use it beside the machine; see [`Self::keep`].
    pub fn disk(&mut self, setup: Setup) -> Result<Disk, Failure> {
        let place = usize::try_from(setup.index)
            .ok()
            .and_then(|index| self.disks.get_mut(index));
        match place.and_then(|place| place.take_if(|disk| disk.setup == setup)) {
            Some(disk) => Ok(disk),
            None => Ok(Disk::open(self, setup)?),
        }
    }

    /// Keeps a device for the next command: nothing is in flight.
    pub fn keep(&mut self, disk: Disk) {
        if let Some(place) = usize::try_from(disk.setup.index)
            .ok()
            .and_then(|index| self.disks.get_mut(index))
        {
            *place = Some(disk);
        }
    }

    /// Forgets how a block device was set up: somebody is about to change that.
    pub fn forget_disk(&mut self, index: u64) {
        if let Some(place) = usize::try_from(index)
            .ok()
            .and_then(|index| self.disks.get_mut(index))
        {
            *place = None;
        }
    }

    /// How a command waits for its device.
    pub fn wait(&mut self, command: &Command<'static>) -> Result<Wait, Failure> {
        let seconds = self.line.number("timeout_s")?.unwrap_or(TIMEOUT_SECONDS);
        Ok(Wait::new(Mode::of(command)?, self.clock()?, seconds))
    }
}
