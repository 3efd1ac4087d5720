//! A simulated server at the other end of a simulated network.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::Server;
use super::connection::Connection;
use crate::sim::net::Peer;
use crate::sim::serve::Host;

/// One connection of a server, on the clock of a network.
#[derive(Debug)]
pub struct ServerPeer {
    connection: Connection,
    /// What the network had no room for.
    unsent: VecDeque<u8>,
    alarm: Option<Instant>,
}

/// How long a server that has something left to do waits at least until it goes on.
const STEP: Duration = Duration::from_micros(50);

impl ServerPeer {
    /// A new connection of the server.
    pub fn new(server: &Server) -> Self {
        Self {
            connection: Connection::new(server),
            unsent: VecDeque::new(),
            alarm: None,
        }
    }
}

impl Peer for ServerPeer {
    fn receive(&mut self, bytes: &[u8], _now: Instant) {
        self.connection.receive(bytes);
    }

    fn send(&mut self, room_bytes: usize, now: Instant) -> Vec<u8> {
        // Whoever does not read is not answered without end.
        if self.unsent.len() < room_bytes {
            self.unsent.extend(self.connection.transmit());
        }
        let has_room = self.unsent.len() < room_bytes;
        let due = self.connection.due().filter(|_| has_room);
        self.alarm = due.map(|due| due.max(now + STEP));
        let count = room_bytes.min(self.unsent.len());
        self.unsent.drain(..count).collect()
    }

    fn closed(&mut self) {
        self.connection.close();
    }

    fn wants_close(&self) -> bool {
        self.connection.is_closed() && self.unsent.is_empty()
    }

    fn alarm(&self) -> Option<Instant> {
        self.alarm
    }

    fn wake(&mut self, _now: Instant) {
        // What is due is sent when the network asks next: at once, or as soon as there is room.
        self.alarm = None;
    }
}

impl Host for Server {
    fn accept(&self) -> Box<dyn Peer> {
        Box::new(ServerPeer::new(self))
    }

    fn pass_to(&self, now: Instant) {
        self.state().clock.pass_to(now);
    }

    fn advance(&self) {
        Self::advance(self);
    }

    fn is_working(&self) -> bool {
        Self::is_working(self)
    }
}
