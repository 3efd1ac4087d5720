//! An image that waits for a server, which answers when a test says so.
#![expect(unsafe_code, reason = "a segment points into the image's own byte")]
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use super::*;
use crate::backend::{Access, Discard};
use crate::reactor::{Event, FileSlot, ImageFile, KernelOp, SocketOp, Token};

/// What a test learns of its image, which it has given away.
#[derive(Debug, Default)]
struct Seen {
    attached: u32,
    partings: Vec<Parting>,
}

/// An image of one socket, in which a receive waits as long as it is attached. Each byte that arrives ends a request,
/// and so does an alarm.
struct Server {
    socket: UnixStream,
    seen: Arc<Mutex<Seen>>,
    /// One byte, and the segment that names it; both stay in place.
    _byte: Box<u8>,
    segment: Box<Segment>,
    receives: bool,
    leaves: bool,
    request: Option<Request>,
    ended: Option<Completion>,
    alarm: Option<Instant>,
    alarm_after: Option<Duration>,
}

const RECEIVE: Token = Token(1);
const CANCEL: Token = Token(2);

impl Server {
    fn new() -> (Box<Self>, UnixStream, Arc<Mutex<Seen>>) {
        let (socket, peer) = UnixStream::pair().unwrap();
        let seen = Arc::<Mutex<Seen>>::default();
        let mut byte = Box::new(0);
        // SAFETY: the byte lives as long as the image, which outlives its receive.
        let segment = Box::new(unsafe { Segment::new(NonNull::from(byte.as_mut()), 1) });
        let server = Box::new(Self {
            socket,
            seen: Arc::clone(&seen),
            _byte: byte,
            segment,
            receives: false,
            leaves: false,
            request: None,
            ended: None,
            alarm: None,
            alarm_after: None,
        });
        (server, peer, seen)
    }

    fn submit(&mut self, operation: SocketOp, token: Token, io: &mut dyn Submit) {
        let file = FileSlot(0);
        io.submit(KernelOp::Socket { file, operation }, token).unwrap();
    }

    fn receive(&mut self, io: &mut dyn Submit) {
        self.receives = true;
        let receive = SocketOp::Receive {
            segments: self.segment.as_ref(),
            segment_count: 1,
        };
        self.submit(receive, RECEIVE, io);
    }
}

impl Backend for Server {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: 1 << 20,
            logical_block_bytes: 512,
            physical_block_bytes: 512,
            access: Access::ReadWrite,
            discard: Discard::Ignored,
        }
    }

    fn files(&self) -> Vec<ImageFile> {
        vec![self.socket.as_raw_fd().into()]
    }

    fn start(&mut self, request: Request, io: &mut dyn Submit) -> Step {
        self.alarm = self.alarm_after.map(|after| io.now() + after);
        self.request = Some(request);
        Step::Pending
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) -> Step {
        if event.token != RECEIVE {
            return Step::Pending;
        }
        self.receives = false;
        if self.leaves {
            return Step::Pending;
        }
        assert_eq!(event.result, 1);
        self.receive(io);
        let request = self.request.take().unwrap();
        let outcome = Ok(());
        Step::Done(Completion { request, outcome })
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        None
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.ended.take()
    }

    fn in_flight(&self) -> usize {
        usize::from(self.request.is_some())
    }

    fn attach(&mut self, io: &mut dyn Submit) {
        self.seen.lock().unwrap().attached += 1;
        self.receive(io);
    }

    fn detach(&mut self, parting: Parting, io: &mut dyn Submit) {
        self.seen.lock().unwrap().partings.push(parting);
        self.leaves = true;
        self.submit(SocketOp::Cancel { target: RECEIVE }, CANCEL, io);
    }

    fn is_attached(&self) -> bool {
        self.receives
    }

    fn alarm(&self) -> Option<Instant> {
        self.alarm
    }

    fn wake(&mut self, _io: &mut dyn Submit) {
        self.alarm = None;
        let request = self.request.take().unwrap();
        let outcome = Err(Failure::Host(libc::EIO));
        self.ended = Some(Completion { request, outcome });
    }
}

#[test]
fn an_image_is_attached_while_it_is_used_and_leaves_as_it_is() {
    let (server, mut peer, seen) = Server::new();
    let mut image = Blocking::new(server).unwrap();
    for answer in [b"a", b"b"] {
        peer.write_all(answer).unwrap();
        assert_eq!(image.flush(), Ok(()));
    }
    let image = image.into_image();
    assert!(!image.is_attached());
    drop(image);
    let seen = seen.lock().unwrap();
    assert_eq!(
        (seen.attached, seen.partings.as_slice()),
        (1, [Parting::Moves].as_slice())
    );
}

#[test]
fn an_image_that_is_dropped_ends_in_good_order() {
    let (server, _peer, seen) = Server::new();
    drop(Blocking::new(server).unwrap());
    assert_eq!(seen.lock().unwrap().partings, [Parting::Ends]);
}

#[test]
fn an_alarm_goes_off_while_nothing_else_happens() {
    let (mut server, _peer, _seen) = Server::new();
    server.alarm_after = Some(Duration::from_millis(10));
    let begun = Instant::now();
    let mut image = Blocking::new(server).unwrap().with_limit(Duration::from_secs(20));
    assert_eq!(image.flush(), Err(Failure::Host(libc::EIO)));
    assert!((10..10_000).contains(&begun.elapsed().as_millis()));
}

#[test]
fn a_request_that_runs_out_of_time_fails_and_the_image_has_let_its_memory_go() {
    let (server, mut peer, seen) = Server::new();
    let mut image = Blocking::new(server)
        .unwrap()
        .with_limit(Duration::from_millis(20));
    let mut buffer = [0; 512];
    let begun = Instant::now();
    assert_eq!(image.read_at(0, &mut buffer), Err(Failure::Host(libc::ETIMEDOUT)));
    assert!((20..4_000).contains(&begun.elapsed().as_millis()));
    assert_eq!(seen.lock().unwrap().partings, [Parting::Breaks]);
    assert_eq!(image.io.in_flight(), 0);
    // It is over, even if the server answers after all.
    peer.write_all(b"a").unwrap();
    assert_eq!(image.flush(), Err(Failure::Host(libc::ETIMEDOUT)));
}

#[test]
#[should_panic(expected = "timed out")]
fn an_image_that_timed_out_is_not_given_back() {
    let (server, _peer, _seen) = Server::new();
    let mut image = Blocking::new(server).unwrap().with_limit(Duration::ZERO);
    assert_eq!(image.flush(), Err(Failure::Host(libc::ETIMEDOUT)));
    drop(image.into_image());
}
