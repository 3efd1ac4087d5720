//! What both reactors of a host say to the kernel about sockets.
#![expect(unsafe_code, reason = "the kernel's structures begin as zeros")]

use crate::reactor::{FILES_MAX, FileSlot};
use crate::request::Segment;

/// A message of these segments, to or from whom the socket is connected to.
pub(crate) fn message(segments: *const Segment, segment_count: u32) -> libc::msghdr {
    // SAFETY: a `msghdr` of zeros is one: no address, no segments, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // The kernel does not write to the list; its type is that of a list for both directions.
    message.msg_iov = segments.cast_mut().cast();
    message.msg_iovlen = segment_count.try_into().expect("this is a 64-bit monitor");
    message
}

/// Where in the list of registered files a socket lives. An image names no other places than those, ever.
pub(crate) fn place(file: FileSlot) -> usize {
    let place = usize::try_from(file.0).expect("this is a 64-bit monitor");
    assert!(place < FILES_MAX, "there is no place for a socket in {file:?}");
    place
}
