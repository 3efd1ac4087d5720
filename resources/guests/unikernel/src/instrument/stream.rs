//! A stream of a socket device, begun from here, as much of it as a measurement needs (virtio 1.2, section 5.10.6).
//!
//! As with TCP, data counts and is not kept. Nothing is lost on the way.

use crate::width::low32;

/// `struct virtio_vsock_hdr`.
pub const HEADER_BYTES: usize = 44;
/// How much data one packet of ours carries at most.
pub const DATA_BYTES_MAX: u32 = 64 << 10;

/// The host.
const HOST: u64 = 2;
const STREAM: u16 = 1;
/// What we let the other send before we say that we have taken it.
const BUFFER_BYTES: u32 = 256 << 10;
/// Neither end sends or receives any more.
const BOTH_ENDS: u32 = 3;
/// The other sends no more.
const SENDS_NO_MORE: u32 = 2;

mod operation {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RESET: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const DATA: u16 = 5;
    pub const CREDIT: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// What a packet says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    from: u64,
    to: u64,
    from_port: u32,
    to_port: u32,
    /// How much data there is.
    pub data_bytes: u32,
    operation: u16,
    flags: u32,
    buffer_bytes: u32,
    taken: u32,
}

/// A stream.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    ours: u64,
    our_port: u32,
    port: u32,
    state: State,
    wanted: u64,
    sent: u64,
    is_last: bool,
    /// Of the other: how much it holds, and how much of ours it has taken.
    room: u32,
    taken: u32,
    received: u64,
    /// What it was told that we have taken.
    told: u64,
    has_ended: bool,
    /// The other wants to hear that there is nothing any more.
    is_gone: bool,
    owes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Begun,
    Calling,
    Open,
    Ending,
    Over,
    Refused,
}

impl Packet {
    /// What is at the beginning of `bytes`; nothing if they are too few.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let (head, _) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let quad = |at: usize| head.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        let long = |at: usize| head.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        let short = |at: usize| head.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes);
        Some(Self {
            from: quad(0)?,
            to: quad(8)?,
            from_port: long(16)?,
            to_port: long(20)?,
            data_bytes: long(24)?,
            operation: short(30)?,
            flags: long(32)?,
            buffer_bytes: long(36)?,
            taken: long(40)?,
        })
    }

    /// Its header.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        let mut head = [0; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = head.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(0, &self.from.to_le_bytes());
        put(8, &self.to.to_le_bytes());
        put(16, &self.from_port.to_le_bytes());
        put(20, &self.to_port.to_le_bytes());
        put(24, &self.data_bytes.to_le_bytes());
        put(28, &STREAM.to_le_bytes());
        put(30, &self.operation.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buffer_bytes.to_le_bytes());
        put(40, &self.taken.to_le_bytes());
        head
    }
}

impl Stream {
    /// A stream from `our_port` of the guest with address `ours` to `port` of the host.
    #[must_use]
    pub const fn new(ours: u64, our_port: u32, port: u32) -> Self {
        Self {
            ours,
            our_port,
            port,
            state: State::Begun,
            wanted: 0,
            sent: 0,
            is_last: false,
            room: 0,
            taken: 0,
            received: 0,
            told: 0,
            has_ended: false,
            is_gone: false,
            owes: false,
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

    /// Whether both have ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// How much has come.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether nothing more comes.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Whether nobody listens there.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.state == State::Refused
    }

    /// Takes in what has come.
    pub fn heard(&mut self, packet: &Packet) {
        if (packet.from, packet.from_port, packet.to_port) != (HOST, self.port, self.our_port) {
            return;
        }
        self.room = packet.buffer_bytes;
        self.taken = packet.taken;
        match packet.operation {
            operation::RESPONSE if self.state == State::Calling => self.state = State::Open,
            operation::RESET => {
                self.has_ended = true;
                self.state = match self.state {
                    State::Open | State::Ending | State::Over => State::Over,
                    State::Begun | State::Calling | State::Refused => State::Refused,
                };
            }
            operation::SHUTDOWN => {
                self.has_ended |= packet.flags & SENDS_NO_MORE != 0;
                self.is_gone |= packet.flags & BOTH_ENDS == BOTH_ENDS;
            }
            operation::DATA => self.received += u64::from(packet.data_bytes),
            operation::CREDIT_REQUEST => self.owes = true,
            _ => {}
        }
    }

    /// What is to be said next, if anything.
    pub fn due(&mut self) -> Option<Packet> {
        match self.state {
            State::Begun => {
                self.state = State::Calling;
                Some(self.packet(operation::REQUEST, 0))
            }
            State::Open | State::Ending if self.is_gone => {
                self.state = State::Over;
                Some(self.packet(operation::RESET, 0))
            }
            State::Open => self.due_of_open(),
            State::Calling | State::Ending | State::Over | State::Refused => None,
        }
    }

    fn due_of_open(&mut self) -> Option<Packet> {
        let on_the_way = low32(self.sent).wrapping_sub(self.taken);
        let room = u64::from(self.room.saturating_sub(on_the_way));
        let left = self.wanted - self.sent;
        let bytes = low32(left.min(room).min(u64::from(DATA_BYTES_MAX)));
        if bytes > 0 {
            self.sent += u64::from(bytes);
            return Some(self.packet(operation::DATA, bytes));
        }
        if self.is_last && left == 0 {
            self.state = State::Ending;
            let packet = self.packet(operation::SHUTDOWN, 0);
            return Some(Packet {
                flags: BOTH_ENDS,
                ..packet
            });
        }
        let untold = self.received - self.told;
        let is_due = self.owes || untold >= u64::from(BUFFER_BYTES / 2);
        is_due.then(|| self.packet(operation::CREDIT, 0))
    }

    fn packet(&mut self, operation: u16, data_bytes: u32) -> Packet {
        self.told = self.received;
        self.owes = false;
        Packet {
            from: self.ours,
            to: HOST,
            from_port: self.our_port,
            to_port: self.port,
            data_bytes,
            operation,
            flags: 0,
            buffer_bytes: BUFFER_BYTES,
            taken: low32(self.received),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn says(stream: &Stream, operation: u16) -> Packet {
        Packet {
            from: HOST,
            to: stream.ours,
            from_port: stream.port,
            to_port: stream.our_port,
            operation,
            buffer_bytes: 100_000,
            ..Packet::default()
        }
    }

    fn open() -> Stream {
        let mut stream = Stream::new(3, 1024, 52);
        assert_eq!(stream.due().unwrap().operation, operation::REQUEST);
        assert_eq!(stream.due(), None);
        stream.heard(&says(&stream, operation::RESPONSE));
        assert!(stream.is_open());
        stream
    }

    #[test]
    fn a_packet_is_read_as_it_was_written() {
        let packet = Packet {
            from: 1 << 33,
            to: 2,
            from_port: 3,
            to_port: 4,
            data_bytes: 5,
            operation: 6,
            flags: 7,
            buffer_bytes: 8,
            taken: 9,
        };
        let header = packet.header();
        assert_eq!(Packet::read(&header), Some(packet));
        assert_eq!(Packet::read(header.get(1..).unwrap()), None);
    }

    #[test]
    fn no_more_is_sent_than_there_is_room_for() {
        let mut stream = open();
        stream.send(1 << 20);
        let sent: u32 = core::iter::from_fn(|| stream.due())
            .map(|packet| packet.data_bytes)
            .sum();
        assert_eq!(sent, 100_000);
        let credit = Packet {
            taken: 60_000,
            ..says(&stream, operation::CREDIT)
        };
        stream.heard(&credit);
        assert_eq!(stream.due().unwrap().data_bytes, 60_000);
        assert_eq!(stream.due(), None);
    }

    #[test]
    fn what_was_taken_is_told_before_the_other_runs_out_of_room() {
        let mut stream = open();
        let data = Packet {
            data_bytes: BUFFER_BYTES / 2,
            ..says(&stream, operation::DATA)
        };
        stream.heard(&data);
        assert_eq!(stream.due().unwrap().taken, BUFFER_BYTES / 2);
        assert_eq!(stream.due(), None);
        stream.heard(&says(&stream, operation::CREDIT_REQUEST));
        assert_eq!(stream.due().unwrap().operation, operation::CREDIT);
    }

    #[test]
    fn both_ends_end_and_a_refusal_is_heard() {
        let mut stream = open();
        stream.end();
        assert_eq!(stream.due().unwrap().flags, BOTH_ENDS);
        stream.heard(&says(&stream, operation::RESET));
        assert!(stream.is_over() && stream.has_ended());

        let mut stream = open();
        let gone = Packet {
            flags: BOTH_ENDS,
            ..says(&stream, operation::SHUTDOWN)
        };
        stream.heard(&gone);
        assert_eq!(stream.due().unwrap().operation, operation::RESET);
        assert!(stream.is_over() && stream.has_ended());

        let mut stream = Stream::new(3, 1024, 52);
        stream.due().unwrap();
        stream.heard(&says(&stream, operation::RESET));
        assert!(stream.is_refused());
    }
}
