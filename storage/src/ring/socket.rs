//! Operations on sockets as entries of the submission queue.
#![expect(unsafe_code, reason = "the address of a peer is looked at")]

use std::ptr;

use io_uring::opcode;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::DestinationSlot;

use super::entry::{fixed, single};
use crate::reactor::{Family, FileSlot, SocketOp, SocketOption};
use crate::socket::message;

/// The messages of entries that are not submitted yet: the kernel reads a message when it takes its entry, and not again.
pub(super) struct Messages(Vec<libc::msghdr>);

impl Messages {
    /// Room for `messages_max` at a time; they never move.
    pub(super) fn with_capacity(messages_max: usize) -> Self {
        Self(Vec::with_capacity(messages_max))
    }

    /// Every entry was submitted.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    fn keep(&mut self, message: libc::msghdr) -> *mut libc::msghdr {
        let number = self.0.len();
        assert!(
            number < self.0.capacity(),
            "there are no more messages than operations in flight"
        );
        self.0.push(message);
        self.0.as_mut_ptr().wrapping_add(number)
    }
}

/// The entry of an operation on a socket; SOCKET and ASYNC_CANCEL, which name no file, get the flag that the ring insists on.
pub(super) fn entry_of_socket(file: FileSlot, operation: SocketOp, messages: &mut Messages) -> Entry {
    match operation {
        SocketOp::Make(family) => {
            let place = DestinationSlot::try_from_slot_target(file.0).expect("places are small numbers");
            // A fixed file has no descriptor that could be inherited: CLOEXEC is refused here.
            opcode::Socket::new(domain(family), libc::SOCK_STREAM, 0)
                .file_index(Some(place))
                .build()
                .flags(Flags::FIXED_FILE)
        }
        SocketOp::SetOption(option) => match option {
            SocketOption::NoDelay => set_option(file, libc::IPPROTO_TCP, libc::TCP_NODELAY, &ON),
            SocketOption::ResetOnClose => set_option(file, libc::SOL_SOCKET, libc::SO_LINGER, &NO_TIME),
            SocketOption::LowWater(mark) => {
                set_option(file, libc::SOL_SOCKET, libc::SO_RCVLOWAT, mark.value())
            }
        },
        SocketOp::Connect { peer } => {
            // SAFETY: the address stays in place until the operation ends (contract of `SocketOp`).
            let (address, len) = unsafe { &*peer }.as_sockaddr();
            opcode::Connect::new(fixed(file), address, len).build()
        }
        SocketOp::Send {
            segments,
            segment_count,
        } => match single(segments, segment_count) {
            Some((address, len_bytes)) => opcode::Send::new(fixed(file), address, len_bytes)
                .flags(libc::MSG_NOSIGNAL)
                .build(),
            None => {
                let message = messages.keep(message(segments, segment_count));
                opcode::SendMsg::new(fixed(file), message)
                    .flags(libc::MSG_NOSIGNAL.cast_unsigned())
                    .build()
            }
        },
        SocketOp::Receive {
            segments,
            segment_count,
        } => match single(segments, segment_count) {
            Some((address, len_bytes)) => opcode::Recv::new(fixed(file), address, len_bytes).build(),
            None => {
                let message = messages.keep(message(segments, segment_count));
                opcode::RecvMsg::new(fixed(file), message).build()
            }
        },
        SocketOp::Cancel { target } => opcode::AsyncCancel::new(target.0)
            .build()
            .flags(Flags::FIXED_FILE),
        // The copy is closed on exec unless asked otherwise.
        SocketOp::Take => opcode::FixedFdInstall::new(fixed(file), 0).build(),
        SocketOp::Close => unreachable!("a place is emptied without an entry"),
    }
}

static ON: libc::c_int = 1;
static NO_TIME: libc::linger = libc::linger {
    l_onoff: 1,
    l_linger: 0,
};

/// The kernel reads `value` when it carries the entry out, which may be later than it takes it.
fn set_option<T>(file: FileSlot, level: libc::c_int, name: libc::c_int, value: &'static T) -> Entry {
    let (level, name) = (level.cast_unsigned(), name.cast_unsigned());
    let len = u32::try_from(size_of::<T>()).expect("options are short");
    opcode::SetSockOpt::new(fixed(file), level, name, ptr::from_ref(value).cast(), len).build()
}

fn domain(family: Family) -> libc::c_int {
    match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    }
}
