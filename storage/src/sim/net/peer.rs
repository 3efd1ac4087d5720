//! The other end of a simulated connection.

use std::time::Instant;

/// A server's end of one connection. It is asked by the network, on the network's clock, and must not call the network
/// itself; peers that share a state see each other's changes at once.
pub trait Peer {
    /// Takes bytes that have arrived, in the order in which they were sent; they may be cut anywhere.
    fn receive(&mut self, bytes: &[u8], now: Instant);

    /// What it sends now, `room_bytes` at most. Asked after everything that happens.
    fn send(&mut self, room_bytes: usize, now: Instant) -> Vec<u8>;

    /// The connection is over: the client has closed it, or it was reset. Nothing is asked of the peer any more.
    fn closed(&mut self) {}

    /// Whether it closes the connection, once it has nothing more to send. Nothing is asked of it any more then.
    fn wants_close(&self) -> bool {
        false
    }

    /// When it wants [`Self::wake`] called.
    fn alarm(&self) -> Option<Instant> {
        None
    }

    /// Takes the time in. Afterwards its alarm lies in the future.
    fn wake(&mut self, now: Instant) {
        let _no_alarm = now;
    }
}
