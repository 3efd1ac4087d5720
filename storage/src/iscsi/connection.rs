//! One TCP connection on a reactor: made, used and given up, with nothing of it left behind.

use std::net::SocketAddr;
use std::os::fd::RawFd;

use crate::reactor::{Event, FileSlot, Full, KernelOp, SocketAddress, SocketOp, SocketOption, Submit, Token};
use crate::remote::outbox::Outbox;

use crate::request::Segment;
use crate::segments;

use super::digest::{Digest, header_digest};
use super::inbox::{HYBRID_BYTES, Inbox, Item, StreamError};
use super::pdu::{Bhs, Tag, padding_bytes};
use super::session::Digests;

/// A connection and its two halves.
///
/// ```text
///            open                             connected
///   Closed ────────► Make ► options ► Connect ──────────► Open ──┐
///      ▲                │ refused                                │ broken, or nobody wants it any more
///      └── Close ◄── what is in flight is cancelled and ends ◄───┴── close, take
/// ```
///
/// At most one receive and one send are in flight. The next connection begins when the last has nothing in flight
/// and is closed, so an event never needs to be told from that of an older one.
#[derive(Debug)]
pub(super) struct Connection {
    stage: Stage,
    /// In place for the kernel.
    peer: Box<SocketAddress>,
    inbox: Inbox,
    outbox: Outbox<Tag>,
    digests: Digests,
    /// How much is received into the buffer at a time.
    receive_bytes_max: usize,
    /// What is in flight, by its token, and whether it was asked to end early.
    in_flight: [Flight; 2 * OPERATIONS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Closed,
    Setup(Setup),
    Open,
    Leaving(Leave),
}

/// The way to an open connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setup {
    Make,
    NoDelay,
    ResetOnClose,
    Connect,
}

/// How a connection is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leave {
    /// It is reset, and what was not sent is not.
    Close,
    /// The process gets a descriptor of it, by which another reactor goes on. Nothing is being sent.
    Take,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Flight {
    #[default]
    None,
    Going,
    Cancelled,
}

/// What has become of a connection.
#[derive(Debug)]
pub(super) enum Happening {
    /// It is open.
    Connected,
    /// Something was received: see [`Connection::next`].
    Received,
    /// A batch was sent: these tasks have their memory back.
    Sent,
    /// It is of no more use, for this errno; 0 is its proper end. To be left.
    Broken(i32),
    /// It was left: nothing of it is in flight.
    Closed,
    /// It was left, and this descriptor goes on with it.
    Taken(RawFd),
}

/// The data segment of a PDU.
#[derive(Clone, Copy, Debug)]
pub(super) enum Payload<'a> {
    /// Bytes of our own, copied now.
    Own(&'a [u8]),
    /// Memory of a request, copied now: it is short, or what is sent has a digest and must not change any more.
    Copied(&'a [Segment]),
    /// Memory of the request of this task, which stays in place until the payload was sent.
    Lent(&'a [Segment], Tag),
}

impl Payload<'_> {
    /// No data segment.
    pub(super) const NONE: Self = Self::Own(&[]);
}

/// The place of the socket among the files of its image.
pub(super) const SOCKET: FileSlot = FileSlot(0);

/// Tokens, which are also places in `in_flight`.
const SETUP: usize = 0;
const RECEIVE: usize = 1;
const SEND: usize = 2;
const LEAVE: usize = 3;
const OPERATIONS: usize = 4;
/// The token of an order to cancel another operation is so much above that one's.
const CANCEL: usize = OPERATIONS;

impl Connection {
    /// No connection yet.
    pub(super) fn new(peer: SocketAddr) -> Self {
        Self {
            stage: Stage::Closed,
            peer: Box::new(SocketAddress::new(peer)),
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            digests: Digests::default(),
            receive_bytes_max: usize::MAX,
            in_flight: [Flight::None; 2 * OPERATIONS],
        }
    }

    /// Begins to connect to `peer`; the last connection is closed.
    pub(super) fn open(&mut self, peer: SocketAddr, io: &mut dyn Submit) {
        assert_eq!(
            self.stage,
            Stage::Closed,
            "one connection ends before the next begins"
        );
        *self.peer = SocketAddress::new(peer);
        self.digests = Digests::default();
        self.inbox.clear();
        self.stage = Stage::Setup(Setup::Make);
        self.pump(io);
    }

    /// Goes on with a connection that was taken from another reactor: its descriptor is registered as [`SOCKET`].
    pub(super) fn adopt(&mut self, io: &mut dyn Submit) {
        self.stage = Stage::Open;
        self.pump(io);
    }

    /// Begins to leave the connection. `returned` gets the tasks that had lent memory once it is closed.
    pub(super) fn leave(&mut self, how: Leave, io: &mut dyn Submit) {
        // What is at its end is not hurried.
        if self.stage != Stage::Closed && !self.in_flight(LEAVE) {
            self.stage = Stage::Leaving(how);
            self.pump(io);
        }
    }

    /// Whether there is a connection that can be used.
    pub(super) fn is_open(&self) -> bool {
        self.stage == Stage::Open
    }

    /// Whether nothing of a connection is left.
    pub(super) fn is_closed(&self) -> bool {
        self.stage == Stage::Closed
    }

    /// What protects the PDUs from now on.
    pub(super) fn set_digests(&mut self, digests: Digests) {
        self.digests = digests;
    }

    /// What protects the PDUs.
    pub(super) fn digests(&self) -> Digests {
        self.digests
    }

    /// Says whether long payloads are on their way: then little is received into the buffer, so that most of them is not
    /// copied.
    pub(super) fn expect_long(&mut self, are_expected: bool) {
        self.receive_bytes_max = if are_expected { HYBRID_BYTES } else { usize::MAX };
    }

    /// Queues a PDU, to be sent with the others of this round.
    pub(super) fn send(&mut self, header: &Bhs, payload: Payload<'_>) {
        self.outbox.write(&header.0);
        if self.digests.header {
            self.outbox.write(&header_digest(header, &[]));
        }
        let mut digest = Digest::default();
        let mut add = |data: &[u8]| {
            if self.digests.data {
                digest.add(data);
            }
            data.len()
        };
        let len = match payload {
            Payload::Own(bytes) => {
                self.outbox.write(bytes);
                add(bytes)
            }
            Payload::Copied(pieces) => add(self.outbox.gather(pieces)),
            Payload::Lent(pieces, task) => {
                assert!(!self.digests.data, "what has a digest is copied");
                self.outbox.lend(pieces, task);
                usize::try_from(segments::total(pieces)).expect("this is a 64-bit monitor")
            }
        };
        let padding = [0; 3];
        let padding = padding.get(..padding_bytes(len)).unwrap_or_default();
        add(padding);
        self.outbox.write(padding);
        if self.digests.data && len > 0 {
            self.outbox.write(&digest.finish());
        }
    }

    /// How many batches of PDUs have begun to be sent, each when the last one was sent whole.
    pub(super) fn departures(&self) -> u64 {
        self.outbox.departures()
    }

    /// The next thing that has come whole.
    ///
    /// # Errors
    ///
    /// When the stream makes no sense any more; the connection is to be left.
    pub(super) fn next(&mut self) -> Result<Option<Item>, StreamError> {
        self.inbox.next(self.digests)
    }

    /// The incoming half, to give a payload its place.
    pub(super) fn inbox(&mut self) -> &mut Inbox {
        &mut self.inbox
    }

    /// Puts in flight what the connection needs next and has not; to be called before each wait. A reactor without
    /// room is asked again next time.
    pub(super) fn pump(&mut self, io: &mut dyn Submit) {
        // Nothing is lost by a full reactor: whatever could not be submitted is found missing again.
        let _later = self.try_pump(io);
    }

    fn try_pump(&mut self, io: &mut dyn Submit) -> Result<(), Full> {
        match self.stage {
            Stage::Closed => Ok(()),
            Stage::Setup(setup) => {
                let operation = match setup {
                    Setup::Make => SocketOp::Make(self.peer.family()),
                    Setup::NoDelay => SocketOp::SetOption(SocketOption::NoDelay),
                    Setup::ResetOnClose => SocketOp::SetOption(SocketOption::ResetOnClose),
                    Setup::Connect => SocketOp::Connect {
                        peer: &raw const *self.peer,
                    },
                };
                self.submit(SETUP, operation, io)
            }
            Stage::Open => {
                self.pump_send(io)?;
                self.pump_receive(io)
            }
            Stage::Leaving(how) => self.pump_leave(how, io),
        }
    }

    fn pump_send(&mut self, io: &mut dyn Submit) -> Result<(), Full> {
        if self.outbox.may_depart() {
            self.outbox.depart();
        }
        if !self.outbox.is_sending() {
            return Ok(());
        }
        let unsent = self.outbox.unsent();
        let operation = SocketOp::Send {
            segments: unsent.as_ptr(),
            segment_count: count(unsent.len()),
        };
        self.submit(SEND, operation, io)
    }

    fn pump_receive(&mut self, io: &mut dyn Submit) -> Result<(), Full> {
        if self.in_flight(RECEIVE) {
            return Ok(());
        }
        let (space, wanted) = self.inbox.space(self.receive_bytes_max, self.digests);
        let operation = SocketOp::Receive {
            segments: space.as_ptr(),
            segment_count: count(space.len()),
            wanted,
        };
        self.submit(RECEIVE, operation, io)
    }

    fn pump_leave(&mut self, how: Leave, io: &mut dyn Submit) -> Result<(), Full> {
        for number in [SETUP, RECEIVE, SEND] {
            if self.in_flight.get(number) == Some(&Flight::Going) {
                let target = Token(number as u64);
                let operation = SocketOp::Cancel { target };
                let op = KernelOp::Socket {
                    file: SOCKET,
                    operation,
                };
                io.submit(op, Token((number + CANCEL) as u64))?;
                self.set(number, Flight::Cancelled);
                self.set(number + CANCEL, Flight::Going);
            }
        }
        // An order to cancel may end after what it was to cancel.
        if self.in_flight.iter().any(|flight| *flight != Flight::None) {
            return Ok(());
        }
        let operation = match how {
            Leave::Close => SocketOp::Close,
            Leave::Take => SocketOp::Take,
        };
        self.submit(LEAVE, operation, io)
    }

    fn submit(&mut self, number: usize, operation: SocketOp, io: &mut dyn Submit) -> Result<(), Full> {
        if !self.in_flight(number) {
            io.submit(
                KernelOp::Socket {
                    file: SOCKET,
                    operation,
                },
                Token(number as u64),
            )?;
            self.set(number, Flight::Going);
        }
        Ok(())
    }

    fn in_flight(&self, number: usize) -> bool {
        self.in_flight
            .get(number)
            .is_some_and(|flight| *flight != Flight::None)
    }

    fn set(&mut self, number: usize, flight: Flight) {
        if let Some(place) = self.in_flight.get_mut(number) {
            *place = flight;
        }
    }

    /// Takes the end of an operation in. `returned` gets the tasks whose memory was lent and is not needed any more.
    pub(super) fn resume(
        &mut self,
        event: Event,
        returned: &mut Vec<Tag>,
        io: &mut dyn Submit,
    ) -> Option<Happening> {
        let number = usize::try_from(event.token.0).expect("this is a 64-bit monitor");
        self.set(number, Flight::None);
        if number >= CANCEL {
            // What was to be cancelled says itself how it ended.
            self.pump(io);
            return None;
        }
        let happening = match (self.stage, number) {
            (Stage::Leaving(how), LEAVE) => Some(self.left(how, event.result, returned)),
            (Stage::Leaving(_), RECEIVE) => {
                // What came before the cancellation is not lost: the connection may go on elsewhere.
                self.inbox.received(usize::try_from(event.result).unwrap_or(0));
                None
            }
            (Stage::Leaving(_), SEND) => {
                self.outbox
                    .sent(usize::try_from(event.result).unwrap_or(0), returned);
                None
            }
            (Stage::Leaving(_) | Stage::Closed, _) => None,
            (_, _) if event.result == -libc::EINTR || event.result == -libc::EAGAIN => None,
            (_, RECEIVE) if event.result == 0 => Some(Happening::Broken(0)),
            _ if event.result < 0 => Some(Happening::Broken(-event.result)),
            (Stage::Setup(setup), _) => self.set_up(setup),
            (Stage::Open, SEND) => {
                self.outbox
                    .sent(usize::try_from(event.result).unwrap_or(0), returned);
                Some(Happening::Sent)
            }
            (Stage::Open, _) => {
                self.inbox.received(usize::try_from(event.result).unwrap_or(0));
                // The owner pumps, once it has taken what has come.
                return Some(Happening::Received);
            }
        };
        self.pump(io);
        happening
    }

    fn set_up(&mut self, setup: Setup) -> Option<Happening> {
        self.stage = match setup {
            Setup::Make => Stage::Setup(Setup::NoDelay),
            Setup::NoDelay => Stage::Setup(Setup::ResetOnClose),
            Setup::ResetOnClose => Stage::Setup(Setup::Connect),
            Setup::Connect => {
                self.stage = Stage::Open;
                return Some(Happening::Connected);
            }
        };
        None
    }

    fn left(&mut self, how: Leave, result: i32, returned: &mut Vec<Tag>) -> Happening {
        if how == Leave::Take && result >= 0 {
            self.stage = Stage::Closed;
            return Happening::Taken(result);
        }
        if how == Leave::Take {
            // A reactor that cannot give it away: the connection ends here.
            self.stage = Stage::Leaving(Leave::Close);
            return Happening::Broken(-result);
        }
        self.outbox.clear(returned);
        self.inbox.clear();
        self.stage = Stage::Closed;
        Happening::Closed
    }
}

fn count(len: usize) -> u32 {
    u32::try_from(len).expect("IOV_MAX is small")
}
