//! A simulated network: connections whose bytes come late, in pieces, or not at all.
//!
//! Bytes travel in both directions in pieces of any size, in order, each for a time of its own. What goes wrong beside
//! that [`NetFaults`] says. Everything is drawn from one seed, and happens on one [`Clock`].

mod connection;
mod faults;
mod peer;
mod pipe;
mod socket;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use self::connection::{Connection, Leave};
pub use self::faults::NetFaults;
pub use self::peer::Peer;
pub(in crate::sim) use self::socket::{Blocked, SocketId};
use self::socket::{Call, Socket};
use super::clock::Clock;
use super::dice::Dice;

/// A network with listeners; a clone is the same network. A reactor has sockets in it once it has joined
/// ([`crate::sim::reactor::SimReactor::join`]).
#[derive(Clone)]
pub struct Network(Rc<RefCell<World>>);

/// Makes the peer of a new connection.
type Listener = Box<dyn FnMut() -> Box<dyn Peer>>;

struct World {
    clock: Clock,
    dice: Dice,
    faults: NetFaults,
    listeners: BTreeMap<SocketAddr, Listener>,
    /// Until when an address is held.
    held: BTreeMap<SocketAddr, Instant>,
    connections: BTreeMap<u64, Connection>,
    sockets: BTreeMap<SocketId, Socket>,
    /// The name of the next connection or socket.
    next: u64,
}

impl Network {
    /// A network without listeners, on a clock of its own.
    pub fn new(faults: NetFaults, dice: Dice) -> Self {
        Self(Rc::new(RefCell::new(World {
            clock: Clock::default(),
            dice,
            faults,
            listeners: BTreeMap::new(),
            held: BTreeMap::new(),
            connections: BTreeMap::new(),
            sockets: BTreeMap::new(),
            next: 0,
        })))
    }

    /// The clock of everything that happens here.
    pub fn clock(&self) -> Clock {
        self.0.borrow().clock.clone()
    }

    /// From now on the network behaves like this; what travels already arrives as it would have.
    pub fn set_faults(&self, faults: NetFaults) {
        self.0.borrow_mut().faults = faults;
    }

    /// Accepts connections to `address` from now on; `accept` makes the peer of each.
    pub fn listen(&self, address: SocketAddr, accept: impl FnMut() -> Box<dyn Peer> + 'static) {
        self.0.borrow_mut().listeners.insert(address, Box::new(accept));
    }

    /// Refuses connections to `address` from now on. Those that there are stay.
    pub fn unlisten(&self, address: SocketAddr) {
        self.0.borrow_mut().listeners.remove(&address);
    }

    /// Resets every connection to `address`, as when a server is killed.
    pub fn reset(&self, address: SocketAddr) {
        let world = &mut *self.0.borrow_mut();
        let now = world.clock.now();
        for connection in world.connections.values_mut() {
            if connection.address == address {
                connection.reset(now, &world.faults, &mut world.dice);
            }
        }
    }

    /// Holds everything that travels to and from `address` until `until`: a black hole, or a server that is stopped. New
    /// connections are answered, as the kernel of a stopped server does, and held as well.
    pub fn hold(&self, address: SocketAddr, until: Instant) {
        let world = &mut *self.0.borrow_mut();
        world.held.insert(address, until);
        for connection in world.connections.values_mut() {
            if connection.address == address {
                connection.hold(until);
            }
        }
    }

    /// How many connections have both their ends.
    pub fn open_connections(&self) -> usize {
        let world = self.0.borrow();
        world
            .connections
            .values()
            .filter(|connection| connection.is_open())
            .count()
    }

    /// Lets everything happen that is due by now. A reactor that waits does this by itself.
    pub fn advance(&self) {
        self.0.borrow_mut().advance();
    }

    /// When something happens next, if nobody sends anything.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.borrow().next_event()
    }
}

impl World {
    fn advance(&mut self) {
        let now = self.clock.now();
        while let Some(at) = self.next_event().filter(|at| *at <= now) {
            self.answer_calls(at);
            for connection in self.connections.values_mut() {
                connection.step(at);
            }
            self.pump(at);
        }
        self.pump(now);
        self.connections.retain(|_, connection| !connection.is_over());
    }

    fn next_event(&self) -> Option<Instant> {
        let calls = self.sockets.values().filter_map(Socket::answered_at);
        let connections = self.connections.values().filter_map(Connection::next);
        calls.chain(connections).min()
    }

    fn pump(&mut self, now: Instant) {
        for connection in self.connections.values_mut() {
            connection.pump(now, &self.faults, &mut self.dice);
        }
    }

    /// Answers the clients that called by `now`.
    fn answer_calls(&mut self, now: Instant) {
        for socket in self.sockets.values_mut() {
            let Some(Call {
                address, is_heard, ..
            }) = socket.take_call(now)
            else {
                continue;
            };
            match self.listeners.get_mut(&address) {
                _ if !is_heard => socket.fail(libc::ETIMEDOUT),
                None => socket.fail(libc::ECONNREFUSED),
                Some(accept) => {
                    let mut connection = Connection::new(address, accept(), &mut self.dice);
                    if let Some(until) = self.held.get(&address) {
                        connection.hold(*until);
                    }
                    self.next += 1;
                    self.connections.insert(self.next, connection);
                    socket.connected(self.next);
                }
            }
        }
    }
}
