//! Operations on sockets, over loopback TCP.
#![expect(unsafe_code, reason = "segments point into the test's own buffers")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use coracle_storage::engine::Engine;
use coracle_storage::reactor::{
    Event, Family, FileSlot, KernelOp, LowWater, NO_FILE, Patience, Reactor, SocketAddress, SocketOp,
    SocketOption, Token, Wake,
};
use coracle_storage::request::Segment;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SOCKET: FileSlot = FileSlot(2);

/// A reactor whose operations are on one socket, and what ended there.
struct Client {
    io: Box<dyn Reactor>,
    ended: Vec<Event>,
}

impl Client {
    fn new(engine: Engine) -> Self {
        Self {
            io: super::reactor(engine),
            ended: Vec::new(),
        }
    }

    /// A client with a connection, and its other end.
    fn connected(engine: Engine) -> (Self, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = Self::new(engine);
        assert_eq!(client.run(SocketOp::Make(Family::V4)), 0);
        assert_eq!(client.connect(listener.local_addr().unwrap()), 0);
        let (peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(LIMIT)).unwrap();
        (client, peer)
    }

    fn begin(&mut self, operation: SocketOp, token: Token) {
        let op = KernelOp::Socket {
            file: SOCKET,
            operation,
        };
        self.io.submit(op, token).unwrap();
    }

    /// The wake-ups that are no ends of operations, of one wait.
    fn wait(&mut self, patience: Patience) -> Vec<Wake> {
        let mut wakes = Vec::new();
        self.io.wait(patience, &mut wakes).unwrap();
        let ended = |wake: &Wake| match wake {
            Wake::Done(event) => Some(*event),
            _ => None,
        };
        self.ended.extend(wakes.iter().filter_map(ended));
        wakes.retain(|wake| ended(wake).is_none());
        wakes
    }

    /// The result of an operation that must not wait for ever.
    fn result(&mut self, token: Token) -> i32 {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(number) = self.ended.iter().position(|event| event.token == token) {
                return self.ended.remove(number).result;
            }
            assert!(Instant::now() < end, "{token:?} does not end");
            self.io.set_timer(Some(end));
            self.wait(Patience::UntilEvent);
            self.io.set_timer(None);
        }
    }

    /// That an operation goes on waiting.
    fn assert_waits(&mut self, token: Token) {
        let end = Instant::now() + Duration::from_millis(30);
        while Instant::now() < end {
            self.io.set_timer(Some(end));
            self.wait(Patience::UntilEvent);
        }
        assert!(
            self.ended.iter().all(|event| event.token != token),
            "{token:?} ended"
        );
    }

    fn run(&mut self, operation: SocketOp) -> i32 {
        self.begin(operation, Token(1000));
        self.result(Token(1000))
    }

    fn connect(&mut self, address: SocketAddr) -> i32 {
        let peer = SocketAddress::new(address);
        self.run(SocketOp::Connect {
            peer: &raw const peer,
        })
    }

    fn send(&mut self, segments: &[Segment]) -> i32 {
        self.run(sending(segments))
    }

    fn receive(&mut self, segments: &[Segment]) -> i32 {
        self.run(receiving(segments))
    }

    /// Receives so many bytes, in as many pieces as it takes.
    fn receive_all(&mut self, segments: &[Segment], bytes: usize) -> usize {
        let mut received = 0;
        while received < bytes {
            let more = usize::try_from(self.receive(segments)).unwrap();
            assert!(more > 0, "{received} of {bytes}");
            received += more;
        }
        received
    }

    fn set_low_water(&mut self, bytes: usize) {
        let mark = LowWater::reached_by(bytes);
        assert_eq!(self.run(SocketOp::SetOption(SocketOption::LowWater(mark))), 0);
    }
}

/// Nothing here takes that long.
const LIMIT: Duration = Duration::from_secs(20);

fn segments(buffers: &mut [Vec<u8>]) -> Vec<Segment> {
    buffers
        .iter_mut()
        // SAFETY: the tests keep their buffers until the operations have ended, or the reactor is gone.
        .map(|buffer| unsafe { Segment::new(NonNull::new(buffer.as_mut_ptr()).unwrap(), buffer.len()) })
        .collect()
}

fn sending(segments: &[Segment]) -> SocketOp {
    SocketOp::Send {
        segments: segments.as_ptr(),
        segment_count: segments.len().try_into().unwrap(),
    }
}

fn receiving(segments: &[Segment]) -> SocketOp {
    SocketOp::Receive {
        segments: segments.as_ptr(),
        segment_count: segments.len().try_into().unwrap(),
    }
}

/// Drops the first `bytes` of the segments.
fn advance(left: &mut Vec<Segment>, mut bytes: usize) {
    while let Some(first) = left.first_mut() {
        let part = bytes.min(first.len_bytes());
        first.advance(part);
        bytes -= part;
        if first.len_bytes() > 0 {
            return;
        }
        left.remove(0);
    }
}

/// A listener that accepts nobody any more: a connection to it is never answered.
struct Silent {
    address: SocketAddr,
    _listener: OwnedFd,
    _queued: Vec<TcpStream>,
}

impl Silent {
    fn new() -> Self {
        use rustix::net::{AddressFamily, SocketAddrV4, SocketType, bind, getsockname, listen, socket};
        let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&listener, &SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        listen(&listener, 0).unwrap();
        let address = SocketAddr::try_from(getsockname(&listener).unwrap()).unwrap();
        let mut queued = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
            queued.push(stream);
        }
        Self {
            address,
            _listener: listener,
            _queued: queued,
        }
    }
}

pub(super) fn segments_are_sent_and_received_in_order(engine: Engine) {
    let (mut client, mut peer) = Client::connected(engine);
    let mut sent = [vec![1; 10], vec![2; 1000], vec![3; 1]];
    assert_eq!(client.send(&segments(&mut sent)), 1011);
    let mut at_peer = vec![0; 1011];
    peer.read_exact(&mut at_peer).unwrap();
    assert_eq!(at_peer, sent.concat());
    let mut one = [vec![7; 5]];
    assert_eq!(client.send(&segments(&mut one)), 5);
    peer.read_exact(at_peer.get_mut(..5).unwrap()).unwrap();
    assert_eq!(at_peer.get(..5).unwrap(), [7; 5]);
    peer.write_all(b"hello world").unwrap();
    let mut received = [vec![0; 5], vec![0; 6]];
    assert_eq!(client.receive(&segments(&mut received)), 11);
    assert_eq!(received.concat(), b"hello world");
}

pub(super) fn several_messages_go_out_with_one_wait(engine: Engine) {
    let mut peers = Vec::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut io = super::reactor(engine);
    let address = SocketAddress::new(listener.local_addr().unwrap());
    let mut wakes = Vec::new();
    for round in 0..2_u8 {
        for number in 0..4 {
            let made = SocketOp::Make(Family::V4);
            let connected = SocketOp::Connect {
                peer: &raw const address,
            };
            for operation in [made, connected] {
                let file = FileSlot(number);
                io.submit(KernelOp::Socket { file, operation }, Token(1)).unwrap();
                wakes.clear();
                io.wait(Patience::UntilEvent, &mut wakes).unwrap();
                assert!(
                    matches!(wakes.as_slice(), [Wake::Done(event)] if event.result == 0),
                    "{wakes:?}"
                );
            }
            peers.push(listener.accept().unwrap().0);
        }
        let mut buffers: Vec<[Vec<u8>; 2]> = (0..4)
            .map(|number| [vec![round; 100], vec![number; 100]])
            .collect();
        let lists: Vec<_> = buffers.iter_mut().map(|buffers| segments(buffers)).collect();
        for (number, list) in (0..).zip(&lists) {
            let (file, operation) = (FileSlot(number), sending(list));
            io.submit(KernelOp::Socket { file, operation }, Token(1)).unwrap();
        }
        wakes.clear();
        while wakes.len() < 4 {
            io.wait(Patience::UntilEvent, &mut wakes).unwrap();
        }
        for (peer, sent) in peers.drain(..).zip(&buffers) {
            let (mut peer, mut at_peer) = (peer, vec![0xff; 200]);
            peer.read_exact(&mut at_peer).unwrap();
            assert_eq!(at_peer, sent.concat());
        }
    }
}

pub(super) fn a_send_into_full_buffers_is_short_or_waits_and_nothing_is_lost(engine: Engine) {
    const BYTES: usize = 16 << 20;
    let (mut client, mut peer) = Client::connected(engine);
    let mut sent = [(0..=250).cycle().take(BYTES / 2).collect(), vec![9; BYTES / 2]];
    let mut left = segments(&mut sent);
    let mut total = usize::try_from(client.send(&left)).unwrap();
    assert!(0 < total && total < BYTES, "{total}");
    advance(&mut left, total);
    // The buffers are full: what is sent now may be taken in part, or waits for the peer to read.
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        let mut at_peer = vec![0; BYTES];
        peer.read_exact(&mut at_peer).unwrap();
        at_peer
    });
    while total < BYTES {
        let taken = usize::try_from(client.send(&left)).unwrap();
        assert!(taken > 0);
        total += taken;
        advance(&mut left, taken);
    }
    assert!(reader.join().unwrap() == sent.concat());
}

pub(super) fn a_receive_ends_with_the_first_bytes_that_come_or_are_there(engine: Engine) {
    let (mut client, mut peer) = Client::connected(engine);
    let mut buffers = [vec![0; 4], vec![0; 4]];
    let list = segments(&mut buffers);
    peer.write_all(b"abc").unwrap();
    assert_eq!(client.receive(&list), 3);
    assert_eq!(buffers.concat(), b"abc\0\0\0\0\0");
    client.begin(receiving(&list), Token(1));
    client.assert_waits(Token(1));
    peer.write_all(b"123456").unwrap();
    assert_eq!(client.result(Token(1)), 6);
    assert_eq!(buffers.concat(), b"123456\0\0");
    // One segment, which is another operation of a ring.
    let one = list.get(..1).unwrap();
    client.begin(receiving(one), Token(1));
    client.assert_waits(Token(1));
    peer.write_all(b"789").unwrap();
    assert_eq!(client.result(Token(1)), 3);
    assert_eq!(buffers.first().unwrap(), b"7894");
}

pub(super) fn a_receive_that_waits_does_so_until_the_mark_is_reached(engine: Engine) {
    const BYTES: usize = 3 * LowWater::STEP_BYTES;
    let (mut client, mut peer) = Client::connected(engine);
    let mut buffers = [vec![0; BYTES / 2], vec![0; BYTES]];
    let list = segments(&mut buffers);
    for list in [list.as_slice(), list.get(1..).unwrap()] {
        client.set_low_water(BYTES);
        client.begin(receiving(list), Token(1));
        client.assert_waits(Token(1));
        for _ in 0..2 {
            peer.write_all(&[7; LowWater::STEP_BYTES]).unwrap();
            client.assert_waits(Token(1));
        }
        peer.write_all(&[7; LowWater::STEP_BYTES + 10]).unwrap();
        let received = usize::try_from(client.result(Token(1))).unwrap();
        assert!(received >= BYTES, "{received}");
        // What is there is received without a wait, as little as it may be.
        peer.write_all(&[7; 10]).unwrap();
        let there = BYTES + 20 - received;
        assert_eq!(client.receive_all(list, there), there);
        client.set_low_water(1);
        client.begin(receiving(list), Token(1));
        client.assert_waits(Token(1));
        peer.write_all(&[7; 1]).unwrap();
        assert_eq!(client.result(Token(1)), 1);
    }
    assert!(buffers.concat().iter().all(|byte| *byte == 7));
}

pub(super) fn a_mark_that_is_changed_holds_for_what_waits_already(engine: Engine) {
    let (mut client, mut peer) = Client::connected(engine);
    let mut buffers = [vec![0; 4], vec![0; 4]];
    let list = segments(&mut buffers);
    client.begin(receiving(&list), Token(1));
    client.assert_waits(Token(1));
    client.set_low_water(LowWater::STEP_BYTES);
    peer.write_all(b"abc").unwrap();
    client.assert_waits(Token(1));
    client.set_low_water(1);
    assert_eq!(client.result(Token(1)), 3);
}

pub(super) fn the_end_of_the_stream_ends_a_receive(engine: Engine) {
    let (mut client, mut peer) = Client::connected(engine);
    let mut buffers = [vec![0; 4], vec![0; 4]];
    let list = segments(&mut buffers);
    client.set_low_water(LowWater::STEP_BYTES);
    client.begin(receiving(&list), Token(1));
    client.assert_waits(Token(1));
    peer.write_all(b"abc").unwrap();
    client.assert_waits(Token(1));
    drop(peer);
    assert_eq!(client.result(Token(1)), 3);
    assert_eq!(client.receive(&list), 0);
    client.set_low_water(1);
    assert_eq!(client.receive(&list), 0);
}

pub(super) fn a_waiting_receive_is_cancelled(engine: Engine) {
    let (mut client, mut peer) = Client::connected(engine);
    let mut buffers = [vec![0; 4], vec![0; 4]];
    let list = segments(&mut buffers);
    for list in [list.as_slice(), list.get(..1).unwrap()] {
        client.begin(receiving(list), Token(1));
        client.assert_waits(Token(1));
        assert_eq!(client.run(SocketOp::Cancel { target: Token(1) }), 0);
        assert_eq!(client.result(Token(1)), -libc::ECANCELED);
    }
    assert_eq!(client.run(SocketOp::Cancel { target: Token(1) }), -libc::ENOENT);
    // What had arrived is not lost: the connection is as good as before.
    client.set_low_water(LowWater::STEP_BYTES);
    client.begin(receiving(&list), Token(1));
    client.assert_waits(Token(1));
    peer.write_all(b"abc").unwrap();
    client.assert_waits(Token(1));
    assert_eq!(client.run(SocketOp::Cancel { target: Token(1) }), 0);
    assert_eq!(client.result(Token(1)), -libc::ECANCELED);
    peer.write_all(b"defgh").unwrap();
    assert_eq!(client.receive(&list), 8);
    assert_eq!(buffers.concat(), b"abcdefgh");
}

pub(super) fn a_cancel_finds_what_was_submitted_just_before_it(engine: Engine) {
    let (mut client, _peer) = Client::connected(engine);
    let mut buffers = [vec![0; 4]];
    let list = segments(&mut buffers);
    client.begin(receiving(&list), Token(1));
    client.begin(SocketOp::Cancel { target: Token(1) }, Token(2));
    assert_eq!(client.result(Token(2)), 0);
    assert_eq!(client.result(Token(1)), -libc::ECANCELED);
}

pub(super) fn a_waiting_send_is_cancelled(engine: Engine) {
    let (mut client, _peer) = Client::connected(engine);
    let mut buffers = [vec![0; 8 << 20]];
    let list = segments(&mut buffers);
    // The kernel makes its buffers longer for a while.
    loop {
        client.begin(sending(&list), Token(1));
        let end = Instant::now() + Duration::from_millis(200);
        client.io.set_timer(Some(end));
        while client.ended.is_empty() && Instant::now() < end {
            client.wait(Patience::UntilEvent);
        }
        if client.ended.is_empty() {
            break;
        }
        assert!(client.result(Token(1)) > 0);
    }
    assert_eq!(client.run(SocketOp::Cancel { target: Token(1) }), 0);
    assert_eq!(client.result(Token(1)), -libc::ECANCELED);
}

pub(super) fn a_waiting_connect_is_cancelled_and_its_place_serves_another(engine: Engine) {
    let silent = Silent::new();
    let mut client = Client::new(engine);
    assert_eq!(client.run(SocketOp::Make(Family::V4)), 0);
    let peer = SocketAddress::new(silent.address);
    client.begin(
        SocketOp::Connect {
            peer: &raw const peer,
        },
        Token(1),
    );
    client.assert_waits(Token(1));
    assert_eq!(client.run(SocketOp::Cancel { target: Token(1) }), 0);
    assert_eq!(client.result(Token(1)), -libc::ECANCELED);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(client.run(SocketOp::Make(Family::V4)), 0);
    assert_eq!(client.connect(listener.local_addr().unwrap()), 0);
}

pub(super) fn a_refused_connect_says_so(engine: Engine) {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut client = Client::new(engine);
    assert_eq!(client.run(SocketOp::Make(Family::V4)), 0);
    assert_eq!(client.connect(free), -libc::ECONNREFUSED);
}

pub(super) fn a_socket_of_the_newer_family_connects_too(engine: Engine) {
    let listener = match TcpListener::bind("[::1]:0") {
        Ok(listener) => listener,
        // A host without IPv6 has no such socket either.
        Err(_) => {
            assert_eq!(
                Client::new(engine).run(SocketOp::Make(Family::V6)),
                -libc::EAFNOSUPPORT
            );
            return;
        }
    };
    let mut client = Client::new(engine);
    assert_eq!(client.run(SocketOp::Make(Family::V6)), 0);
    assert_eq!(client.connect(listener.local_addr().unwrap()), 0);
    let (mut peer, _) = listener.accept().unwrap();
    assert_eq!(client.send(&segments(&mut [vec![1; 3]])), 3);
    peer.read_exact(&mut [0; 3]).unwrap();
}

pub(super) fn an_empty_place_is_refused(engine: Engine) {
    let mut client = Client::new(engine);
    client.io.register(&[NO_FILE.into(); 4]).unwrap();
    let mut buffers = [vec![0; 4]];
    let list = segments(&mut buffers);
    for operation in [
        SocketOp::SetOption(SocketOption::NoDelay),
        SocketOp::Take,
        sending(&list),
        receiving(&list),
    ] {
        assert_eq!(client.run(operation), -libc::EBADF, "{operation:?}");
    }
    assert_eq!(client.run(SocketOp::Close), 0);
}

pub(super) fn an_option_is_set_on_the_socket(engine: Engine) {
    let (mut client, _peer) = Client::connected(engine);
    let taken = |client: &mut Client| {
        let fd = client.run(SocketOp::Take);
        assert!(fd >= 0, "{fd}");
        // SAFETY: a descriptor that was just made for us.
        unsafe { OwnedFd::from_raw_fd(fd) }
    };
    let socket = taken(&mut client);
    assert!(!rustix::net::sockopt::tcp_nodelay(&socket).unwrap());
    assert_eq!(client.run(SocketOp::SetOption(SocketOption::NoDelay)), 0);
    assert!(rustix::net::sockopt::tcp_nodelay(&socket).unwrap());
    assert_eq!(rustix::net::sockopt::socket_linger(&socket).unwrap(), None);
    assert_eq!(client.run(SocketOp::SetOption(SocketOption::ResetOnClose)), 0);
    let linger = rustix::net::sockopt::socket_linger(&socket).unwrap();
    assert_eq!(linger, Some(Duration::ZERO));
    let flags = rustix::io::fcntl_getfd(&socket).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

pub(super) fn a_taken_socket_goes_on_in_another_reactor_of_either_kind(engine: Engine) {
    for next in [Engine::Async, Engine::Sync] {
        let (mut client, mut peer) = Client::connected(engine);
        let fd = client.run(SocketOp::Take);
        assert!(fd >= 0, "{fd}");
        // SAFETY: a descriptor that was just made for us.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        assert_eq!(client.run(SocketOp::Close), 0);
        drop(client);
        let mut successor = Client::new(next);
        let mut files: [RawFd; 3] = [NO_FILE; 3];
        *files.last_mut().unwrap() = socket.as_raw_fd();
        successor.io.register(&files.map(Into::into)).unwrap();
        let mut buffers = [vec![0; 3], vec![0; 3]];
        let list = segments(&mut buffers);
        assert_eq!(successor.send(&list), 6);
        peer.read_exact(&mut [0; 6]).unwrap();
        // It still waits where nothing is there, although a descriptor would block.
        successor.begin(receiving(&list), Token(1));
        successor.assert_waits(Token(1));
        peer.write_all(b"onward").unwrap();
        assert_eq!(successor.result(Token(1)), 6);
        // And it makes way for a new one; its owner closes the descriptor.
        assert_eq!(successor.run(SocketOp::Make(Family::V4)), 0);
        drop(socket);
        assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0, "the socket is closed");
    }
}

pub(super) fn a_descriptor_that_was_registered_stays_its_owners(engine: Engine) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    let mut client = Client::new(engine);
    client
        .io
        .register(&[NO_FILE, NO_FILE, stream.as_raw_fd()].map(Into::into))
        .unwrap();
    assert_eq!(client.run(SocketOp::Close), 0);
    drop(client);
    (&stream).write_all(b"still here").unwrap();
    peer.read_exact(&mut [0; 10]).unwrap();
}

pub(super) fn a_new_socket_closes_the_old_one(engine: Engine) {
    let (mut client, mut peer) = Client::connected(engine);
    assert_eq!(client.run(SocketOp::Make(Family::V4)), 0);
    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
    // The new one is not connected.
    let mut buffers = [vec![0; 4]];
    assert!(client.send(&segments(&mut buffers)) < 0);
}

pub(super) fn a_closed_socket_is_seen_by_its_peer_as_reset_if_it_was_asked_for(engine: Engine) {
    let (mut client, mut peer) = Client::connected(engine);
    assert_eq!(client.run(SocketOp::Close), 0);
    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
    let (mut client, mut peer) = Client::connected(engine);
    assert_eq!(client.run(SocketOp::SetOption(SocketOption::ResetOnClose)), 0);
    assert_eq!(client.run(SocketOp::Close), 0);
    let error = peer.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

pub(super) fn a_connection_that_its_peer_resets_ends_what_waits(engine: Engine) {
    let (mut client, peer) = Client::connected(engine);
    let mut buffers = [vec![0; 4]];
    let list = segments(&mut buffers);
    client.begin(receiving(&list), Token(1));
    client.assert_waits(Token(1));
    rustix::net::sockopt::set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
    drop(peer);
    assert_eq!(client.result(Token(1)), -libc::ECONNRESET);
    // The process lives on: no signal comes of it.
    assert_eq!(client.send(&list), -libc::EPIPE);
}

pub(super) fn a_watch_and_a_timer_are_served_while_a_receive_waits(engine: Engine) {
    let (mut client, mut peer) = Client::connected(engine);
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    client.io.watch(eventfd.as_raw_fd(), Token(1)).unwrap();
    let mut buffers = [vec![0; 4]];
    let list = segments(&mut buffers);
    client.set_low_water(LowWater::STEP_BYTES);
    client.begin(receiving(&list), Token(2));
    client.assert_waits(Token(2));
    for _ in 0..3 {
        eventfd.write(1).unwrap();
        client.io.set_timer(Some(Instant::now() + LIMIT));
        let woken = client.wait(Patience::UntilEvent);
        assert!(
            matches!(woken.as_slice(), [Wake::Signalled(Token(1))]),
            "{woken:?}"
        );
        client
            .io
            .set_timer(Some(Instant::now() + Duration::from_millis(10)));
        let mut woken = Vec::new();
        while woken.is_empty() {
            woken = client.wait(Patience::UntilEvent);
        }
        assert!(matches!(woken.as_slice(), [Wake::TimerExpired]), "{woken:?}");
        peer.write_all(b"x").unwrap();
    }
    assert!(client.ended.is_empty());
    peer.write_all(&[0; LowWater::STEP_BYTES]).unwrap();
    assert_eq!(client.result(Token(2)), 4);
}

pub(super) fn an_operation_that_waits_keeps_its_room(engine: Engine) {
    let (mut client, _peer) = Client::connected(engine);
    let mut buffers = [vec![0; 4]];
    let list = segments(&mut buffers);
    for number in 0..u64::from(super::OPS_MAX) {
        client.begin(receiving(&list), Token(number));
    }
    client.assert_waits(Token(0));
    let one_more = KernelOp::Socket {
        file: SOCKET,
        operation: receiving(&list),
    };
    assert!(client.io.submit(one_more, Token(99)).is_err());
}

pub(super) fn a_reactor_is_dropped_although_operations_wait_for_ever(engine: Engine) {
    let silent = Silent::new();
    let (mut client, mut peer) = Client::connected(engine);
    let mut buffers = [vec![0; 4], vec![0; 4]];
    let list = segments(&mut buffers);
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    client.io.watch(eventfd.as_raw_fd(), Token(9)).unwrap();
    client.begin(receiving(&list), Token(1));
    client.assert_waits(Token(1));
    let address = SocketAddress::new(silent.address);
    let elsewhere = FileSlot(5);
    for (number, operation) in [
        SocketOp::Make(Family::V4),
        SocketOp::Connect {
            peer: &raw const address,
        },
    ]
    .into_iter()
    .enumerate()
    {
        let op = KernelOp::Socket {
            file: elsewhere,
            operation,
        };
        client.io.submit(op, Token(2 + number as u64)).unwrap();
        client.wait(Patience::None);
    }
    // This one was not even submitted to the kernel.
    client.begin(receiving(list.get(..1).unwrap()), Token(4));
    let begun = Instant::now();
    drop(client);
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0, "the socket is closed");
}
