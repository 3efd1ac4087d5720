//! One TCP connection, begun from here, as much of it as a measurement needs (RFC 9293).
//!
//! Data counts and is not kept: what is sent is always the same, so it can be sent again, and what is received is
//! taken at once. Nothing is held back for congestion: the other end is on this host. What comes out of order is dropped.

use crate::packet::{Segment, flag};
use crate::width::low32;

/// How much data one segment carries at most: as many segments of the wire as fit into one of the device.
pub const DATA_BYTES_MAX: u32 = 44 * MSS as u32;
/// How much data a segment of the wire carries.
pub const MSS: u16 = 1460;
/// What we let the other send: the ring holds as much.
const WINDOW: u16 = 8192;
const SCALE: u8 = 7;
/// So many acknowledgements of the same mean that something was lost.
const DUPLICATES: u32 = 3;

/// A connection.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    state: State,
    /// The first numbers of both directions, of which the SYN has one.
    ours: u32,
    theirs: u32,
    /// Data: how much there is to send, was sent, was ever sent, has arrived.
    wanted: u64,
    sent: u64,
    furthest: u64,
    acknowledged: u64,
    /// Whether there will be no more of it, whether a FIN says so, and whether that has arrived.
    is_last: bool,
    has_said_so: bool,
    was_heard: bool,
    window: u64,
    scale: u8,
    received: u64,
    has_ended: bool,
    owes: bool,
    duplicates: u32,
    /// When something was last acknowledged, or asked for anew.
    progress: u64,
    /// How long that may take, in ticks.
    patience: u64,
    /// How often something was sent again.
    pub repeats: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Begun,
    Calling,
    Open,
    Refused,
}

impl Connection {
    /// A connection that begins with number `ours`, and sends again what is not acknowledged for `patience` ticks.
    #[must_use]
    pub const fn new(ours: u32, patience: u64) -> Self {
        Self {
            state: State::Begun,
            ours,
            theirs: 0,
            wanted: 0,
            sent: 0,
            furthest: 0,
            acknowledged: 0,
            is_last: false,
            has_said_so: false,
            was_heard: false,
            window: 0,
            scale: 0,
            received: 0,
            has_ended: false,
            owes: false,
            duplicates: 0,
            progress: 0,
            patience,
            repeats: 0,
        }
    }

    /// Has so many bytes more to send.
    pub fn send(&mut self, bytes: u64) {
        self.wanted += bytes;
    }

    /// Has nothing more to send after that.
    pub fn end(&mut self) {
        self.is_last = true;
    }

    /// Whether the other has answered, and data may go both ways.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Whether all that was to be sent has arrived, also the end if that was said.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.acknowledged == self.wanted && (!self.is_last || self.was_heard)
    }

    /// How much has come.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether the other has said that nothing more comes.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Whether the other knows of no such connection.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.state == State::Refused
    }

    /// Takes in what has come.
    pub fn heard(&mut self, segment: &Segment, now: u64) {
        if segment.flags & flag::RST != 0 {
            self.state = State::Refused;
            return;
        }
        match self.state {
            State::Begun | State::Refused => {}
            State::Calling => {
                let answers = flag::SYN | flag::ACK;
                if segment.flags & answers == answers && segment.acknowledged == self.ours.wrapping_add(1) {
                    self.state = State::Open;
                    self.theirs = segment.sequence;
                    self.scale = segment.scale.unwrap_or(0);
                    self.window = u64::from(segment.window);
                    self.progress = now;
                    self.owes = true;
                }
            }
            State::Open => {
                self.take_acknowledgement(segment, now);
                self.take_data(segment);
            }
        }
    }

    fn take_acknowledgement(&mut self, segment: &Segment, now: u64) {
        if segment.flags & flag::ACK == 0 {
            return;
        }
        self.window = u64::from(segment.window) << self.scale;
        let more = ahead(segment.acknowledged, self.number(self.acknowledged));
        let there_is = self.furthest - self.acknowledged;
        if more > there_is + u64::from(self.has_said_so) {
            // Of what was never sent, or long ago.
            return;
        }
        if more == 0 {
            let is_repeated = segment.data_bytes == 0 && self.furthest > self.acknowledged;
            self.duplicates = if is_repeated { self.duplicates + 1 } else { 0 };
            if self.duplicates == DUPLICATES {
                self.begin_again(now);
            }
            return;
        }
        self.duplicates = 0;
        self.progress = now;
        self.was_heard |= more > there_is;
        self.acknowledged += more.min(there_is);
        self.sent = self.sent.max(self.acknowledged);
    }

    fn take_data(&mut self, segment: &Segment) {
        let is_end = segment.flags & flag::FIN != 0;
        if segment.data_bytes == 0 && !is_end {
            return;
        }
        self.owes = true;
        let expected = self.theirs.wrapping_add(1).wrapping_add(low32(self.received));
        // How much of it we have already; more than all of it where it is of later.
        let known = ahead(expected, segment.sequence);
        let bytes = u64::from(segment.data_bytes);
        if known > bytes || self.has_ended {
            return;
        }
        self.received += bytes - known;
        self.has_ended = is_end;
    }

    /// What is to be said next, if anything.
    pub fn next(&mut self, now: u64) -> Option<Segment> {
        match self.state {
            State::Begun => {
                self.state = State::Calling;
                self.progress = now;
                Some(self.call())
            }
            State::Calling if self.is_late(now) => {
                self.progress = now;
                self.repeats += 1;
                Some(self.call())
            }
            State::Calling | State::Refused => None,
            State::Open => self.next_of_open(now),
        }
    }

    fn next_of_open(&mut self, now: u64) -> Option<Segment> {
        let waits = self.sent > self.acknowledged || (self.has_said_so && !self.was_heard);
        if waits && self.is_late(now) {
            self.begin_again(now);
        }
        if !waits {
            self.progress = now;
        }
        let in_flight = self.sent - self.acknowledged;
        let room = self.window.saturating_sub(in_flight);
        let left = self.wanted - self.sent;
        let bytes = u32::try_from(left.min(room))
            .unwrap_or(u32::MAX)
            .min(DATA_BYTES_MAX);
        // Less than a segment is sent only where there is no more.
        if bytes > 0 && (u64::from(bytes) == left || bytes >= u32::from(MSS)) {
            let segment = self.segment(flag::ACK | flag::PSH, bytes);
            self.sent += u64::from(bytes);
            self.furthest = self.furthest.max(self.sent);
            return Some(segment);
        }
        if self.is_last && !self.has_said_so && left == 0 {
            self.has_said_so = true;
            return Some(self.segment(flag::ACK | flag::FIN, 0));
        }
        self.owes.then(|| self.segment(flag::ACK, 0))
    }

    fn begin_again(&mut self, now: u64) {
        self.repeats += 1;
        self.progress = now;
        self.sent = self.acknowledged;
        self.has_said_so = self.was_heard;
        self.duplicates = 0;
    }

    fn is_late(&self, now: u64) -> bool {
        now.wrapping_sub(self.progress) > self.patience
    }

    fn call(&self) -> Segment {
        Segment {
            sequence: self.ours,
            flags: flag::SYN,
            window: WINDOW,
            scale: Some(SCALE),
            ..Segment::default()
        }
    }

    fn segment(&mut self, flags: u8, data_bytes: u32) -> Segment {
        self.owes = false;
        let taken = low32(self.received + u64::from(self.has_ended));
        Segment {
            sequence: self.number(self.sent),
            acknowledged: self.theirs.wrapping_add(1).wrapping_add(taken),
            flags,
            window: WINDOW,
            scale: None,
            data_bytes,
        }
    }

    /// The number of a byte of our data.
    fn number(&self, byte: u64) -> u32 {
        self.ours.wrapping_add(1).wrapping_add(low32(byte))
    }
}

/// How far `number` is ahead of `of`; very far where it is behind.
fn ahead(number: u32, of: u32) -> u64 {
    match number.wrapping_sub(of) {
        far if far > u32::MAX / 2 => u64::MAX >> 1,
        near => u64::from(near),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    const PATIENCE: u64 = 100;

    /// The other end, which takes everything and answers at once.
    struct Other {
        number: u32,
        expects: u32,
        taken: u64,
        window: u16,
    }

    impl Other {
        fn meets(connection: &mut Connection) -> Self {
            let call = connection.next(0).unwrap();
            assert_eq!((call.flags, call.scale), (flag::SYN, Some(SCALE)));
            let other = Self {
                number: u32::MAX - 10,
                expects: call.sequence.wrapping_add(1),
                taken: 0,
                window: 1000,
            };
            let answer = Segment {
                sequence: other.number.wrapping_sub(1),
                flags: flag::SYN | flag::ACK,
                scale: Some(8),
                ..other.says(0)
            };
            connection.heard(&answer, 0);
            other
        }

        fn says(&self, data_bytes: u32) -> Segment {
            Segment {
                sequence: self.number,
                acknowledged: self.expects,
                flags: flag::ACK,
                window: self.window,
                scale: None,
                data_bytes,
            }
        }

        fn takes(&mut self, segment: &Segment) {
            if segment.sequence == self.expects {
                self.taken += u64::from(segment.data_bytes);
                let end = u32::from(segment.flags & flag::FIN);
                self.expects = self.expects.wrapping_add(segment.data_bytes + end);
            }
        }
    }

    #[test]
    fn all_of_it_arrives_whatever_is_lost() {
        for lost in [0u64, 1, 2, 7, 30] {
            let mut connection = Connection::new(u32::MAX - 1_000_000, PATIENCE);
            let mut other = Other::meets(&mut connection);
            connection.send(5_000_000_000);
            connection.end();
            let (mut now, mut number) = (1, 0u64);
            while !connection.is_done() {
                now += PATIENCE / 10;
                while let Some(segment) = connection.next(now) {
                    number += 1;
                    if lost == 0 || number % (lost * 40) != 0 {
                        other.takes(&segment);
                        connection.heard(&other.says(0), now);
                    }
                }
            }
            assert_eq!(other.taken, 5_000_000_000);
            assert_eq!(connection.repeats > 0, lost > 0, "{lost}");
        }
    }

    #[test]
    fn no_more_is_sent_than_the_window_allows() {
        let mut connection = Connection::new(0, PATIENCE);
        let other = Other::meets(&mut connection);
        connection.send(1 << 30);
        connection.heard(&other.says(0), 1);
        let mut sent = 0;
        while let Some(segment) = connection.next(1) {
            sent += segment.data_bytes;
        }
        assert!(sent <= 1000 << 8 && sent > (1000 << 8) - u32::from(MSS), "{sent}");
    }

    #[test]
    fn what_comes_in_order_is_taken_and_anything_is_acknowledged() {
        let mut connection = Connection::new(0, PATIENCE);
        let mut other = Other::meets(&mut connection);
        assert_eq!(connection.next(0).unwrap().acknowledged, other.number);
        let first = other.says(100);
        connection.heard(&first, 0);
        other.number = other.number.wrapping_add(200);
        let third = other.says(100);
        connection.heard(&third, 0);
        assert_eq!(connection.received(), 100);
        other.number = other.number.wrapping_sub(100);
        connection.heard(&other.says(100), 0);
        // Half of it is known already.
        other.number = other.number.wrapping_add(50);
        let mut last = other.says(100);
        last.flags |= flag::FIN;
        connection.heard(&last, 0);
        assert_eq!((connection.received(), connection.has_ended()), (250, true));
        let acknowledged = connection.next(0).unwrap().acknowledged;
        assert_eq!(acknowledged, other.number.wrapping_add(101));
        assert_eq!(connection.next(0), None);
    }

    #[test]
    fn a_call_is_repeated_and_a_refusal_is_heard() {
        let mut connection = Connection::new(0, PATIENCE);
        assert!(connection.next(0).is_some());
        assert_eq!(connection.next(PATIENCE), None);
        assert_eq!(connection.next(PATIENCE + 1).unwrap().flags, flag::SYN);
        let refusal = Segment {
            flags: flag::RST | flag::ACK,
            ..Segment::default()
        };
        connection.heard(&refusal, 0);
        assert!(connection.is_refused());
        assert_eq!(connection.next(1000), None);
    }
}
