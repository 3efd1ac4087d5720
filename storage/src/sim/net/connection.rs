//! One simulated connection: a client's end, a peer's end, and what travels between them.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Instant;

use super::faults::{NetFaults, up_to};
use super::peer::Peer;
use super::pipe::{Piece, Pipe};
use crate::reactor::LowWater;
use crate::sim::dice::Dice;

/// ```text
///   client: Open ──End arrives──► Ended ──┐         peer: Open ──End or Reset arrives, it closes, or it goes away──► Closed
///             └──Reset arrives──► Reset ──┴──closed, or its host vanishes──► Gone
/// ```
///
/// It is over when the client is gone and the peer is closed.
pub(super) struct Connection {
    pub(super) address: SocketAddr,
    peer: Box<dyn Peer>,
    peer_is_open: bool,
    client: Client,
    /// From the client to the peer.
    up: Pipe,
    /// From the peer to the client.
    down: Pipe,
    /// What the client has not received yet.
    arrived: VecDeque<u8>,
    /// When a connection that loses everything is reset.
    doom: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Client {
    Open,
    Ended,
    /// It was told so, or it will be at the next operation.
    Reset {
        is_told: bool,
    },
    Gone,
}

/// The direction in which bytes travel.
#[derive(Clone, Copy)]
enum Way {
    Up,
    Down,
}

/// How a client leaves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Leave {
    Close,
    Reset,
    /// Its host is cut off: what was sent goes on, and nobody says that it was the last.
    Vanish,
}

impl Connection {
    pub(super) fn new(address: SocketAddr, peer: Box<dyn Peer>, dice: &mut Dice) -> Self {
        let mut pipe = || Pipe::new(dice.pick(&[600, 8 << 10, 64 << 10, 256 << 10]));
        Self {
            address,
            peer,
            peer_is_open: true,
            client: Client::Open,
            up: pipe(),
            down: pipe(),
            arrived: VecDeque::new(),
            doom: None,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.client == Client::Gone && !self.peer_is_open
    }

    /// Whether the peer still talks to the client, as far as both know.
    pub(super) fn is_open(&self) -> bool {
        self.peer_is_open && self.client == Client::Open
    }

    /// When something happens next.
    pub(super) fn next(&self) -> Option<Instant> {
        let alarm = self.peer.alarm().filter(|_| self.peer_is_open);
        let times = [self.up.next(), self.down.next(), alarm, self.doom];
        times.into_iter().flatten().min()
    }

    /// Lets happen what is due by `now`.
    pub(super) fn step(&mut self, now: Instant) {
        if self.doom.is_some_and(|doom| doom <= now) {
            self.doom = None;
            for pipe in [&mut self.up, &mut self.down] {
                pipe.lose();
                pipe.push(now, Piece::Reset);
            }
        }
        while let Some(piece) = self.up.arrive(now) {
            self.arrive_at_peer(piece, now);
        }
        while let Some(piece) = self.down.arrive(now) {
            self.arrive_at_client(piece);
        }
        if self.peer_is_open && self.peer.alarm().is_some_and(|alarm| alarm <= now) {
            self.peer.wake(now);
            let next = self.peer.alarm();
            assert!(next.is_none_or(|next| next > now), "a peer's alarm does not end");
        }
    }

    /// Lets the peer send.
    pub(super) fn pump(&mut self, now: Instant, faults: &NetFaults, dice: &mut Dice) {
        if !self.peer_is_open {
            return;
        }
        let room_bytes = self.down.room_bytes(self.arrived.len());
        let bytes = match room_bytes {
            0 => Vec::new(),
            _ => self.peer.send(room_bytes, now),
        };
        assert!(
            bytes.len() <= room_bytes,
            "a peer sends more than there is room for"
        );
        let is_last = bytes.is_empty() && room_bytes > 0 && self.peer.wants_close();
        self.carry(Way::Down, &bytes, now, faults, dice);
        if is_last {
            self.peer_is_open = false;
            self.down.push(now + faults.delay(dice), Piece::End);
        }
    }

    /// How many bytes the client may send; an error if it may send none ever.
    pub(super) fn send_room(&mut self) -> Result<usize, i32> {
        match &mut self.client {
            Client::Reset { is_told } if !*is_told => {
                *is_told = true;
                Err(libc::ECONNRESET)
            }
            Client::Reset { .. } | Client::Gone => Err(libc::EPIPE),
            Client::Open | Client::Ended => Ok(self.up.room_bytes(0)),
        }
    }

    /// Sends what the client has room for.
    pub(super) fn send(&mut self, bytes: &[u8], now: Instant, faults: &NetFaults, dice: &mut Dice) {
        self.carry(Way::Up, bytes, now, faults, dice);
    }

    /// Whether a receive would end now.
    pub(super) fn is_readable(&self) -> bool {
        self.has_reached(LowWater::ANY)
    }

    /// Whether what has arrived reaches the mark, or leaves no room for more; or nothing more comes.
    pub(super) fn has_reached(&self, mark: LowWater) -> bool {
        let enough_bytes = mark.bytes().min(self.down.capacity_bytes());
        self.arrived.len() >= enough_bytes || self.client != Client::Open
    }

    /// Whether a send would end now.
    pub(super) fn is_writable(&self) -> bool {
        self.up.room_bytes(0) > 0 || matches!(self.client, Client::Reset { .. } | Client::Gone)
    }

    /// Up to `bytes_max` that have arrived, none at the end of the stream; `None` if more may come.
    pub(super) fn receive(&mut self, bytes_max: usize) -> Result<Option<Vec<u8>>, i32> {
        if !self.arrived.is_empty() || bytes_max == 0 {
            let len = bytes_max.min(self.arrived.len());
            return Ok(Some(self.arrived.drain(..len).collect()));
        }
        match &mut self.client {
            Client::Open => Ok(None),
            Client::Reset { is_told } if !*is_told => {
                *is_told = true;
                Err(libc::ECONNRESET)
            }
            Client::Ended | Client::Reset { .. } | Client::Gone => Ok(Some(Vec::new())),
        }
    }

    /// The client leaves.
    pub(super) fn leave(&mut self, leave: Leave, now: Instant, faults: &NetFaults, dice: &mut Dice) {
        // Whoever closes without having read everything resets, too.
        let resets = leave == Leave::Reset || (leave == Leave::Close && !self.arrived.is_empty());
        self.client = Client::Gone;
        self.arrived.clear();
        self.down.stick();
        if leave == Leave::Vanish {
            return;
        }
        let last = if resets {
            self.up.cut(dice.index(self.up.len() + 1));
            if dice.one_in(faults.late_one_in) {
                self.up.delay(up_to(faults.late_max, dice));
            }
            Piece::Reset
        } else {
            Piece::End
        };
        self.up.push(now + faults.delay(dice), last);
    }

    /// Resets the connection for both ends; some of what travels arrives before that.
    pub(super) fn reset(&mut self, now: Instant, faults: &NetFaults, dice: &mut Dice) {
        for pipe in [&mut self.up, &mut self.down] {
            pipe.cut(dice.index(pipe.len() + 1));
            pipe.push(now + faults.delay(dice), Piece::Reset);
        }
    }

    /// Holds what travels back until then.
    pub(super) fn hold(&mut self, until: Instant) {
        self.up.hold(until);
        self.down.hold(until);
    }

    fn arrive_at_peer(&mut self, piece: Piece, now: Instant) {
        match piece {
            Piece::Bytes(bytes) if self.peer_is_open => self.peer.receive(&bytes, now),
            // Nobody is there any more.
            Piece::Bytes(_) => {
                self.down.reopen();
                self.down.push(now, Piece::Reset);
            }
            Piece::End | Piece::Reset => self.close_peer(),
        }
    }

    fn arrive_at_client(&mut self, piece: Piece) {
        match (piece, self.client) {
            (_, Client::Gone | Client::Reset { .. }) => {}
            (Piece::Bytes(bytes), _) => self.arrived.extend(bytes),
            (Piece::End, _) => self.client = Client::Ended,
            (Piece::Reset, _) => self.client = Client::Reset { is_told: false },
        }
    }

    fn close_peer(&mut self) {
        if self.peer_is_open {
            self.peer_is_open = false;
            self.peer.closed();
        }
    }

    fn carry(&mut self, way: Way, bytes: &[u8], now: Instant, faults: &NetFaults, dice: &mut Dice) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (piece, more) = rest.split_at(piece_bytes(rest.len(), dice));
            rest = more;
            let at = now + faults.delay(dice);
            let pipe = match way {
                Way::Up => &mut self.up,
                Way::Down => &mut self.down,
            };
            if pipe.is_ended() {
                return;
            }
            pipe.push(at, Piece::Bytes(piece.to_vec()));
            self.meet_faults(now, faults, dice);
        }
    }

    fn meet_faults(&mut self, now: Instant, faults: &NetFaults, dice: &mut Dice) {
        if dice.one_in(faults.reset_one_in) {
            self.reset(now, faults, dice);
        }
        if dice.one_in(faults.hole_one_in) {
            let until = now + up_to(faults.hole_max, dice);
            if dice.one_in(2) {
                self.hold(until);
            } else {
                self.stick();
                self.doom = Some(until);
            }
        }
        if dice.one_in(faults.half_open_one_in) {
            self.stick();
            self.doom = None;
            self.close_peer();
        }
    }

    fn stick(&mut self) {
        self.up.stick();
        self.down.stick();
    }
}

/// How many of `len` bytes travel together: headers, what fits, or a byte.
fn piece_bytes(len: usize, dice: &mut Dice) -> usize {
    match dice.below(8) {
        0 => 1,
        1 => len.min(48),
        2 => len.min(1 + dice.index(100)),
        3 | 4 => 1 + dice.index(len),
        _ => len,
    }
}
