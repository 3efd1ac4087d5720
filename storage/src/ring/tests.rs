//! What the ring refuses; what it does is in `tests/reactors.rs`.
#![expect(unsafe_code, reason = "pushes entries that the ring itself would not")]
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use super::*;

/// What the kernel answers to an entry that the ring itself would never push.
fn answer_to(entry: Entry) -> i32 {
    let mut ring = PreparedRing::new(4).unwrap().enable().unwrap();
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
    assert_eq!(answer_to(close), -libc::EACCES);
}

#[test]
fn a_descriptor_that_was_not_registered_is_refused_by_the_kernel() {
    let file = std::fs::File::open("/proc/self/status").unwrap();
    let sync = opcode::Fsync::new(io_uring::types::Fd(std::os::fd::AsRawFd::as_raw_fd(&file))).build();
    assert_eq!(answer_to(sync), -libc::EACCES);
}
