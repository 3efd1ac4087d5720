//! Programs of the host that have connected and have not said yet which port of the guest they want.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::connections::Connections;
use super::socket::{Listener, Stream, is_later};
use crate::complaints::Complaints;

/// Most of them; others wait in the kernel.
const CALLERS_MAX: usize = 64;
/// How long one has to say what it wants.
const LINE_MS_MAX: u64 = 5000;
/// Longest line, in bytes: `CONNECT 4294967295\n`, and some blanks.
const LINE_BYTES_MAX: usize = 32;
/// How long nobody is accepted after the host had no descriptor left for one.
const REST_MS: u64 = 100;

/// The socket that is called, and who has called it.
#[derive(Debug)]
pub(super) struct Callers {
    socket: OwnedFd,
    waiting: Vec<Caller>,
    /// Nobody is accepted before.
    not_before: Option<Instant>,
    complaints: Complaints,
}

#[derive(Debug)]
struct Caller {
    stream: Stream,
    line: Vec<u8>,
    until: Instant,
}

/// How far a line is.
enum Line {
    /// More may come.
    Open,
    /// It names a port.
    Port(u32),
    /// It is none, or there is nobody any more.
    Wrong,
}

impl Callers {
    pub(super) fn of(socket: OwnedFd) -> Self {
        Self {
            socket,
            waiting: Vec::new(),
            not_before: None,
            complaints: Complaints::default(),
        }
    }

    /// Sends away who has not said what it wants.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// What is waited for: who waits already, in their order, and then the next one.
    pub(super) fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        let is_open = self.waiting.len() < CALLERS_MAX && self.not_before.is_none();
        let next = is_open.then(|| PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN));
        let waiting = self.waiting.iter();
        waiting
            .map(|caller| PollFd::from_borrowed_fd(caller.stream.as_fd(), PollFlags::IN))
            .chain(next)
    }

    /// What was found of each of [`Self::interests`]. Whoever has said which port it wants becomes one of `connections`.
    pub(super) fn found(&mut self, found: &[PollFlags], connections: &mut Connections, now: Instant) {
        let (waiting, next) = found.split_at_checked(self.waiting.len()).unwrap_or_default();
        let mut ready = waiting.iter().map(|flags| !flags.is_empty());
        let mut left = Vec::new();
        for mut caller in self.waiting.drain(..) {
            let line = if ready.next() == Some(true) {
                caller.read()
            } else {
                Line::Open
            };
            match line {
                Line::Open if caller.until > now => left.push(caller),
                Line::Port(port) if !connections.is_full() => connections.call(caller.stream, port, now),
                Line::Open | Line::Port(_) | Line::Wrong => {}
            }
        }
        self.waiting = left;
        if next.iter().any(|flags| !flags.is_empty()) {
            self.accept(now);
        }
        self.not_before = self.not_before.filter(|at| *at > now);
    }

    fn accept(&mut self, now: Instant) {
        while self.waiting.len() < CALLERS_MAX {
            match Listener::accept(&self.socket) {
                Ok(stream) => self.waiting.push(Caller {
                    stream,
                    line: Vec::with_capacity(LINE_BYTES_MAX),
                    until: now + Duration::from_millis(LINE_MS_MAX),
                }),
                Err(error) if is_later(&error) => return,
                Err(error) => {
                    self.complaints.complain(format_args!(
                        "who calls the guest's sockets has to wait: {error}; allow this process more open files"
                    ));
                    self.not_before = Some(now + Duration::from_millis(REST_MS));
                    return;
                }
            }
        }
    }

    /// Nobody waits for so much of the time that was.
    pub(super) fn postpone(&mut self, by: Duration) {
        for caller in &mut self.waiting {
            caller.until += by;
        }
    }

    /// When [`Self::found`] is due, whatever was found.
    pub(super) fn until(&self) -> Option<Instant> {
        let callers = self.waiting.iter().map(|caller| caller.until);
        callers.chain(self.not_before).min()
    }
}

impl Caller {
    fn read(&mut self) -> Line {
        let mut bytes = [0; LINE_BYTES_MAX];
        let room = bytes.get_mut(self.line.len()..).unwrap_or_default();
        match self.stream.receive_line(room) {
            Ok(0) => return Line::Wrong,
            Ok(length) => self.line.extend(room.iter().take(length)),
            Err(error) if is_later(&error) => return Line::Open,
            Err(_) => return Line::Wrong,
        }
        match self.line.strip_suffix(b"\n") {
            Some(line) => wanted(line).map_or(Line::Wrong, Line::Port),
            None if self.line.len() == LINE_BYTES_MAX => Line::Wrong,
            None => Line::Open,
        }
    }
}

/// The port that a line names.
fn wanted(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let verb = words.next()?;
    let port = words.next()?.parse().ok()?;
    (verb.eq_ignore_ascii_case("connect") && words.next().is_none()).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_one_port_or_none() {
        for (line, port) in [
            ("CONNECT 52", Some(52)),
            ("connect 4294967295\r", Some(u32::MAX)),
            ("CONNECT 4294967296", None),
            ("CONNECT -1", None),
            ("CONNECT 52 53", None),
            ("CONNECT", None),
            ("", None),
            ("GET / HTTP/1.1", None),
        ] {
            assert_eq!(wanted(line.as_bytes()), port, "{line}");
        }
        assert_eq!(wanted(b"CONNECT \xff"), None);
    }
}
