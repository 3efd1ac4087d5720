//! One operation on a socket between its submission and its end.
#![expect(unsafe_code, reason = "the address of a peer is looked at")]

use std::net::SocketAddr;

use crate::reactor::{FILES_MAX, SocketOp, SocketOption, Token};
use crate::sim::dice::Dice;
use crate::sim::net::{Blocked, Network, SocketId};
use crate::sim::reactor::Faults;
use crate::sim::reactor::memory::Memory;

/// The sockets of a reactor, by the place of the file that they took.
pub(super) type Places = [Option<SocketId>; FILES_MAX];

/// An operation on a socket that a simulated host is at work on.
pub(super) struct Talk {
    pub(super) token: Token,
    pub(super) place: usize,
    pub(super) operation: SocketOp,
    memory: Memory,
    /// Whether a connect has called.
    has_called: bool,
    /// Whether a receive has found nothing, and waits for the mark of its socket.
    has_waited: bool,
}

impl Talk {
    pub(super) fn new(place: usize, operation: SocketOp, token: Token) -> Self {
        let memory = match operation {
            SocketOp::Send {
                segments,
                segment_count,
            }
            | SocketOp::Receive {
                segments,
                segment_count,
            } => Memory::of(segments, segment_count),
            _ => Memory::none(),
        };
        Self {
            token,
            place,
            operation,
            memory,
            has_called: false,
            has_waited: false,
        }
    }

    /// Whether it would end, or go on, if it were tried.
    pub(super) fn is_ready(&self, places: &Places, network: &Network) -> bool {
        let Some(socket) = places.get(self.place).copied().flatten() else {
            return true;
        };
        match self.operation {
            SocketOp::Connect { .. } => !self.has_called || network.is_answered(socket),
            SocketOp::Send { .. } => network.is_writable(socket),
            SocketOp::Receive { .. } => self.may_receive(socket, network),
            _ => true,
        }
    }

    /// Tries it: its result, or that it has to wait.
    pub(super) fn attempt(
        &mut self,
        places: &mut Places,
        network: &Network,
        faults: &Faults,
        dice: &mut Dice,
    ) -> Result<i32, Blocked> {
        let place = places
            .get_mut(self.place)
            .expect("it was looked at when it was submitted");
        match (self.operation, *place) {
            (SocketOp::Make(_), old) => {
                old.into_iter().for_each(|old| network.close(old));
                *place = Some(network.make());
                Ok(0)
            }
            (SocketOp::Close, old) => {
                old.into_iter().for_each(|old| network.close(old));
                *place = None;
                Ok(0)
            }
            (SocketOp::Cancel { .. }, _) => Ok(-libc::ENOENT),
            (_, None) => Ok(-libc::EBADF),
            (SocketOp::SetOption(option), Some(socket)) => {
                match option {
                    SocketOption::NoDelay => {}
                    SocketOption::ResetOnClose => network.reset_on_close(socket),
                    SocketOption::LowWater(mark) => network.set_low_water(socket, mark),
                }
                Ok(0)
            }
            (SocketOp::Connect { peer }, Some(socket)) => {
                // SAFETY: the address stays in place until the operation ends (contract of `SocketOp`).
                let address = unsafe { &*peer }.address();
                self.connect(socket, address, network)
            }
            (SocketOp::Send { .. } | SocketOp::Receive { .. }, Some(socket))
                if self.is_interrupted(socket, network, faults, dice) =>
            {
                Ok(-dice.pick(&[libc::EINTR, libc::EAGAIN]))
            }
            (SocketOp::Send { .. }, Some(socket)) => self.send(socket, network, faults, dice),
            (SocketOp::Receive { .. }, Some(socket)) => self.receive(socket, network, faults, dice),
            // Nothing outside the simulation could go on with it.
            (SocketOp::Take, Some(_)) => Ok(-libc::EOPNOTSUPP),
        }
    }

    fn is_interrupted(&self, socket: SocketId, network: &Network, faults: &Faults, dice: &mut Dice) -> bool {
        let is_ready = match self.operation {
            SocketOp::Send { .. } => network.is_writable(socket),
            _ => self.may_receive(socket, network),
        };
        is_ready && dice.one_in(faults.interrupted_one_in)
    }

    fn connect(&mut self, socket: SocketId, address: SocketAddr, network: &Network) -> Result<i32, Blocked> {
        if !self.has_called {
            self.has_called = true;
            if let Err(errno) = network.connect(socket, address) {
                return Ok(-errno);
            }
        }
        let answered = network.connected(socket)?;
        Ok(answered.map_or_else(|errno| -errno, |()| 0))
    }

    fn send(
        &self,
        socket: SocketId,
        network: &Network,
        faults: &Faults,
        dice: &mut Dice,
    ) -> Result<i32, Blocked> {
        let room_bytes = match network.send_room(socket)? {
            Ok(room_bytes) => room_bytes,
            Err(errno) => return Ok(-errno),
        };
        let len_bytes = shortened(self.memory.len_bytes().min(room_bytes), faults, dice);
        network.send(socket, &self.memory.gather(0, len_bytes));
        Ok(count(len_bytes))
    }

    /// Only what has waited minds the mark.
    fn may_receive(&self, socket: SocketId, network: &Network) -> bool {
        if self.has_waited {
            network.has_reached_mark(socket)
        } else {
            network.is_readable(socket)
        }
    }

    fn receive(
        &mut self,
        socket: SocketId,
        network: &Network,
        faults: &Faults,
        dice: &mut Dice,
    ) -> Result<i32, Blocked> {
        if !self.may_receive(socket, network) {
            self.has_waited = true;
            return Err(Blocked);
        }
        let len_bytes = shortened(self.memory.len_bytes(), faults, dice);
        Ok(match network.receive(socket, len_bytes)? {
            Ok(bytes) => {
                self.memory.scatter(0, &bytes);
                count(bytes.len())
            }
            Err(errno) => -errno,
        })
    }
}

/// A length, or a part of it if the host is in the mood.
fn shortened(len_bytes: usize, faults: &Faults, dice: &mut Dice) -> usize {
    if len_bytes > 1 && dice.one_in(faults.short_one_in) {
        1 + dice.index(len_bytes - 1)
    } else {
        len_bytes
    }
}

fn count(bytes: usize) -> i32 {
    i32::try_from(bytes).expect("a simulated transfer is small")
}
