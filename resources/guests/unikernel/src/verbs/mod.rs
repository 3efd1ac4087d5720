//! The verbs of the command language, one module for each family.

use core::fmt;

use instrument::cmdline::{ArgumentError, Command};

use instrument::pattern::Mismatch;

use crate::clock;
use crate::ending;
use crate::machine::Machine;
use crate::memory::OutOfMemory;
use crate::smp;
use crate::virtio;
use crate::virtio::blk::Status;

mod assault;
mod disk;
mod echo;
mod entropy;
mod fault;
mod greet;
mod hostile;
mod load;
mod memory_work;
mod pastime;
mod plug;
mod pmem;
mod ports;
mod registers;
mod requests;
mod stamp;
mod talk;
mod tcp;
mod vsock;

/// Why a command ends the run.
#[derive(Debug)]
pub enum Failure {
    /// There is no such verb.
    UnknownVerb,
    /// An argument is wrong.
    Argument(ArgumentError<'static>),
    /// The guest is too small.
    Memory(OutOfMemory),
    /// The frequency of the TSC is not known.
    Clock(clock::Unknown),
    /// A device does not do its part.
    Device(virtio::Error),
    /// Another vCPU does not do its part.
    Cpus(smp::Error),
    /// A request was answered otherwise than it should.
    Answer {
        /// Its first sector.
        sector: u64,
        /// What should have been answered.
        expected: Status,
        /// What was.
        found: Status,
    },
    /// A sector does not hold what was written.
    Content(Mismatch),
    /// Memory does not hold what was written.
    Damaged {
        /// Where.
        address: u64,
        /// What was written.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// Something else is not as it should be.
    Check(&'static str),
    /// The device is too small for what was asked, or lacks a feature.
    Unsuitable(&'static str),
    /// It was asked to end with this status.
    Exit(u8),
}

impl Failure {
    /// The status that the guest ends with.
    pub const fn status(&self) -> u8 {
        match self {
            Self::UnknownVerb
            | Self::Argument(_)
            | Self::Memory(_)
            | Self::Clock(_)
            | Self::Unsuitable(_) => ending::STATUS_USAGE,
            Self::Device(_)
            | Self::Cpus(_)
            | Self::Answer { .. }
            | Self::Content(_)
            | Self::Damaged { .. }
            | Self::Check(_) => ending::STATUS_FAILED,
            Self::Exit(status) => *status,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownVerb => write!(out, "no such verb"),
            Self::Argument(error) => error.fmt(out),
            Self::Memory(error) => error.fmt(out),
            Self::Clock(error) => error.fmt(out),
            Self::Device(error) => error.fmt(out),
            Self::Cpus(error) => error.fmt(out),
            Self::Answer {
                sector,
                expected,
                found,
            } => {
                write!(
                    out,
                    "sector={sector} expected status={} found status={}",
                    expected.0, found.0
                )
            }
            Self::Content(mismatch) => mismatch.fmt(out),
            Self::Damaged {
                address,
                expected,
                found,
            } => {
                write!(
                    out,
                    "address={address:#x} expected={expected:#018x} found={found:#018x}"
                )
            }
            Self::Check(what) => write!(out, "{what}"),
            Self::Unsuitable(why) => write!(out, "{why}"),
            Self::Exit(status) => write!(out, "ends with status {status}"),
        }
    }
}

impl From<ArgumentError<'static>> for Failure {
    fn from(error: ArgumentError<'static>) -> Self {
        Self::Argument(error)
    }
}

impl From<OutOfMemory> for Failure {
    fn from(error: OutOfMemory) -> Self {
        Self::Memory(error)
    }
}

impl From<clock::Unknown> for Failure {
    fn from(error: clock::Unknown) -> Self {
        Self::Clock(error)
    }
}

impl From<virtio::Error> for Failure {
    fn from(error: virtio::Error) -> Self {
        Self::Device(error)
    }
}

impl From<smp::Error> for Failure {
    fn from(error: smp::Error) -> Self {
        Self::Cpus(error)
    }
}

impl From<Mismatch> for Failure {
    fn from(mismatch: Mismatch) -> Self {
        Self::Content(mismatch)
    }
}

/// Runs one command.
pub fn run(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    match command.verb {
        "hello" => greet::hello(command),
        "exit" => greet::exit(command),
        "info" => greet::info(machine, command),
        "pattern-write" => disk::pattern_write(machine, command),
        "pattern-verify" => disk::pattern_verify(machine, command),
        "read-check-zero" => disk::read_check_zero(machine, command),
        "flush" => disk::flush(machine, command),
        "await-disk" => disk::await_disk(machine, command),
        "release-disk" => disk::release(machine, command),
        "discard" => requests::discard(machine, command),
        "write-zeroes" => requests::write_zeroes(machine, command),
        "identity" => requests::identity(machine, command),
        "capacity" => requests::capacity(machine, command),
        "out-of-range" => requests::out_of_range(machine, command),
        "unsupported" => requests::unsupported(machine, command),
        "read-only" => requests::read_only(machine, command),
        "stamp" => stamp::stamp(machine, command),
        "pmem-write" => pmem::write(machine, command),
        "pmem-verify" => pmem::verify(machine, command),
        "pmem-flush" => pmem::flush(machine, command),
        "pmem-read-only" => pmem::read_only(machine, command),
        "pmem-by-disk" => pmem::by_disk(machine, command),
        "mem-follow" => plug::follow(machine, command),
        "mem-verify" => plug::verify(machine, command),
        "mem-hostile" => plug::hostile(machine, command),
        "mem-touch" => plug::touch(machine, command),
        "rng" => entropy::rng(machine, command),
        "dirty" => memory_work::dirty(machine, command),
        "checksum" => memory_work::checksum(machine, command),
        "registers" => registers::registers(machine, command),
        "spin" => pastime::spin(machine, command),
        "tick" => pastime::tick(machine, command),
        "vcpus" => pastime::vcpus(machine, command),
        "fault" => fault::fault(command),
        "echo" => echo::echo(command),
        "hostile" => hostile::hostile(machine, command),
        "load" => load::load(machine, command),
        "tcp" => tcp::tcp(machine, command),
        "vsock" => vsock::vsock(machine, command),
        _ => Err(Failure::UnknownVerb),
    }
}
