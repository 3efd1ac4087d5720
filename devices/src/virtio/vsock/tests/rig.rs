//! A device that serves, its driver, and the host's directory of sockets.
#![expect(unsafe_code, reason = "headers are read as those of a guest")]

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use super::super::*;
use crate::virtio::conformance::BUFFERS;
use crate::virtio::device::{ActiveQueue, Interrupt, Session, VirtioDevice as _};
use crate::virtio::ring::Virtqueue;
use crate::virtio::testing::{DriverRing, Piece, memory};

pub(super) const CID: u32 = 3;
pub(super) const SOON: Duration = Duration::from_secs(20);
/// A time in which something would have come that must not.
pub(super) const STILL: Duration = Duration::from_millis(30);
/// Where the driver has what it sends.
pub(super) const SENT: u64 = BUFFERS + 0x8_0000;
/// Bytes of data for which a buffer of the driver has room.
pub(super) const ROOM_BYTES: u32 = 4096;
const SIZE: u16 = 64;
const STRIDE: u64 = 0x2000;

pub(super) struct Rig {
    pub(super) device: Vsock,
    pub(super) counts: Arc<VsockCounts>,
    pub(super) directory: Arc<tempfile::TempDir>,
    pub(super) rx: DriverRing,
    pub(super) tx: DriverRing,
    pub(super) events: DriverRing,
    kicks: [Arc<EventFd>; 3],
    pub(super) status: Arc<AtomicU32>,
}

/// What the guest says first of a connection, and of itself: that it has room.
pub(super) fn header(op: u16, (host_port, guest_port): (u32, u32)) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

pub(super) fn config(directory: &tempfile::TempDir) -> VsockConfig {
    VsockConfig {
        vsock_id: None,
        guest_cid: CID,
        uds_path: directory.path().join("v").to_str().unwrap().to_owned(),
    }
}

pub(super) fn device(directory: &tempfile::TempDir) -> (Vsock, Arc<VsockCounts>) {
    let config = config(directory);
    let listener = Listener::bind(&config.uds_path).unwrap();
    Vsock::new(&config, listener).unwrap()
}

impl Rig {
    /// A device that serves, whose driver has offered 16 buffers.
    pub(super) fn new() -> Self {
        let mut rig = Self::idle();
        rig.offer(16);
        rig.start();
        rig
    }

    pub(super) fn idle() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (device, counts) = device(&directory);
        let memory = memory(4 << 20);
        let ring = |base| DriverRing::new(&memory, base, SIZE);
        Self {
            device,
            counts,
            directory: Arc::new(directory),
            rx: ring(0x1000),
            tx: ring(0x2000),
            events: ring(0x3000),
            kicks: std::array::from_fn(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())),
            status: Arc::default(),
        }
    }

    /// As at the beginning: the rings are new.
    pub(super) fn start(&mut self) {
        let memory = Arc::clone(self.rx.memory());
        let rings = [&self.rx, &self.tx, &self.events];
        let queues = rings.iter().zip(&self.kicks).map(|(driver, kick)| {
            Some(ActiveQueue {
                ring: Virtqueue::new(Arc::clone(&memory), driver.layout(), 0).unwrap(),
                kick: Arc::clone(kick),
            })
        });
        let session = Session {
            queues: queues.collect(),
            memory,
            features: 0,
            interrupt: Interrupt::new(
                Arc::clone(&self.status),
                Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            ),
        };
        self.device.start(session).unwrap();
    }

    pub(super) fn kick(&self, queue: usize) {
        self.kicks.get(queue).unwrap().write(1).unwrap();
    }

    /// Offers buffers for packets, each in two pieces.
    pub(super) fn offer(&mut self, count: usize) {
        for _ in 0..count {
            // A chain has two descriptors, and so its place by its head; see `packet`.
            let slot = u64::from(self.rx.next_head() / 2);
            let at = BUFFERS + slot * STRIDE;
            self.rx
                .offer_chain(&[Piece::Writable(at, 44), Piece::Writable(at + 64, ROOM_BYTES)]);
        }
        self.kick(0);
    }

    /// The next packet for the guest, whose buffer is offered again.
    pub(super) fn packet(&mut self) -> (Header, Vec<u8>) {
        let packet = self.last_packet();
        self.offer(1);
        packet
    }

    /// The next packet for the guest.
    pub(super) fn last_packet(&mut self) -> (Header, Vec<u8>) {
        let (head, len) = used(&mut self.rx);
        let at = BUFFERS + u64::from(head / 2) * STRIDE;
        let mut bytes = self.rx.read(at, HEADER_BYTES);
        bytes.resize(HEADER_BYTES, 0);
        let header = parse(&mut bytes);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
        let data = self.rx.read(at + 64, usize::try_from(header.len_bytes).unwrap());
        assert_eq!(len, 44 + header.len_bytes);
        (header, data)
    }

    /// The next packet for the guest has this operation, and is of this connection.
    pub(super) fn expect(&mut self, op: u16, (host_port, guest_port): (u32, u32)) -> (Header, Vec<u8>) {
        let (header, data) = self.packet();
        let is = (header.op, header.src_port, header.dst_port);
        assert_eq!(is, (op, host_port, guest_port), "{header:?}");
        (header, data)
    }

    /// Nothing is said to the guest.
    pub(super) fn expect_silence(&mut self) {
        std::thread::sleep(STILL);
        assert_eq!(self.rx.take_used(), None);
    }

    /// Sends a packet, in two pieces; it need not be taken.
    pub(super) fn offer_packet(&mut self, header: &Header, data: &[u8]) {
        let mut bytes = header.bytes().to_vec();
        bytes.extend(data);
        let len = u32::try_from(bytes.len()).unwrap();
        self.tx.write(SENT, &bytes);
        self.tx
            .offer_chain(&[Piece::Readable(SENT, 20), Piece::Readable(SENT + 20, len - 20)]);
        self.kick(1);
    }

    /// The same, and it is taken.
    pub(super) fn send(&mut self, header: &Header, data: &[u8]) {
        self.offer_packet(header, data);
        used(&mut self.tx);
    }

    pub(super) fn send_data(&mut self, key: (u32, u32), data: &[u8]) {
        let header = Header {
            len_bytes: u32::try_from(data.len()).unwrap(),
            ..header(op::RW, key)
        };
        self.send(&header, data);
    }

    pub(super) fn path(&self, of_port: &str) -> PathBuf {
        self.directory.path().join(format!("v{of_port}"))
    }

    /// A connection of the guest's to port 52 of the host.
    pub(super) fn connected_to_host(&mut self, guest_port: u32) -> UnixStream {
        let path = self.path("_52");
        let _none_or_an_earlier_one = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        self.send(&header(op::REQUEST, (52, guest_port)), &[]);
        self.expect(op::RESPONSE, (52, guest_port));
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    /// A program of the host that says this.
    pub(super) fn caller(&self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("")).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream
    }
}

/// The header in `bytes`.
fn parse(bytes: &mut [u8]) -> Header {
    let address = std::ptr::NonNull::new(bytes.as_mut_ptr()).unwrap();
    // SAFETY: the bytes outlive the segment.
    let segment = unsafe { coracle_storage::request::Segment::new(address, bytes.len()) };
    Header::read(&[segment]).unwrap()
}

/// What a driver is given back next.
pub(super) fn used(driver: &mut DriverRing) -> (u32, u32) {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(used) = driver.take_used() {
            return used;
        }
        assert!(Instant::now() < deadline, "nothing comes back");
        std::thread::sleep(Duration::from_micros(100));
    }
}

pub(super) fn comes(mut what: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !what() {
        assert!(Instant::now() < deadline, "it never comes");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// So many bytes of a stream.
pub(super) fn read(mut stream: &UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// The stream has ended, after these bytes.
pub(super) fn expect_end(mut stream: &UnixStream, after: &[u8]) {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, after);
}
