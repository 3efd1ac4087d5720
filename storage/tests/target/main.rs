//! The simulated target, held to RFC 7143, SPC-4 and what tgtd was seen to do, by a client of this test's own.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

mod client;
mod disk;
mod login;
mod network;
mod protocol;
mod reservation;

use client::{Client, Outcome, Transfer};
use coracle_storage::backend::Access;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::target::Target;
use coracle_storage::sim::target::options::Options;

/// Size of the disk, in bytes.
const SIZE_BYTES: u64 = 1 << 20;

/// A target with one disk, number 1.
fn target(options: Options) -> Target {
    with_seed(options, 1)
}

fn with_seed(options: Options, seed: u64) -> Target {
    let target = Target::new(options, Dice::new(seed));
    target.add(1, SIZE_BYTES, Access::ReadWrite);
    target
}

impl Client {
    fn read(&mut self, block: u64, count: u32) -> Outcome {
        self.run(1, &cdb16(0x88, 0, block, count), Transfer::In(count * 512))
    }

    fn write(&mut self, block: u64, bytes: &[u8]) -> Outcome {
        self.run(1, &write_cdb(block, bytes), Transfer::Out(bytes))
    }

    fn synchronize(&mut self) -> Outcome {
        self.run(1, &cdb16(0x91, 0, 0, 0), Transfer::Nothing)
    }
}

fn write_cdb(block: u64, bytes: &[u8]) -> [u8; 16] {
    cdb16(0x8a, 0, block, u32::try_from(bytes.len() / 512).unwrap())
}

/// A CDB of 16 bytes on blocks.
fn cdb16(opcode: u8, flags: u8, block: u64, count: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[1] = flags;
    cdb[2..10].copy_from_slice(&block.to_be_bytes());
    cdb[10..14].copy_from_slice(&count.to_be_bytes());
    cdb
}

/// Bytes that differ from place to place.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    let byte = |at: usize| {
        seed.wrapping_mul(31)
            .wrapping_add(u8::try_from(at % 251).unwrap())
    };
    (0..len).map(byte).collect()
}
