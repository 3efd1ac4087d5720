//! One TCP connection on a reactor: made, used and given up, with nothing of it left behind.

use std::net::SocketAddr;
use std::os::fd::RawFd;

use crate::reactor::{
    Event, FileSlot, Full, KernelOp, LowWater, SocketAddress, SocketOp, SocketOption, Submit, Token,
};
use crate::request::Segment;

use super::outbox::Outbox;

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
pub(crate) struct Connection<I, L> {
    stage: Stage,
    /// In place for the kernel.
    peer: Box<SocketAddress>,
    inbox: I,
    outbox: Outbox<L>,
    /// How much is received into the buffer at a time.
    receive_bytes_max: usize,
    /// How much comes at least, as its owner knows, from the beginning of the PDU that comes next or has begun to.
    expected_bytes: usize,
    /// How much a receive waits for, as the socket was told.
    mark: LowWater,
    /// What it is being told.
    next_mark: LowWater,
    /// The last receive took all that there was room for: the next does not wait, most likely.
    finds_more: bool,
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
pub(crate) enum Leave {
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
pub(crate) enum Happening {
    /// It is open.
    Connected,
    /// Something was received: see [`Connection::inbox_mut`].
    Received,
    /// A batch was sent: these lenders have their memory back.
    Sent,
    /// It is of no more use, for this errno; 0 is its proper end. To be left.
    Broken(i32),
    /// It was left: nothing of it is in flight.
    Closed,
    /// It was left, and this descriptor goes on with it.
    Taken(RawFd),
}

/// What is received on a connection, until it makes sense.
pub(crate) trait Incoming: Default {
    /// Forgets everything, when nothing is being received.
    fn clear(&mut self);

    /// Where the next receive goes, into a buffer of its own at most `limit_bytes`. Asked when nothing more can be made of what
    /// has come; stays in place until [`Self::received`].
    fn space(&mut self, limit_bytes: usize) -> &[Segment];

    /// How much has come of the message that is coming.
    fn come_bytes(&self) -> usize;

    /// How much of its payload is still to come.
    fn left_bytes(&self) -> usize;

    /// Takes in that so many bytes were received, and returns whether that was all that there was room for.
    fn received(&mut self, bytes: usize) -> bool;
}

/// The place of the socket among the files of its image.
pub(crate) const SOCKET: FileSlot = FileSlot(0);

/// What is received into a buffer at a time while long payloads are awaited, so that little of them is copied.
const HYBRID_BYTES: usize = 16 << 10;

/// Tokens, which are also places in `in_flight`.
const SETUP: usize = 0;
const RECEIVE: usize = 1;
const SEND: usize = 2;
const LEAVE: usize = 3;
const MARK: usize = 4;
const OPERATIONS: usize = 5;
/// The token of an order to cancel another operation is so much above that one's.
const CANCEL: usize = OPERATIONS;

/// What is expected where nothing is certain.
pub(crate) const ANYTHING_BYTES: usize = 1;
/// While long payloads are awaited, a mark that is too low by no more than this is left alone: the beginning of one and its rest
/// wait by the same mark then, and to change it costs nearly what it saves.
const SLACK_BYTES: usize = 2 * LowWater::STEP_BYTES;

impl<I: Incoming, L> Connection<I, L> {
    /// No connection yet.
    pub(crate) fn new(peer: SocketAddr) -> Self {
        Self {
            stage: Stage::Closed,
            peer: Box::new(SocketAddress::new(peer)),
            inbox: I::default(),
            outbox: Outbox::default(),
            receive_bytes_max: usize::MAX,
            expected_bytes: ANYTHING_BYTES,
            mark: LowWater::ANY,
            next_mark: LowWater::ANY,
            finds_more: false,
            in_flight: [Flight::None; 2 * OPERATIONS],
        }
    }

    /// Begins to connect to `peer`; the last connection is closed.
    pub(crate) fn open(&mut self, peer: SocketAddr, io: &mut dyn Submit) {
        assert_eq!(
            self.stage,
            Stage::Closed,
            "one connection ends before the next begins"
        );
        *self.peer = SocketAddress::new(peer);
        self.inbox.clear();
        self.expected_bytes = ANYTHING_BYTES;
        self.mark = LowWater::ANY;
        self.finds_more = false;
        self.stage = Stage::Setup(Setup::Make);
        self.pump(io);
    }

    /// Goes on with a connection that was taken from another reactor: its descriptor is registered as [`SOCKET`].
    pub(crate) fn adopt(&mut self, io: &mut dyn Submit) {
        self.stage = Stage::Open;
        self.pump(io);
    }

    /// Begins to leave the connection. `returned` gets the lenders that had lent memory once it is closed.
    pub(crate) fn leave(&mut self, how: Leave, io: &mut dyn Submit) {
        // What is at its end is not hurried.
        if self.stage != Stage::Closed && !self.in_flight(LEAVE) {
            self.stage = Stage::Leaving(how);
            self.pump(io);
        }
    }

    /// Whether there is a connection that can be used.
    pub(crate) fn is_open(&self) -> bool {
        self.stage == Stage::Open
    }

    /// Whether nothing of a connection is left.
    pub(crate) fn is_closed(&self) -> bool {
        self.stage == Stage::Closed
    }

    /// Says whether long payloads are on their way: then little is received into the buffer, so that most of them is not
    /// copied.
    pub(crate) fn expect_long(&mut self, are_expected: bool) {
        self.receive_bytes_max = if are_expected { HYBRID_BYTES } else { usize::MAX };
    }

    /// Says that at least so many bytes come from the beginning of the next PDU on, so that nobody need be woken before. If
    /// something else may come instead, it is to be taken back soon: see [`Self::is_trusting`].
    pub(crate) fn expect(&mut self, bytes: usize) {
        self.expected_bytes = bytes;
    }

    /// The same, where something may now come that is shorter than what was expected.
    pub(crate) fn expect_at_most(&mut self, bytes: usize) {
        if bytes < self.expected_bytes {
            self.expected_bytes = bytes;
            // The receive may be in flight, and wait.
            self.finds_more = false;
        }
    }

    /// Leaves it at what a receive waits for now.
    pub(crate) fn expect_as_before(&mut self) {
        self.expected_bytes = self.mark.bytes();
    }

    /// Whether something that was not expected might wait unseen: a receive waits for more than the rest of a payload, which
    /// comes whatever else does.
    pub(crate) fn is_trusting(&self) -> bool {
        self.expected_bytes > ANYTHING_BYTES && self.mark > LowWater::reached_by(self.inbox.left_bytes())
    }

    /// The outgoing half, whose content is sent with all else of this round.
    pub(crate) fn outbox(&mut self) -> &mut Outbox<L> {
        &mut self.outbox
    }

    /// How many batches have begun to be sent, each when the last one was sent whole.
    pub(crate) fn departures(&self) -> u64 {
        self.outbox.departures()
    }

    /// The incoming half.
    pub(crate) fn inbox(&self) -> &I {
        &self.inbox
    }

    /// The same, to take from it.
    pub(crate) fn inbox_mut(&mut self) -> &mut I {
        &mut self.inbox
    }

    /// Puts in flight what the connection needs next and has not; to be called before each wait. A reactor without
    /// room is asked again next time.
    pub(crate) fn pump(&mut self, io: &mut dyn Submit) {
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
                self.pump_mark(io)?;
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

    /// Tells the socket how much a receive is to wait for, if that has changed; one that waits already hears of it.
    fn pump_mark(&mut self, io: &mut dyn Submit) -> Result<(), Full> {
        if self.in_flight(MARK) {
            return Ok(());
        }
        let wanted = self.wanted_mark();
        if wanted != self.mark {
            self.submit(MARK, SocketOp::SetOption(SocketOption::LowWater(wanted)), io)?;
            self.next_mark = wanted;
        }
        Ok(())
    }

    /// As much as is certain to come. It is raised before the next payload only, as the rest of one is there with its
    /// beginning. And a receive that may be followed at once does not wait by the mark: it stays for the next that does.
    fn wanted_mark(&self) -> LowWater {
        let left_bytes = self.inbox.left_bytes();
        let expected_bytes = self.expected_bytes.saturating_sub(self.inbox.come_bytes());
        let highest = LowWater::reached_by(left_bytes.max(expected_bytes));
        if self.expected_bytes <= ANYTHING_BYTES {
            return self.mark.min(highest);
        }
        let slack_bytes = match self.receive_bytes_max {
            HYBRID_BYTES => SLACK_BYTES,
            _ => 0,
        };
        let is_low = left_bytes == 0 && self.mark.bytes() + slack_bytes < highest.bytes();
        let is_high = self.mark > highest && !self.finds_more;
        if is_low || is_high { highest } else { self.mark }
    }

    fn pump_receive(&mut self, io: &mut dyn Submit) -> Result<(), Full> {
        if self.in_flight(RECEIVE) {
            return Ok(());
        }
        let space = self.inbox.space(self.receive_bytes_max);
        let operation = SocketOp::Receive {
            segments: space.as_ptr(),
            segment_count: count(space.len()),
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

    /// Takes the end of an operation in. `returned` gets the lenders whose memory was lent and is not needed any more.
    pub(crate) fn resume(
        &mut self,
        event: Event,
        returned: &mut Vec<L>,
        io: &mut dyn Submit,
    ) -> Option<Happening> {
        let number = usize::try_from(event.token.0).expect("this is a 64-bit monitor");
        self.set(number, Flight::None);
        if number == MARK && event.result == 0 {
            self.mark = self.next_mark;
        }
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
            (Stage::Open, MARK) => None,
            (Stage::Open, _) => {
                self.finds_more = self.inbox.received(usize::try_from(event.result).unwrap_or(0));
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

    fn left(&mut self, how: Leave, result: i32, returned: &mut Vec<L>) -> Happening {
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
