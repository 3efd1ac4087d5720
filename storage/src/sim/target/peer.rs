//! A simulated target at the other end of a simulated network.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Connection, Target};
use crate::sim::net::Peer;
use crate::sim::serve::Host;

/// One connection of a target, on the clock of a network.
#[derive(Debug)]
pub struct TargetPeer {
    connection: Connection,
    /// What the network had no room for.
    unsent: VecDeque<u8>,
    alarm: Option<Instant>,
}

/// How long a target that has something left to do waits until it goes on.
const STEP: Duration = Duration::from_micros(50);

impl TargetPeer {
    /// A new connection of the target.
    pub fn new(target: &Target) -> Self {
        Self {
            connection: target.connect(),
            unsent: VecDeque::new(),
            alarm: None,
        }
    }
}

impl Peer for TargetPeer {
    fn receive(&mut self, bytes: &[u8], _now: Instant) {
        self.connection.receive(bytes);
    }

    fn send(&mut self, room_bytes: usize, now: Instant) -> Vec<u8> {
        // Whoever does not read is not answered without end.
        if self.unsent.len() < room_bytes {
            self.unsent.extend(self.connection.transmit());
        }
        let due = self.alarm.filter(|alarm| *alarm > now);
        self.alarm = self.connection.is_busy().then_some(due.unwrap_or(now + STEP));
        let count = room_bytes.min(self.unsent.len());
        self.unsent.drain(..count).collect()
    }

    fn closed(&mut self) {
        self.connection.close();
    }

    fn wants_close(&self) -> bool {
        self.connection.closed() && self.unsent.is_empty()
    }

    fn alarm(&self) -> Option<Instant> {
        self.alarm
    }

    fn wake(&mut self, now: Instant) {
        // What is due is sent when the network asks next, which it does at once.
        self.alarm = Some(now + STEP);
    }
}

impl Host for Target {
    fn accept(&self) -> Box<dyn Peer> {
        Box::new(TargetPeer::new(self))
    }

    fn pass_to(&self, now: Instant) {
        // It does what it has to do in steps, whatever the time is.
        let _no_clock = now;
    }

    fn advance(&self) {
        Self::advance(self);
    }

    fn is_working(&self) -> bool {
        Self::is_working(self)
    }
}
