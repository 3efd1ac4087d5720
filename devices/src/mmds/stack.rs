//! TCP, IP and ARP of the service's address, on one interface of the guest. The protocols themselves are smoltcp's.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom as _, SystemRandom};
use smoltcp::iface::{self, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

use super::answer::{Answer, answer};
use super::store::Mmds;

/// The Ethernet address of the service, the same on each interface of each machine: a guest that goes on elsewhere knows it.
const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
const PORT: u16 = 80;
/// Connections at a time.
const CONNECTIONS_MAX: usize = 8;
/// Longest request.
const REQUEST_BYTES_MAX: usize = 4096;
/// What is under way to the guest of one connection.
const WINDOW_BYTES: usize = 8192;
/// The longest frame that can be of use: a full window of a request, and all headers before it.
const FRAME_BYTES_MAX: usize = 14 + 60 + 60 + REQUEST_BYTES_MAX;
const FRAME_BYTES_SENT_MAX: usize = 1514;
/// Frames that wait for either side.
const FRAMES_MAX: usize = 32;
/// How long a connection may do nothing while no other is wanted, and a guest leave unanswered what it was sent.
const QUIET_MAX: Duration = Duration::from_secs(30);
/// What is sent reaches nobody behind the guest.
const HOP_LIMIT: u8 = 1;

/// How much of a frame says whether it is for the service: up to the end of an ARP packet.
pub const HEAD_BYTES: usize = 42;
const ETHER_TYPE_AT: usize = 12;
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
/// Where an IPv4 packet has its destination (RFC 791), and an ARP packet its target (RFC 826).
const DESTINATION_AT: usize = 14 + 16;
const TARGET_AT: usize = 14 + 24;

/// The service as one interface of the guest has it.
pub struct Stack {
    mmds: Arc<Mmds>,
    address: Ipv4Addr,
    began: Instant,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// One connection, or the place of one.
struct Connection {
    socket: SocketHandle,
    /// What has come of a request.
    request: Vec<u8>,
    /// What is left of a response.
    response: VecDeque<u8>,
    is_last: bool,
    is_open: bool,
    /// When a byte came or went.
    active: Instant,
}

/// Frames on their way, as smoltcp takes and gives them.
#[derive(Debug, Default)]
struct Wire {
    to_service: VecDeque<Vec<u8>>,
    to_guest: VecDeque<Vec<u8>>,
}

impl Stack {
    /// The service at `address`.
    pub fn new(mmds: Arc<Mmds>, address: Ipv4Addr) -> Self {
        let began = Instant::now();
        let mut config = iface::Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        let mut seed = [0; 8];
        // Whoever cannot guess it is on no way to this guest anyway.
        let _ = SystemRandom::new().fill(&mut seed);
        config.random_seed = u64::from_ne_bytes(seed);
        let mut wire = Wire::default();
        let mut interface = Interface::new(config, &mut wire, time::Instant::ZERO);
        // Whatever the guest's own address is, it is beside this one.
        interface.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(IpAddress::Ipv4(address), 0))
                .expect("there is room for one address");
        });
        let mut sockets = SocketSet::new(Vec::new());
        let connections = (0..CONNECTIONS_MAX).map(|_| {
            let buffer = |bytes| SocketBuffer::new(vec![0; bytes]);
            let mut socket = Socket::new(buffer(REQUEST_BYTES_MAX), buffer(WINDOW_BYTES));
            let quiet = u64::try_from(QUIET_MAX.as_millis()).unwrap_or(u64::MAX);
            socket.set_timeout(Some(time::Duration::from_millis(quiet)));
            socket.set_hop_limit(Some(HOP_LIMIT));
            socket.set_nagle_enabled(false);
            Connection {
                socket: sockets.add(socket),
                request: Vec::new(),
                response: VecDeque::new(),
                is_last: false,
                is_open: false,
                active: began,
            }
        });
        let connections = connections.collect();
        Self {
            mmds,
            address,
            began,
            wire,
            interface,
            sockets,
            connections,
        }
    }

    /// Whether a frame that begins so is for the service, and for nobody else. A shorter one is for none.
    pub fn wants(&self, head: &[u8]) -> bool {
        let is_at = |at: usize, bytes: &[u8]| head.get(at..at + bytes.len()) == Some(bytes);
        let address = self.address.octets();
        (is_at(ETHER_TYPE_AT, &IPV4) && is_at(DESTINATION_AT, &address))
            || (is_at(ETHER_TYPE_AT, &ARP) && is_at(TARGET_AT, &address))
    }

    /// The longest frame that [`Self::take`] takes.
    pub const fn frame_bytes_max() -> usize {
        FRAME_BYTES_MAX
    }

    /// Takes a frame that it [wants](Self::wants). One that is too long, or one too many, is lost as on a wire.
    pub fn take(&mut self, mut frame: Vec<u8>, now: Instant) {
        let counts = &self.mmds.counts;
        counts.rx_frames.fetch_add(1, Relaxed);
        if frame.len() > FRAME_BYTES_MAX || self.wire.to_service.len() == FRAMES_MAX {
            counts.rx_dropped.fetch_add(1, Relaxed);
            return;
        }
        // A guest that has a gateway for everything sends it there: whom it is for, its IP address says.
        for (to, from) in frame.iter_mut().zip(MAC) {
            *to = from;
        }
        self.wire.to_service.push_back(frame);
        self.run(now);
    }

    /// Whether there is a frame for the guest, after what can be done now.
    pub fn is_ready(&mut self, now: Instant) -> bool {
        if !self.has_frames() {
            self.run(now);
        }
        self.has_frames()
    }

    /// The next frame for the guest, without a header of virtio. With the last one that there was the next ones are made.
    pub fn give(&mut self, now: Instant) -> Option<Vec<u8>> {
        let frame = self.wire.to_guest.pop_front()?;
        if !self.has_frames() {
            self.run(now);
        }
        let counts = &self.mmds.counts;
        counts.tx_frames.fetch_add(1, Relaxed);
        counts.tx_bytes.fetch_add(frame.len() as u64, Relaxed);
        Some(frame)
    }

    /// Whether there is a frame for the guest.
    pub fn has_frames(&self) -> bool {
        !self.wire.to_guest.is_empty()
    }

    /// When there is something to do though no frame came: [`Self::is_ready`] does it.
    pub fn alarm(&mut self, now: Instant) -> Option<Instant> {
        // It gets what there is first.
        if self.has_frames() {
            return None;
        }
        let stamp = self.stamp(now);
        let delay = self.interface.poll_delay(stamp, &self.sockets);
        let protocol = delay.map(|delay| now + Duration::from_micros(delay.total_micros()));
        let open = self.connections.iter().filter(|connection| connection.is_open);
        let quiet = open.map(|connection| connection.active + QUIET_MAX);
        protocol.into_iter().chain(quiet).min()
    }

    fn stamp(&self, now: Instant) -> time::Instant {
        let since = now.saturating_duration_since(self.began).as_micros();
        time::Instant::from_micros(i64::try_from(since).unwrap_or(i64::MAX))
    }

    /// Does what can be done now. What one round begins, the next sends; how many there are is bounded by what is there.
    fn run(&mut self, now: Instant) {
        const ROUNDS_MAX: usize = 2 * FRAMES_MAX;
        let stamp = self.stamp(now);
        for _ in 0..ROUNDS_MAX {
            self.interface.poll(stamp, &mut self.wire, &mut self.sockets);
            let mut has_changed = false;
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut::<Socket<'_>>(connection.socket);
                has_changed |= connection.serve(socket, &self.mmds, now);
            }
            self.keep_one_listening();
            if !has_changed {
                return;
            }
        }
    }

    /// Somebody may always come: if need be, for that a connection makes room that is over, or the one that has been quiet for
    /// longest.
    fn keep_one_listening(&mut self) {
        let state = |connection: &Connection| self.sockets.get::<Socket<'_>>(connection.socket).state();
        if self
            .connections
            .iter()
            .any(|connection| state(connection) == State::Listen)
        {
            return;
        }
        let rank = |connection: &&mut Connection| match state(connection) {
            State::TimeWait => (0, connection.active),
            _ => (1, connection.active),
        };
        let Some(connection) = self.connections.iter_mut().min_by_key(rank) else {
            return;
        };
        connection.ends(&self.mmds);
        let socket = self.sockets.get_mut::<Socket<'_>>(connection.socket);
        socket.abort();
        let _ = socket.listen(PORT);
    }
}

impl Connection {
    /// Takes what has come, answers it, and sends what there is room for; says whether that has changed anything.
    fn serve(&mut self, socket: &mut Socket<'_>, mmds: &Mmds, now: Instant) -> bool {
        match socket.state() {
            State::Closed => {
                self.ends(mmds);
                // It is closed, and 80 is a port: nothing else could be wrong.
                let _ = socket.listen(PORT);
                return false;
            }
            State::Listen | State::TimeWait => {
                self.ends(mmds);
                return false;
            }
            _ if !self.is_open => {
                self.is_open = true;
                self.active = now;
                mmds.counts.opened.fetch_add(1, Relaxed);
            }
            _ => {}
        }
        if now.saturating_duration_since(self.active) >= QUIET_MAX {
            socket.abort();
            self.ends(mmds);
            return true;
        }
        let mut has_changed = self.receive(socket);
        if self.response.is_empty() && !self.is_last {
            has_changed |= self.respond(mmds);
        }
        has_changed |= self.send(socket);
        let is_over = self.is_last || !socket.may_recv();
        if self.response.is_empty() && is_over && socket.may_send() {
            socket.close();
            has_changed = true;
        }
        if has_changed {
            self.active = now;
        }
        has_changed
    }

    fn receive(&mut self, socket: &mut Socket<'_>) -> bool {
        let room = REQUEST_BYTES_MAX.saturating_sub(self.request.len());
        let is_wanted = !self.is_last && room > 0;
        if !is_wanted || !socket.can_recv() {
            return false;
        }
        let received = socket.recv(|bytes| {
            let taken = bytes.get(..room.min(bytes.len())).unwrap_or_default();
            self.request.extend_from_slice(taken);
            (taken.len(), taken.len())
        });
        received.is_ok_and(|count| count > 0)
    }

    fn respond(&mut self, mmds: &Mmds) -> bool {
        match answer(mmds, &self.request) {
            Answer::Response {
                consumed,
                bytes,
                is_last,
            } => {
                self.request.drain(..consumed.min(self.request.len()));
                self.response.extend(bytes);
                self.is_last = is_last;
                true
            }
            Answer::Incomplete if self.request.len() >= REQUEST_BYTES_MAX => {
                self.request.clear();
                self.response
                    .extend(*b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
                self.is_last = true;
                true
            }
            Answer::Incomplete => false,
        }
    }

    fn send(&mut self, socket: &mut Socket<'_>) -> bool {
        let mut has_sent = false;
        while !self.response.is_empty() && socket.can_send() {
            let (front, _) = self.response.as_slices();
            match socket.send_slice(front) {
                Ok(count) if count > 0 => {
                    self.response.drain(..count);
                    has_sent = true;
                }
                _ => break,
            }
        }
        has_sent
    }

    /// Whoever it was has gone.
    fn ends(&mut self, mmds: &Mmds) {
        if std::mem::take(&mut self.is_open) {
            mmds.counts.closed.fetch_add(1, Relaxed);
        }
        self.request.clear();
        self.response.clear();
        self.is_last = false;
    }
}

impl Device for Wire {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: time::Instant) -> Option<(Arrived, Leaving<'_>)> {
        // What comes may have to be answered.
        if self.to_guest.len() >= FRAMES_MAX {
            return None;
        }
        let frame = self.to_service.pop_front()?;
        Some((Arrived(frame), Leaving(&mut self.to_guest)))
    }

    fn transmit(&mut self, _: time::Instant) -> Option<Leaving<'_>> {
        (self.to_guest.len() < FRAMES_MAX).then_some(Leaving(&mut self.to_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES_SENT_MAX;
        // A guest leaves the sum of a segment to its network device, which this one is a part of.
        capabilities.checksum.tcp = Checksum::Tx;
        // Who sends a wrong sum deceives nobody but itself.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities
    }
}

struct Arrived(Vec<u8>);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Leaving<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}
