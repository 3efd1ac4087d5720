//! What the ring refuses; what it does is in `tests/reactors`.
#![expect(unsafe_code, reason = "pushes entries that the ring itself would not")]
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use super::*;

/// What the kernel answers to an entry that the ring itself would never push.
fn answer_to(entry: Entry, reach: Reach) -> i32 {
    let mut ring = PreparedRing::new(4, reach).unwrap().enable().unwrap();
    // SAFETY: the entry names no memory.
    unsafe { ring.ring.submission().push(&entry.user_data(1)) }.unwrap();
    ring.ops_in_flight += 1;
    let mut wakes = Vec::new();
    ring.wait(Patience::UntilEvent, &mut wakes).unwrap();
    match wakes.as_slice() {
        [Wake::Done(event)] => event.result,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_operation_that_no_image_needs_is_refused_by_the_kernel() {
    let close = opcode::Close::new(Fixed(0)).build().flags(Flags::FIXED_FILE);
    assert_eq!(answer_to(close, Reach::FilesAndSockets), -libc::EACCES);
}

#[test]
fn a_descriptor_that_was_not_registered_is_refused_by_the_kernel() {
    let file = std::fs::File::open("/proc/self/status").unwrap();
    let sync = opcode::Fsync::new(io_uring::types::Fd(std::os::fd::AsRawFd::as_raw_fd(&file))).build();
    assert_eq!(answer_to(sync, Reach::FilesAndSockets), -libc::EACCES);
}

#[test]
fn a_ring_for_files_refuses_every_operation_on_a_socket() {
    let socket = Fixed(0);
    let entries = [
        opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0)
            .build()
            .flags(Flags::FIXED_FILE),
        opcode::SetSockOpt::new(socket, 0, 0, std::ptr::null(), 0).build(),
        opcode::Connect::new(socket, std::ptr::null(), 0).build(),
        opcode::Send::new(socket, std::ptr::null(), 0).build(),
        opcode::SendMsg::new(socket, std::ptr::null()).build(),
        opcode::Recv::new(socket, std::ptr::null_mut(), 0).build(),
        opcode::RecvMsg::new(socket, std::ptr::null_mut()).build(),
        opcode::AsyncCancel::new(7).build().flags(Flags::FIXED_FILE),
        opcode::FixedFdInstall::new(socket, 0).build(),
    ];
    for entry in entries {
        let text = format!("{entry:?}");
        assert_eq!(answer_to(entry, Reach::Files), -libc::EACCES, "{text}");
    }
}

#[test]
fn a_ring_for_files_ends_what_is_asked_of_a_socket_with_a_refusal() {
    let mut ring = PreparedRing::new(4, Reach::Files).unwrap().enable().unwrap();
    for operation in [
        SocketOp::Make(crate::reactor::Family::V4),
        SocketOp::Take,
        SocketOp::Close,
    ] {
        let file = crate::reactor::FileSlot(0);
        ring.submit(KernelOp::Socket { file, operation }, Token(1))
            .unwrap();
        let mut wakes = Vec::new();
        ring.wait(Patience::UntilEvent, &mut wakes).unwrap();
        assert!(
            matches!(wakes.as_slice(), [Wake::Done(event)] if event.result == -libc::EACCES),
            "{wakes:?}"
        );
    }
}

#[test]
fn a_plain_descriptor_is_no_socket_to_the_kernel_either() {
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let fd = io_uring::types::Fd(std::os::fd::AsRawFd::as_raw_fd(&socket));
    let receive = opcode::Recv::new(fd, std::ptr::null_mut(), 0).build();
    assert_eq!(answer_to(receive, Reach::FilesAndSockets), -libc::EACCES);
}
