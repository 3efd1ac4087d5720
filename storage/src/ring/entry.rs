//! Operations as entries of the submission queue. Every one names a fixed file: the ring takes no others.
#![expect(unsafe_code, reason = "a list of segments is looked at")]

use io_uring::opcode;
use io_uring::squeue::Entry;
use io_uring::types::{Fixed, FsyncFlags};

use super::socket::{Messages, entry_of_socket};
use crate::reactor::{FileSlot, KernelOp};
use crate::request::{Durability, Segment};

/// The entry of an operation. A socket's message is kept in `messages`, which is to stay until the entry is submitted.
pub(super) fn entry_of(op: KernelOp, messages: &mut Messages) -> Entry {
    match op {
        KernelOp::Read {
            file,
            segments,
            segment_count,
            offset_bytes,
        } => {
            // One segment is the common case, and needs no list to be copied in.
            match single(segments, segment_count) {
                Some((address, len_bytes)) => opcode::Read::new(fixed(file), address, len_bytes)
                    .offset(offset_bytes)
                    .build(),
                None => opcode::Readv::new(fixed(file), segments.cast(), segment_count)
                    .offset(offset_bytes)
                    .build(),
            }
        }
        KernelOp::Write {
            file,
            segments,
            segment_count,
            offset_bytes,
            durability,
        } => {
            let flags = match durability {
                Durability::Cached => 0,
                Durability::Durable => libc::RWF_DSYNC,
            };
            match single(segments, segment_count) {
                Some((address, len_bytes)) => {
                    let write = opcode::Write::new(fixed(file), address, len_bytes);
                    write.offset(offset_bytes).rw_flags(flags).build()
                }
                None => {
                    let write = opcode::Writev::new(fixed(file), segments.cast(), segment_count);
                    write.offset(offset_bytes).rw_flags(flags).build()
                }
            }
        }
        KernelOp::SyncData { file } => opcode::Fsync::new(fixed(file))
            .flags(FsyncFlags::DATASYNC)
            .build(),
        KernelOp::Allocate {
            file,
            mode,
            offset_bytes,
            len_bytes,
        } => opcode::Fallocate::new(fixed(file), len_bytes)
            .offset(offset_bytes)
            .mode(mode)
            .build(),
        KernelOp::Socket { file, operation } => entry_of_socket(file, operation, messages),
    }
}

pub(super) fn single(segments: *const Segment, segment_count: u32) -> Option<(*mut u8, u32)> {
    if segment_count != 1 {
        return None;
    }
    // SAFETY: `segments` points to `segment_count` segments (contract of `KernelOp`): to one.
    let segment = unsafe { &*segments };
    Some((segment.address(), u32::try_from(segment.len_bytes()).ok()?))
}

pub(super) fn fixed(file: FileSlot) -> Fixed {
    Fixed(file.0)
}
