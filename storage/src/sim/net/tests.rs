//! What the network promises, seen through the sockets of a simulated reactor.
#![expect(unsafe_code, reason = "segments point into the test's own buffers")]
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::collections::{BTreeSet, VecDeque};
use std::ptr::NonNull;
use std::time::Duration;

use super::*;
use crate::reactor::{
    Event, Family, FileSlot, KernelOp, LowWater, Patience, Reactor, SocketAddress, SocketOp, SocketOption,
    Submit, Token, Wake,
};
use crate::request::Segment;
use crate::sim::medium::Medium;
use crate::sim::reactor::{Faults, SimReactor};

/// What one peer saw, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Bytes(Vec<u8>, Duration),
    Closed,
    Woken(Duration),
}

/// What all peers saw, each in a list of its own.
type Log = Rc<RefCell<Vec<Vec<Seen>>>>;

/// Sends back what it receives.
struct Echo {
    number: usize,
    log: Log,
    begun: Instant,
    owed: VecDeque<u8>,
    closes_after: Option<usize>,
    alarm: Option<Instant>,
}

impl Echo {
    fn see(&self, seen: Seen) {
        self.log.borrow_mut().get_mut(self.number).unwrap().push(seen);
    }
}

impl Peer for Echo {
    fn receive(&mut self, bytes: &[u8], now: Instant) {
        self.see(Seen::Bytes(bytes.to_vec(), now - self.begun));
        self.owed.extend(bytes);
    }

    fn send(&mut self, room_bytes: usize, _now: Instant) -> Vec<u8> {
        let len = room_bytes.min(self.owed.len());
        if let Some(left) = &mut self.closes_after {
            *left = left.saturating_sub(len);
        }
        self.owed.drain(..len).collect()
    }

    fn closed(&mut self) {
        self.see(Seen::Closed);
    }

    fn wants_close(&self) -> bool {
        self.closes_after == Some(0)
    }

    fn alarm(&self) -> Option<Instant> {
        self.alarm
    }

    fn wake(&mut self, now: Instant) {
        self.alarm = None;
        self.see(Seen::Woken(now - self.begun));
    }
}

fn address() -> SocketAddr {
    "192.0.2.1:3260".parse().unwrap()
}

/// A host with one socket in a network with one server.
struct Client {
    io: SimReactor,
    network: Network,
    log: Log,
    ended: Vec<Event>,
    begun: Instant,
}

const SOCKET: FileSlot = FileSlot(0);

impl Client {
    fn new(seed: u64, host: Faults, faults: NetFaults) -> Self {
        Self::with_peers(seed, host, faults, |_| {})
    }

    fn with_peers(seed: u64, host: Faults, faults: NetFaults, shape: impl Fn(&mut Echo) + 'static) -> Self {
        let mut dice = Dice::new(seed);
        let network = Network::new(faults, dice.split());
        let io = SimReactor::new(&Medium::default(), 8, host, dice.split());
        io.join(&network);
        let (log, begun) = (Log::default(), network.clock().now());
        let peers = Rc::clone(&log);
        network.listen(address(), move || {
            let number = peers.borrow().len();
            peers.borrow_mut().push(Vec::new());
            let mut echo = Echo {
                number,
                log: Rc::clone(&peers),
                begun,
                owed: VecDeque::new(),
                closes_after: None,
                alarm: None,
            };
            shape(&mut echo);
            Box::new(echo)
        });
        Self {
            io,
            network,
            log,
            ended: Vec::new(),
            begun,
        }
    }

    fn begin(&mut self, operation: SocketOp, token: Token) {
        let file = SOCKET;
        self.io
            .submit(KernelOp::Socket { file, operation }, token)
            .unwrap();
    }

    /// The result of an operation; `None` if nothing would ever end it, or not within `time`.
    fn result_within(&mut self, token: Token, time: Duration) -> Option<i32> {
        let end = self.io.now() + time;
        loop {
            if let Some(number) = self.ended.iter().position(|event| event.token == token) {
                return Some(self.ended.remove(number).result);
            }
            if self.io.now() >= end {
                return None;
            }
            self.io.set_timer(Some(end));
            let mut wakes = Vec::new();
            self.io.wait(Patience::UntilEvent, &mut wakes).unwrap();
            self.ended.extend(wakes.iter().filter_map(|wake| match wake {
                Wake::Done(event) => Some(*event),
                _ => None,
            }));
        }
    }

    fn run(&mut self, operation: SocketOp) -> i32 {
        self.begin(operation, Token(1));
        self.result_within(Token(1), LONG).unwrap()
    }

    fn connect(&mut self) -> i32 {
        assert_eq!(self.run(SocketOp::Make(Family::V4)), 0);
        let peer = SocketAddress::new(address());
        self.run(SocketOp::Connect {
            peer: &raw const peer,
        })
    }

    /// Sends all of it, however often it takes; how much was taken when an error came, or nothing more went.
    fn send(&mut self, bytes: &[u8]) -> usize {
        let mut sent = 0;
        while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            let segment = segment(rest.as_ptr().cast_mut(), rest.len());
            let send = SocketOp::Send {
                segments: &raw const segment,
                segment_count: 1,
            };
            self.begin(send, Token(3));
            let Some(result) = self.result_within(Token(3), LONG) else {
                // The peer has gone away, and there is no more room.
                assert_eq!(self.run(SocketOp::Cancel { target: Token(3) }), 0);
                assert_eq!(self.result_within(Token(3), LONG), Some(-libc::ECANCELED));
                break;
            };
            match result {
                interrupted if interrupted == -libc::EINTR || interrupted == -libc::EAGAIN => {}
                error if error < 0 => break,
                taken => sent += usize::try_from(taken).unwrap(),
            }
        }
        sent
    }

    fn receive(&mut self, buffer: &mut [u8], time: Duration) -> Option<i32> {
        let segment = segment(buffer.as_mut_ptr(), buffer.len());
        loop {
            let receive = SocketOp::Receive {
                segments: &raw const segment,
                segment_count: 1,
            };
            self.begin(receive, Token(2));
            match self.result_within(Token(2), time) {
                Some(result) if result == -libc::EINTR || result == -libc::EAGAIN => {}
                None => {
                    self.run(SocketOp::Cancel { target: Token(2) });
                    let cancelled = self.result_within(Token(2), time).unwrap();
                    assert!(cancelled == -libc::ECANCELED || cancelled > 0, "{cancelled}");
                    return None;
                }
                ended => return ended,
            }
        }
    }

    /// Receives until the buffer is full or nothing more comes; what it has received, or the first error.
    fn receive_all(&mut self, buffer: &mut [u8], time: Duration) -> Option<i32> {
        let mut received = 0;
        while let Some(rest) = buffer.get_mut(received..).filter(|rest| !rest.is_empty()) {
            match self.receive(rest, time) {
                Some(bytes) if bytes > 0 => received += usize::try_from(bytes).unwrap(),
                ended if received == 0 => return ended,
                _ => break,
            }
        }
        Some(i32::try_from(received).unwrap())
    }

    fn set_low_water(&mut self, bytes: usize) {
        let mark = LowWater::reached_by(bytes);
        assert_eq!(self.run(SocketOp::SetOption(SocketOption::LowWater(mark))), 0);
    }

    fn seen(&self) -> Vec<Vec<Seen>> {
        self.log.borrow().clone()
    }
}

const LONG: Duration = Duration::from_secs(600);

fn segment(address: *mut u8, len: usize) -> Segment {
    // SAFETY: the tests keep their buffers until the operation has ended.
    unsafe { Segment::new(NonNull::new(address).unwrap(), len) }
}

fn received(seen: &[Seen]) -> Vec<u8> {
    let bytes = seen.iter().filter_map(|seen| match seen {
        Seen::Bytes(bytes, _) => Some(bytes.clone()),
        _ => None,
    });
    bytes.flatten().collect()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

fn sick() -> Faults {
    Faults {
        short_one_in: 3,
        interrupted_one_in: 3,
        ..Faults::default()
    }
}

/// Exchanges bytes over several connections, whatever happens; what both ends saw of it.
fn exchange(seed: u64) -> (Vec<Vec<Seen>>, Vec<i32>, Vec<u8>, Duration) {
    let faults = NetFaults::draw(&mut Dice::new(seed));
    let mut client = Client::new(seed, sick(), faults);
    let (mut results, mut bytes) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let connected = client.connect();
        results.push(connected);
        if connected != 0 {
            continue;
        }
        client.run(SocketOp::SetOption(SocketOption::ResetOnClose));
        for _ in 0..4 {
            let sent = client.send(&pattern(100));
            let mut buffer = [0; 100];
            let result = client.receive_all(&mut buffer, Duration::from_secs(30));
            results.extend([i32::try_from(sent).unwrap(), result.unwrap_or(-1000)]);
            bytes.extend(buffer);
        }
    }
    let took = client.io.now() - client.begun;
    (client.seen(), results, bytes, took)
}

#[test]
fn a_seed_makes_the_same_network_again() {
    let runs: BTreeSet<String> = (0..40)
        .map(|seed| {
            let run = exchange(seed);
            assert!(run == exchange(seed), "seed {seed}");
            format!("{run:?}")
        })
        .collect();
    assert_eq!(runs.len(), 40, "seeds differ");
}

#[test]
fn what_is_sent_arrives_whole_and_in_order_where_nothing_is_lost() {
    for seed in 0..40 {
        let faults = NetFaults {
            delay_max: Duration::from_millis(1),
            ..NetFaults::default()
        };
        let mut client = Client::new(seed, sick(), faults);
        assert_eq!(client.connect(), 0);
        for len in [1, 48, 3000, 20_000] {
            let mut buffer = vec![0; len];
            let sent = pattern(len);
            // More than the network holds comes back only if somebody receives meanwhile.
            for (sent, buffer) in sent.chunks(500).zip(buffer.chunks_mut(500)) {
                assert_eq!(client.send(sent), sent.len());
                let result = client.receive_all(buffer, LONG);
                assert_eq!(result, Some(i32::try_from(sent.len()).unwrap()));
            }
            assert!(buffer == sent);
        }
        assert_eq!(client.run(SocketOp::Close), 0);
        client.io.pass(Duration::from_millis(10));
        client.network.advance();
        assert_eq!(client.seen().concat().last(), Some(&Seen::Closed));
        assert_eq!(client.network.open_connections(), 0);
    }
}

#[test]
fn whatever_is_lost_a_peer_sees_the_beginning_of_what_was_sent() {
    let mut losses = 0;
    for seed in 0..200 {
        let faults = NetFaults::draw(&mut Dice::new(seed));
        let mut client = Client::new(seed, sick(), faults);
        for _ in 0..3 {
            if client.connect() != 0 {
                continue;
            }
            let sent = pattern(2000);
            let taken: usize = sent
                .chunks(100)
                .map_while(|part| {
                    let taken = client.send(part);
                    let mut buffer = vec![0; taken];
                    client.receive_all(&mut buffer, Duration::from_secs(1));
                    (taken == part.len()).then_some(taken)
                })
                .sum();
            losses += usize::from(taken < sent.len());
        }
        client.io.pass(LONG);
        client.network.advance();
        for seen in client.seen() {
            let bytes = received(&seen);
            assert!(pattern(3000).starts_with(&bytes), "seed {seed}");
        }
    }
    assert!(losses > 10, "{losses}");
}

#[test]
fn an_old_connection_delivers_after_the_client_has_reset_it_and_has_another() {
    let faults = NetFaults {
        delay_max: Duration::from_millis(1),
        late_one_in: 1,
        late_max: Duration::from_secs(30),
        ..NetFaults::default()
    };
    let late = (0..50).filter(|seed| {
        let mut client = Client::new(*seed, Faults::default(), faults);
        assert_eq!(client.connect(), 0);
        client.run(SocketOp::SetOption(SocketOption::ResetOnClose));
        assert_eq!(client.send(&[1; 500]), 500);
        assert_eq!(client.connect(), 0);
        assert_eq!(client.send(&[2; 500]), 500);
        let mut buffer = [0; 500];
        assert_eq!(client.receive_all(&mut buffer, LONG), Some(500));
        assert_eq!(buffer, [2; 500]);
        let answered = client.io.now() - client.begun;
        client.io.pass(LONG);
        client.network.advance();
        let seen = client.seen();
        let old = seen.first().unwrap();
        assert_eq!(old.last(), Some(&Seen::Closed));
        old.iter()
            .any(|seen| matches!(seen, Seen::Bytes(_, at) if *at > answered))
    });
    let late = late.count();
    assert!((10..50).contains(&late), "{late}");
}

#[test]
fn a_receive_that_waits_minds_the_mark_and_one_that_begins_does_not() {
    for seed in 0..40 {
        let mut client = Client::new(seed, Faults::default(), NetFaults::default());
        assert_eq!(client.connect(), 0);
        client.set_low_water(LowWater::STEP_BYTES);
        let mut buffer = [0; 8];
        let segment = segment(buffer.as_mut_ptr(), buffer.len());
        let receive = SocketOp::Receive {
            segments: &raw const segment,
            segment_count: 1,
        };
        client.begin(receive, Token(2));
        assert_eq!(client.result_within(Token(2), Duration::from_secs(9)), None);
        assert_eq!(client.send(b"ab"), 2);
        let woken = client.result_within(Token(2), LONG);
        // A network that holds less than the mark has no room for more.
        assert!(woken.is_none() || woken == Some(2), "{woken:?}");
        if woken.is_some() {
            continue;
        }
        client.set_low_water(1);
        assert_eq!(client.result_within(Token(2), LONG), Some(2));
        client.set_low_water(LowWater::STEP_BYTES);
        assert_eq!(client.send(b"cd"), 2);
        client.io.pass(LONG);
        assert_eq!(client.receive(&mut [0; 8], LONG), Some(2));
        client.begin(receive, Token(2));
        assert_eq!(client.result_within(Token(2), Duration::from_secs(9)), None);
        assert_eq!(client.send(b"e"), 1);
        client.network.reset(address());
        let end = client.result_within(Token(2), LONG);
        assert!(end == Some(1) || end == Some(-libc::ECONNRESET), "{end:?}");
    }
}

#[test]
fn a_reset_reaches_both_ends() {
    let mut client = Client::new(1, Faults::default(), NetFaults::default());
    assert_eq!(client.connect(), 0);
    client.network.reset(address());
    let mut buffer = [0; 4];
    assert_eq!(client.receive(&mut buffer, LONG), Some(-libc::ECONNRESET));
    assert_eq!(client.receive(&mut buffer, LONG), Some(0));
    assert_eq!(client.send(&[1]), 0);
    assert_eq!(client.seen().concat(), [Seen::Closed]);
}

#[test]
fn a_connect_is_refused_where_nobody_listens_and_ends_where_nobody_answers() {
    let mut client = Client::new(1, Faults::default(), NetFaults::default());
    client.network.unlisten(address());
    assert_eq!(client.connect(), -libc::ECONNREFUSED);
    let faults = NetFaults {
        unanswered_one_in: 1,
        ..NetFaults::default()
    };
    let mut client = Client::new(1, Faults::default(), faults);
    assert_eq!(client.connect(), -libc::ETIMEDOUT);
    assert!(client.io.now() - client.begun > Duration::from_secs(120));
    // It may be cancelled before that.
    assert_eq!(client.run(SocketOp::Make(Family::V4)), 0);
    let peer = SocketAddress::new(address());
    client.begin(
        SocketOp::Connect {
            peer: &raw const peer,
        },
        Token(3),
    );
    assert_eq!(client.result_within(Token(3), Duration::from_secs(5)), None);
    assert_eq!(client.run(SocketOp::Cancel { target: Token(3) }), 0);
    assert_eq!(client.result_within(Token(3), LONG), Some(-libc::ECANCELED));
}

#[test]
fn a_black_hole_keeps_or_loses_what_it_swallows_and_then_ends() {
    let faults = NetFaults {
        hole_one_in: 1,
        hole_max: Duration::from_secs(10),
        ..NetFaults::default()
    };
    let results: BTreeSet<i32> = (0..50)
        .map(|seed| {
            let mut client = Client::new(seed, Faults::default(), faults);
            assert_eq!(client.connect(), 0);
            client.send(&[7]);
            client.receive(&mut [0; 1], LONG).unwrap()
        })
        .collect();
    assert_eq!(results, BTreeSet::from([1, -libc::ECONNRESET]));
}

#[test]
fn a_half_open_connection_says_nothing_for_ever() {
    let faults = NetFaults {
        half_open_one_in: 1,
        ..NetFaults::default()
    };
    let mut client = Client::new(1, Faults::default(), faults);
    assert_eq!(client.connect(), 0);
    assert_eq!(client.send(&[7]), 1);
    assert_eq!(client.receive(&mut [0; 1], LONG), None);
    assert_eq!(client.seen().concat(), [Seen::Closed]);
}

#[test]
fn a_held_server_answers_when_it_goes_on() {
    let mut client = Client::new(1, Faults::default(), NetFaults::default());
    let until = client.io.now() + Duration::from_secs(60);
    assert_eq!(client.connect(), 0);
    client.network.hold(address(), until);
    for _ in 0..2 {
        client.send(&[7]);
        assert_eq!(client.receive_all(&mut [0; 1], Duration::from_secs(9)), None);
        // It connects again, and is held again.
        assert_eq!(client.connect(), 0);
    }
    client.send(&[9]);
    let mut buffer = [0; 1];
    assert_eq!(client.receive_all(&mut buffer, LONG), Some(1));
    assert_eq!(buffer, [9]);
    assert!(client.io.now() >= until);
}

#[test]
fn a_host_that_is_cut_off_leaves_its_peer_without_a_word() {
    let faults = NetFaults {
        delay_max: Duration::from_secs(1),
        ..NetFaults::default()
    };
    let mut client = Client::new(3, Faults::default(), faults);
    assert_eq!(client.connect(), 0);
    assert_eq!(client.send(&[1; 100]), 100);
    client.io.cut_off();
    client.network.clock().pass(LONG);
    client.network.advance();
    let seen = client.seen().concat();
    assert_eq!(received(&seen), [1; 100]);
    assert!(!seen.contains(&Seen::Closed));
}

#[test]
fn a_peer_closes_after_its_last_byte_and_is_woken_at_its_alarm() {
    let mut client = Client::with_peers(1, Faults::default(), NetFaults::default(), |echo| {
        echo.closes_after = Some(3);
        echo.alarm = Some(echo.begun + Duration::from_secs(7));
    });
    assert_eq!(client.connect(), 0);
    let mut buffer = [0; 10];
    assert_eq!(client.receive_all(&mut buffer, Duration::from_secs(20)), None);
    assert_eq!(client.seen().concat(), [Seen::Woken(Duration::from_secs(7))]);
    assert_eq!(client.send(b"abc"), 3);
    assert_eq!(client.receive_all(&mut buffer, LONG), Some(3));
    assert_eq!(client.receive_all(&mut buffer, LONG), Some(0));
    // Nobody is there: the next bytes are answered by a reset.
    assert_eq!(client.send(b"d"), 1);
    client.io.pass(Duration::from_secs(1));
    client.network.advance();
    assert_eq!(client.send(b"e"), 0);
}

#[test]
fn a_wait_without_an_end_is_idle() {
    let mut client = Client::new(1, Faults::default(), NetFaults::default());
    assert_eq!(client.connect(), 0);
    let mut buffer = [0; 1];
    let segment = segment(buffer.as_mut_ptr(), 1);
    client.begin(
        SocketOp::Receive {
            segments: &raw const segment,
            segment_count: 1,
        },
        Token(1),
    );
    client.io.set_timer(None);
    let mut wakes = Vec::new();
    client.io.wait(Patience::UntilEvent, &mut wakes).unwrap();
    assert!(wakes.is_empty() && client.io.is_idle());
    assert_eq!(client.io.in_flight(), 1);
}

#[test]
fn a_host_without_a_network_has_no_sockets() {
    let mut io = SimReactor::new(&Medium::default(), 8, Faults::default(), Dice::new(1));
    let operation = SocketOp::Make(Family::V4);
    io.submit(
        KernelOp::Socket {
            file: SOCKET,
            operation,
        },
        Token(1),
    )
    .unwrap();
    let mut wakes = Vec::new();
    io.wait(Patience::UntilEvent, &mut wakes).unwrap();
    assert!(
        matches!(wakes.as_slice(), [Wake::Done(event)] if event.result == -libc::EAFNOSUPPORT),
        "{wakes:?}"
    );
}
