//! A descriptor chain as a request to the storage, and the storage's answer as a status byte
//! (virtio 1.2, 5.2.6).

use std::mem;

use coracle_storage::backend::{Access, Geometry};
use coracle_storage::request::{Failure, Operation, Segment, Space, cut_first_bytes};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::space::{FEATURE_DISCARD, FEATURE_WRITE_ZEROES};
use crate::virtio::ring::Chain;
use crate::virtio::segments::{gather, len_bytes};

/// The unit of positions and lengths in virtio-blk, whatever the block size (5.2.4).
pub(super) const SECTOR_BYTES: u64 = 512;

/// The length of the answer to GET ID.
pub(super) const SERIAL_BYTES: usize = 20;

/// What the guest reads as the last byte of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the kernel's headers give the bytes 0, 1 and 2 as u32"
)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

impl From<Result<(), Failure>> for Status {
    /// The one place that says what a guest hears of a failure (5.2.6: UNSUPP for what the device
    /// does not do, IOERR for everything that went wrong).
    fn from(outcome: Result<(), Failure>) -> Self {
        match outcome {
            Ok(()) => Self::Ok,
            Err(Failure::Unsupported) => Self::Unsupported,
            Err(
                Failure::Host(_)
                | Failure::OutOfRange
                | Failure::ReadOnly
                | Failure::TooLarge { .. }
                | Failure::Truncated,
            ) => Self::IoError,
        }
    }
}

/// A request as far as the device understands it.
#[derive(Debug)]
pub(super) struct Parsed {
    /// The one byte that will hold the answer.
    pub(super) status: Segment,
    /// What is to be done.
    pub(super) action: Action,
}

/// What a request leads to.
#[derive(Debug)]
pub(super) enum Action {
    /// The storage is asked. The data segments of a read are left in `chain.writable`, those of a
    /// write in `chain.readable`.
    Ask {
        operation: Operation,
        offset_bytes: u64,
        len_bytes: u64,
    },
    /// The serial number is wanted, in what is left of `chain.writable`.
    Identify,
    /// The answer is known already.
    Answer(Status),
}

/// A chain that is no request: without a whole header, or without a byte for the answer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoRequest {
    #[error("a chain with {0} readable bytes has no request header")]
    Header(u64),
    #[error("a chain without a writable byte has no room for a status")]
    Status,
}

/// Type, reserved, sector (5.2.6).
const HEADER_BYTES: usize = 16;

/// Understands `chain`, of which header and status byte are cut off.
///
/// # Errors
///
/// When the chain has no place for an answer, or no question.
pub(super) fn parse(chain: &mut Chain, geometry: &Geometry, features: u64) -> Result<Parsed, NoRequest> {
    let mut header = [0; HEADER_BYTES];
    if gather(&chain.readable, 0, &mut header) < HEADER_BYTES {
        return Err(NoRequest::Header(len_bytes(&chain.readable)));
    }
    let status = cut_last_byte(&mut chain.writable).ok_or(NoRequest::Status)?;
    cut_first_bytes(&mut chain.readable, HEADER_BYTES);
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let action = match kind {
        VIRTIO_BLK_T_IN => transfer(Operation::Read, sector, len_bytes(&chain.writable), geometry),
        VIRTIO_BLK_T_OUT => transfer(Operation::Write, sector, len_bytes(&chain.readable), geometry),
        VIRTIO_BLK_T_FLUSH => Action::Ask {
            operation: Operation::Flush,
            offset_bytes: 0,
            len_bytes: 0,
        },
        VIRTIO_BLK_T_GET_ID if len_bytes(&chain.writable) < SERIAL_BYTES as u64 => {
            Action::Answer(Status::IoError)
        }
        VIRTIO_BLK_T_GET_ID => Action::Identify,
        VIRTIO_BLK_T_DISCARD if features & FEATURE_DISCARD != 0 => {
            range(Operation::Discard, &chain.readable, geometry)
        }
        VIRTIO_BLK_T_WRITE_ZEROES if features & FEATURE_WRITE_ZEROES != 0 => {
            let space = Space::Stays;
            range(Operation::WriteZeroes { space }, &chain.readable, geometry)
        }
        _ => Action::Answer(Status::Unsupported),
    };
    Ok(Parsed { status, action })
}

/// A read or a write of `len_bytes` at `sector`, if it is whole sectors within the disk.
fn transfer(operation: Operation, sector: u64, len_bytes: u64, geometry: &Geometry) -> Action {
    match offset_within(sector, len_bytes, geometry) {
        // 5.2.6.2: a write to a read-only disk fails and writes nothing.
        Some(_) if operation == Operation::Write && geometry.access == Access::ReadOnly => {
            Action::Answer(Status::IoError)
        }
        Some(offset_bytes) if len_bytes.is_multiple_of(SECTOR_BYTES) => Action::Ask {
            operation,
            offset_bytes,
            len_bytes,
        },
        _ => Action::Answer(Status::IoError),
    }
}

/// Sector, count of sectors, flags: `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;

/// The one range of a DISCARD or WRITE ZEROES.
fn range(operation: Operation, data: &[Segment], geometry: &Geometry) -> Action {
    let mut range = [0; RANGE_BYTES];
    // `max_discard_seg` and `max_write_zeroes_seg` say one.
    if len_bytes(data) != RANGE_BYTES as u64 || gather(data, 0, &mut range) < RANGE_BYTES {
        return Action::Answer(Status::IoError);
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let len_bytes = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR_BYTES;
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let operation = match (operation, flags) {
        (Operation::WriteZeroes { .. }, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => Operation::WriteZeroes {
            space: Space::MayBeFreed,
        },
        (_, 0) => operation,
        // 5.2.6.2: unknown flags, and unmap in a discard, are unsupported.
        _ => return Action::Answer(Status::Unsupported),
    };
    match offset_within(sector, len_bytes, geometry) {
        Some(offset_bytes) => Action::Ask {
            operation,
            offset_bytes,
            len_bytes,
        },
        None => Action::Answer(Status::IoError),
    }
}

/// Where `sector` is, if `len_bytes` from there lie within the disk.
fn offset_within(sector: u64, len_bytes: u64, geometry: &Geometry) -> Option<u64> {
    let offset_bytes = sector.checked_mul(SECTOR_BYTES)?;
    let end_bytes = offset_bytes.checked_add(len_bytes)?;
    (end_bytes <= geometry.size_bytes).then_some(offset_bytes)
}

/// Cuts the last byte off; the guest may have put it behind the data in one descriptor (2.7.4.2).
fn cut_last_byte(segments: &mut Vec<Segment>) -> Option<Segment> {
    while let Some(last) = segments.last_mut() {
        match last.len_bytes() {
            0 => {
                segments.pop();
            }
            1 => return segments.pop(),
            len_bytes => return Some(last.split_off(len_bytes - 1)),
        }
    }
    None
}

/// Moves the data segments of a transfer out of `chain`, which gets the empty `spare` to fill again.
pub(super) fn take_segments(operation: Operation, chain: &mut Chain, spare: Vec<Segment>) -> Vec<Segment> {
    match operation {
        Operation::Read => mem::replace(&mut chain.writable, spare),
        Operation::Write => mem::replace(&mut chain.readable, spare),
        Operation::Flush
        | Operation::Discard
        | Operation::WriteZeroes { .. }
        | Operation::Raise
        | Operation::Yield
        | Operation::TakeBack
        | Operation::Grow
        | Operation::FindData => spare,
    }
}
