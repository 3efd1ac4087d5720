//! The client's side of a simulated network: what a host does with its sockets.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Connection, Leave, Network, World};
use crate::reactor::LowWater;

/// Names a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::sim) struct SocketId(u64);

/// A socket of a client.
#[derive(Debug)]
pub(super) struct Socket {
    phase: Phase,
    resets_on_close: bool,
    mark: LowWater,
}

/// ```text
///   Fresh ──connect──► Calling ──answered──► Connected
///                         └──refused, or never answered──► Failed, told once ──► Fresh
/// ```
#[derive(Debug)]
enum Phase {
    Fresh,
    Calling(Call),
    Failed(i32),
    Connected(u64),
}

/// A connect that is not answered yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) address: SocketAddr,
    answered_at: Instant,
    /// Whether there is an answer at all; otherwise the host gives up.
    pub(super) is_heard: bool,
}

/// Why an operation does not end now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::sim) struct Blocked;

/// After how long a host gives up a connect that nobody answers (net.ipv4.tcp_syn_retries).
const CONNECT_MAX: Duration = Duration::from_secs(131);

impl Socket {
    fn new() -> Self {
        Self {
            phase: Phase::Fresh,
            resets_on_close: false,
            mark: LowWater::ANY,
        }
    }

    pub(super) fn answered_at(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Calling(call) => Some(call.answered_at),
            _ => None,
        }
    }

    /// The call, if it is answered by `now`; the socket waits for the answer.
    pub(super) fn take_call(&mut self, now: Instant) -> Option<Call> {
        match self.phase {
            Phase::Calling(call) if call.answered_at <= now => {
                self.phase = Phase::Fresh;
                Some(call)
            }
            _ => None,
        }
    }

    pub(super) fn fail(&mut self, errno: i32) {
        self.phase = Phase::Failed(errno);
    }

    pub(super) fn connected(&mut self, connection: u64) {
        self.phase = Phase::Connected(connection);
    }

    fn connection(&self) -> Option<u64> {
        match self.phase {
            Phase::Connected(connection) => Some(connection),
            _ => None,
        }
    }
}

impl Network {
    /// Makes a socket.
    pub(in crate::sim) fn make(&self) -> SocketId {
        let world = &mut *self.0.borrow_mut();
        world.next += 1;
        let id = SocketId(world.next);
        world.sockets.insert(id, Socket::new());
        id
    }

    /// From now on closing the socket resets its connection.
    pub(in crate::sim) fn reset_on_close(&self, id: SocketId) {
        if let Some(socket) = self.0.borrow_mut().sockets.get_mut(&id) {
            socket.resets_on_close = true;
        }
    }

    /// From now on a receive that waits does so until the mark is reached.
    pub(in crate::sim) fn set_low_water(&self, id: SocketId, mark: LowWater) {
        if let Some(socket) = self.0.borrow_mut().sockets.get_mut(&id) {
            socket.mark = mark;
        }
    }

    /// Calls `address`; [`Self::connected`] knows the answer. An error if the socket has called before.
    pub(in crate::sim) fn connect(&self, id: SocketId, address: SocketAddr) -> Result<(), i32> {
        let world = &mut *self.0.borrow_mut();
        let (faults, dice) = (&world.faults, &mut world.dice);
        let socket = world.sockets.get_mut(&id).ok_or(libc::EBADF)?;
        match socket.phase {
            Phase::Fresh => {}
            Phase::Calling(_) => return Err(libc::EALREADY),
            Phase::Connected(_) => return Err(libc::EISCONN),
            Phase::Failed(errno) => {
                socket.phase = Phase::Fresh;
                return Err(errno);
            }
        }
        if dice.one_in(faults.refused_one_in) {
            return Err(libc::ECONNREFUSED);
        }
        let is_heard = !dice.one_in(faults.unanswered_one_in);
        let time = if is_heard { faults.delay(dice) } else { CONNECT_MAX };
        socket.phase = Phase::Calling(Call {
            address,
            answered_at: world.clock.now() + time,
            is_heard,
        });
        Ok(())
    }

    /// How a call was answered.
    pub(in crate::sim) fn connected(&self, id: SocketId) -> Result<Result<(), i32>, Blocked> {
        let world = &mut *self.0.borrow_mut();
        let Some(socket) = world.sockets.get_mut(&id) else {
            return Ok(Err(libc::EBADF));
        };
        match socket.phase {
            Phase::Calling(_) => Err(Blocked),
            Phase::Connected(_) => Ok(Ok(())),
            Phase::Fresh => Ok(Err(libc::ENOTCONN)),
            Phase::Failed(errno) => {
                socket.phase = Phase::Fresh;
                Ok(Err(errno))
            }
        }
    }

    /// How many bytes a send takes now at most.
    pub(in crate::sim) fn send_room(&self, id: SocketId) -> Result<Result<usize, i32>, Blocked> {
        let world = &mut *self.0.borrow_mut();
        match world.connection_of(id) {
            None => Ok(Err(libc::EPIPE)),
            Some(connection) => match connection.send_room() {
                Ok(0) => Err(Blocked),
                ended => Ok(ended),
            },
        }
    }

    /// Sends bytes for which there is room.
    pub(in crate::sim) fn send(&self, id: SocketId, bytes: &[u8]) {
        let world = &mut *self.0.borrow_mut();
        let now = world.clock.now();
        let connection = world.sockets.get(&id).and_then(Socket::connection);
        if let Some(connection) = connection.and_then(|connection| world.connections.get_mut(&connection)) {
            connection.send(bytes, now, &world.faults, &mut world.dice);
        }
    }

    /// Up to `bytes_max` that have arrived; none at the end of the stream.
    pub(in crate::sim) fn receive(
        &self,
        id: SocketId,
        bytes_max: usize,
    ) -> Result<Result<Vec<u8>, i32>, Blocked> {
        let world = &mut *self.0.borrow_mut();
        match world.connection_of(id) {
            None => Ok(Err(libc::ENOTCONN)),
            Some(connection) => connection.receive(bytes_max).transpose().ok_or(Blocked),
        }
    }

    /// Whether a receive would end now, if it takes anything.
    pub(in crate::sim) fn is_readable(&self, id: SocketId) -> bool {
        let world = &mut *self.0.borrow_mut();
        world
            .connection_of(id)
            .is_none_or(|connection| connection.is_readable())
    }

    /// Whether a receive that waits is told to go on.
    pub(in crate::sim) fn has_reached_mark(&self, id: SocketId) -> bool {
        let world = &mut *self.0.borrow_mut();
        let mark = world.sockets.get(&id).map_or(LowWater::ANY, |socket| socket.mark);
        world
            .connection_of(id)
            .is_none_or(|connection| connection.has_reached(mark))
    }

    /// Whether a send would end now.
    pub(in crate::sim) fn is_writable(&self, id: SocketId) -> bool {
        let world = &mut *self.0.borrow_mut();
        world
            .connection_of(id)
            .is_none_or(|connection| connection.is_writable())
    }

    /// Whether a connect is answered.
    pub(in crate::sim) fn is_answered(&self, id: SocketId) -> bool {
        let world = self.0.borrow();
        let socket = world.sockets.get(&id);
        socket.is_none_or(|socket| socket.answered_at().is_none())
    }

    /// Closes the socket; what it had sent goes on.
    pub(in crate::sim) fn close(&self, id: SocketId) {
        self.0.borrow_mut().leave(id, Leave::Close);
    }

    /// Forgets the socket, as when its host is cut off.
    pub(in crate::sim) fn vanish(&self, id: SocketId) {
        self.0.borrow_mut().leave(id, Leave::Vanish);
    }
}

impl World {
    fn connection_of(&mut self, id: SocketId) -> Option<&mut Connection> {
        let connection = self.sockets.get(&id)?.connection()?;
        self.connections.get_mut(&connection)
    }

    fn leave(&mut self, id: SocketId, leave: Leave) {
        let Some(socket) = self.sockets.remove(&id) else {
            return;
        };
        let leave = match leave {
            Leave::Close if socket.resets_on_close => Leave::Reset,
            leave => leave,
        };
        let now = self.clock.now();
        let connection = socket.connection();
        if let Some(connection) = connection.and_then(|connection| self.connections.get_mut(&connection)) {
            connection.leave(leave, now, &self.faults, &mut self.dice);
        }
    }
}
