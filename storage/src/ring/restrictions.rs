//! What a ring may do: the kernel refuses everything else, whoever writes the entries.

use std::io;

use io_uring::register::{Probe, Restriction};
use io_uring::squeue::Flags;
use io_uring::{IoUring, opcode};

use super::{FIXED_FILES, Unavailable};
use crate::reactor::Reach;

/// Limits a ring that is not enabled yet to what is needed for `reach`, and to `file_workers_max` kernel workers for files.
pub(super) fn restrict(ring: &IoUring, reach: Reach, file_workers_max: u32) -> Result<(), Unavailable> {
    let mut restrictions = vec![
        // SOCKET and ASYNC_CANCEL take no file, and carry the flag without a meaning.
        Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        Restriction::register_op(REGISTER_FILES_UPDATE),
    ];
    restrictions.extend(FILE_OPS.map(Restriction::sqe_op));
    if reach > Reach::Files {
        look_for_sockets(ring)?;
        restrictions.extend(SOCKET_OPS.map(Restriction::sqe_op));
    }
    limit(ring, file_workers_max, &mut restrictions).map_err(Unavailable::Other)
}

/// Operations on files and watches.
const FILE_OPS: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];

/// Operations on sockets. URING_CMD, which sets options, is of one kind for all files; on what an image has
/// registered it does nothing that writing there could not do.
const SOCKET_OPS: [u8; 9] = [
    opcode::Socket::CODE,
    opcode::SetSockOpt::CODE,
    opcode::Connect::CODE,
    opcode::Send::CODE,
    opcode::SendMsg::CODE,
    opcode::Recv::CODE,
    opcode::RecvMsg::CODE,
    opcode::AsyncCancel::CODE,
    opcode::FixedFdInstall::CODE,
];

/// Kernel worker threads that one ring may start for operations on anything but files.
const OTHER_WORKERS_MAX: u32 = 1;

/// IORING_REGISTER_FILES_UPDATE, the one registration allowed while the ring runs (io_uring.h).
const REGISTER_FILES_UPDATE: u8 = 6;

fn limit(ring: &IoUring, file_workers_max: u32, restrictions: &mut [Restriction]) -> io::Result<()> {
    let submitter = ring.submitter();
    submitter.register_files_sparse(FIXED_FILES)?;
    submitter.register_iowq_max_workers(&mut [file_workers_max, OTHER_WORKERS_MAX])?;
    submitter.register_restrictions(restrictions)
}

/// The youngest operation, FIXED_FD_INSTALL, is of Linux 6.8: a kernel that has it has the others.
fn look_for_sockets(ring: &IoUring) -> Result<(), Unavailable> {
    let mut probe = Probe::new();
    let probed = ring.submitter().register_probe(&mut probe);
    probed.map_err(Unavailable::Other)?;
    if probe.is_supported(opcode::FixedFdInstall::CODE) {
        Ok(())
    } else {
        Err(Unavailable::without_sockets())
    }
}
