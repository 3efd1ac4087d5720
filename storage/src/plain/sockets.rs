//! The sockets of a plain reactor, and the operations on them that wait for a peer.
#![expect(
    unsafe_code,
    reason = "messages are of guest memory, and addresses are looked at"
)]

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::{borrow, errno_of, result_of};
use crate::reactor::{
    Event, FILES_MAX, Family, FileSlot, LowWater, NO_FILE, SocketAddress, SocketOp, SocketOption, Token, Wake,
};
use crate::request::Segment;
use crate::socket::{message, place};

/// Sockets that were made, and what waits on these and on registered ones.
///
/// They are blocking sockets, like those of a ring, so that either kind of reactor goes on with the other's: each call says that
/// it does not wait.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    made: [Option<OwnedFd>; FILES_MAX],
    waiting: Vec<Waiting>,
}

/// An operation that waits for its peer.
#[derive(Debug)]
struct Waiting {
    token: Token,
    socket: RawFd,
    attempt: Attempt,
}

/// What is tried, again when the socket is ready.
#[derive(Debug)]
enum Attempt {
    Connect,
    Send {
        segments: *const Segment,
        segment_count: u32,
    },
    Receive {
        segments: *const Segment,
        segment_count: u32,
    },
}

impl Sockets {
    /// How many operations wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Carries an operation out, or puts it among those that wait; what ended by it is appended to `wakes`.
    pub(super) fn start(
        &mut self,
        (file, operation): (FileSlot, SocketOp),
        token: Token,
        files: &mut [RawFd; FILES_MAX],
        wakes: &mut Vec<Wake>,
    ) {
        let place = place(file);
        let socket = files.get(place).copied().unwrap_or(NO_FILE);
        let ended = match operation {
            SocketOp::Make(family) => Some(self.make(place, family, files)),
            SocketOp::Close => Some(self.close(place, files)),
            SocketOp::Cancel { target } => Some(self.cancel(target, wakes)),
            _ if socket == NO_FILE => Some(-libc::EBADF),
            SocketOp::SetOption(option) => Some(set_option(socket, option)),
            SocketOp::Take => Some(copy_of(socket)),
            SocketOp::Connect { peer } => match begin_to_connect(socket, peer) {
                Some(result) => Some(result),
                None => self.wait_for(socket, token, Attempt::Connect),
            },
            SocketOp::Send {
                segments,
                segment_count,
            } => self.attempt(
                socket,
                token,
                Attempt::Send {
                    segments,
                    segment_count,
                },
            ),
            SocketOp::Receive {
                segments,
                segment_count,
            } => self.attempt(
                socket,
                token,
                Attempt::Receive {
                    segments,
                    segment_count,
                },
            ),
        };
        if let Some(result) = ended {
            wakes.push(Wake::Done(Event { token, result }));
        }
    }

    /// What to poll for, in the order of the operations that wait.
    pub(super) fn polls(&self) -> impl Iterator<Item = PollFd<'static>> {
        self.waiting.iter().map(|waiting| {
            let ready = match waiting.attempt {
                Attempt::Connect | Attempt::Send { .. } => PollFlags::OUT,
                Attempt::Receive { .. } => PollFlags::IN,
            };
            PollFd::from_borrowed_fd(borrow(waiting.socket), ready)
        })
    }

    /// Tries again what is ready, by what a poll said of each operation that waits.
    pub(super) fn go_on(&mut self, mut polled: impl Iterator<Item = PollFlags>, wakes: &mut Vec<Wake>) {
        self.waiting.retain_mut(|waiting| {
            if polled.next().is_none_or(|revents| revents.is_empty()) {
                return true;
            }
            let ended = waiting.attempt.again(waiting.socket);
            if let Some(result) = ended {
                let token = waiting.token;
                wakes.push(Wake::Done(Event { token, result }));
            }
            ended.is_none()
        });
    }

    fn attempt(&mut self, socket: RawFd, token: Token, attempt: Attempt) -> Option<i32> {
        let ended = attempt.again(socket);
        if ended.is_none() {
            self.wait_for(socket, token, attempt);
        }
        ended
    }

    fn wait_for(&mut self, socket: RawFd, token: Token, attempt: Attempt) -> Option<i32> {
        self.waiting.push(Waiting {
            token,
            socket,
            attempt,
        });
        None
    }

    fn make(&mut self, place: usize, family: Family, files: &mut [RawFd; FILES_MAX]) -> i32 {
        let family = match family {
            Family::V4 => AddressFamily::INET,
            Family::V6 => AddressFamily::INET6,
        };
        match rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None) {
            Ok(socket) => {
                self.put(place, Some(socket), files);
                0
            }
            Err(errno) => -errno.raw_os_error(),
        }
    }

    fn close(&mut self, place: usize, files: &mut [RawFd; FILES_MAX]) -> i32 {
        self.put(place, None, files);
        0
    }

    /// What was there is closed, if it was made here; a registered descriptor is its owner's.
    fn put(&mut self, place: usize, socket: Option<OwnedFd>, files: &mut [RawFd; FILES_MAX]) {
        if let (Some(file), Some(made)) = (files.get_mut(place), self.made.get_mut(place)) {
            // Its number would soon be another's.
            assert!(
                self.waiting.iter().all(|waiting| waiting.socket != *file),
                "the place of a socket is emptied while something is in flight there"
            );
            *file = socket.as_ref().map_or(NO_FILE, AsRawFd::as_raw_fd);
            *made = socket;
        }
    }

    fn cancel(&mut self, target: Token, wakes: &mut Vec<Wake>) -> i32 {
        let Some(number) = self.waiting.iter().position(|waiting| waiting.token == target) else {
            return -libc::ENOENT;
        };
        self.waiting.remove(number);
        wakes.push(Wake::Done(Event {
            token: target,
            result: -libc::ECANCELED,
        }));
        0
    }
}

impl Attempt {
    /// The result, or `None` as long as the peer has to be waited for.
    fn again(&self, socket: RawFd) -> Option<i32> {
        match *self {
            Self::Connect => Some(match sockopt::socket_error(borrow(socket)) {
                Ok(result) => errno_of(result),
                Err(errno) => -errno.raw_os_error(),
            }),
            Self::Send {
                segments,
                segment_count,
            } => unless_it_waits(send(socket, segments, segment_count)),
            Self::Receive {
                segments,
                segment_count,
            } => unless_it_waits(receive(socket, segments, segment_count)),
        }
    }
}

fn unless_it_waits(result: i32) -> Option<i32> {
    (result != -libc::EAGAIN).then_some(result)
}

fn send(socket: RawFd, segments: *const Segment, segment_count: u32) -> i32 {
    let message = message(segments, segment_count);
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the segments and their memory are valid until the operation ends (contracts of `SocketOp` and `Segment::new`).
    result_of(unsafe { libc::sendmsg(socket, &raw const message, flags) })
}

fn receive(socket: RawFd, segments: *const Segment, segment_count: u32) -> i32 {
    let mut message = message(segments, segment_count);
    // SAFETY: as for the send.
    result_of(unsafe { libc::recvmsg(socket, &raw mut message, libc::MSG_DONTWAIT) })
}

/// Calls the peer without waiting for its answer, which is the one thing that no flag of the call says; `None` if it is to come.
fn begin_to_connect(socket: RawFd, peer: *const SocketAddress) -> Option<i32> {
    // SAFETY: the address stays in place until the operation ends (contract of `SocketOp`).
    let address = unsafe { &*peer }.address();
    let socket = borrow(socket);
    let begun = rustix::fs::fcntl_getfl(socket).and_then(|flags| {
        rustix::fs::fcntl_setfl(socket, flags | OFlags::NONBLOCK)?;
        let begun = rustix::net::connect(socket, &address);
        rustix::fs::fcntl_setfl(socket, flags)?;
        begun
    });
    match begun {
        Err(Errno::INPROGRESS) => None,
        ended => Some(errno_of(ended)),
    }
}

fn set_option(socket: RawFd, option: SocketOption) -> i32 {
    errno_of(match option {
        SocketOption::NoDelay => sockopt::set_tcp_nodelay(borrow(socket), true),
        SocketOption::ResetOnClose => sockopt::set_socket_linger(borrow(socket), Some(Duration::ZERO)),
        SocketOption::LowWater(mark) => return set_low_water(socket, mark),
    })
}

fn set_low_water(socket: RawFd, mark: LowWater) -> i32 {
    let value = mark.value();
    let len = libc::socklen_t::try_from(size_of_val(value)).expect("options are short");
    let value = ptr::from_ref(value).cast();
    // SAFETY: the value is an integer that is always there, and `len` its length.
    let result = unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, len) };
    result_of(isize::try_from(result).expect("this is a 64-bit monitor"))
}

fn copy_of(socket: RawFd) -> i32 {
    match rustix::io::fcntl_dupfd_cloexec(borrow(socket), 0) {
        Ok(copy) => copy.into_raw_fd(),
        Err(errno) => -errno.raw_os_error(),
    }
}
