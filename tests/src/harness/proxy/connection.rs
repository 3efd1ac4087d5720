//! A client's connection and the one to the server that belongs to it.

use std::io::{self, ErrorKind, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::lane::{Lane, Passed};
use super::protocol::{Framer, Protocol};
use super::volatile::Cache;
use super::{Direction, Fault};

/// Both sockets, and what is between them.
#[derive(Debug)]
pub(super) struct Connection {
    /// Nothing when the client is gone, and the server's side lives on for what it has not got yet.
    pub(super) client: Option<TcpStream>,
    pub(super) server: TcpStream,
    /// What the network does to requests.
    pub(super) to_server: Lane,
    /// From there to the server, by way of the cache if there is one: nothing happens to it.
    pub(super) inner: Lane,
    /// What the network does to answers.
    pub(super) to_client: Lane,
    /// What is known of the two sides' language.
    pub(super) protocol: Option<Box<dyn Protocol>>,
    /// What the client has sent and is no whole message yet.
    requests: Framer,
    /// The same of the server.
    answers: Framer,
    /// A message of each direction that waits for the next one to overtake it.
    overtaken: [Option<Vec<u8>>; 2],
    /// What volatile mode holds back.
    pub(super) cache: Cache,
    /// It is reset as soon as the cache has written back.
    is_cut: bool,
    /// It ends here: the fault says so, or one side has failed.
    pub(super) is_broken: bool,
}

/// What became of reading a socket.
enum Got {
    Bytes(Vec<u8>),
    End,
    Nothing,
    Reset,
}

const READ_BYTES: usize = 64 << 10;

impl Connection {
    pub(super) fn new(
        client: TcpStream,
        server: TcpStream,
        protocol: Option<Box<dyn Protocol>>,
    ) -> Option<Self> {
        for socket in [&client, &server] {
            socket.set_nonblocking(true).ok()?;
            socket.set_nodelay(true).ok()?;
        }
        Some(Self {
            client: Some(client),
            server,
            to_server: Lane::new(),
            inner: Lane::new(),
            to_client: Lane::new(),
            protocol,
            requests: Framer::default(),
            answers: Framer::default(),
            overtaken: [None, None],
            cache: Cache::default(),
            is_cut: false,
            is_broken: false,
        })
    }

    /// What the client has sent, if anything is wanted.
    pub(super) fn read_client(&mut self) -> Option<Vec<u8>> {
        let client = self.client.as_ref().filter(|_| self.to_server.is_open())?;
        match read(client) {
            Got::Bytes(bytes) => return Some(bytes),
            Got::End => self.to_server.has_ended = true,
            Got::Reset => self.lose_client(),
            Got::Nothing => {}
        }
        None
    }

    /// Takes note that the client is gone; the server's side lives on until it has what it is owed.
    pub(super) fn lose_client(&mut self) {
        self.client = None;
        self.to_server.has_ended = true;
    }

    /// What the server has answered, if anything is wanted.
    pub(super) fn read_server(&mut self) -> Option<Vec<u8>> {
        if !self.to_client.is_open() {
            return None;
        }
        match read(&self.server) {
            Got::Bytes(bytes) => return Some(bytes),
            Got::End => {
                self.to_client.has_ended = true;
                // Nobody answers any more: what the cache held is lost with the server's end.
                self.cache = Cache::default();
            }
            Got::Reset => {
                if let Some(client) = self.client.take() {
                    reset(client);
                }
                self.is_broken = true;
            }
            Got::Nothing => {}
        }
        None
    }

    /// Takes bytes that a side has sent.
    pub(super) fn take_in(&mut self, direction: Direction, bytes: &[u8]) {
        self.framer(direction).push(bytes);
    }

    /// The next whole message of those; without a protocol, all there is.
    pub(super) fn next_message(&mut self, direction: Direction) -> Option<Vec<u8>> {
        let has_ended = self.lane(direction).has_ended;
        let framer = match direction {
            Direction::ToServer => &mut self.requests,
            Direction::ToClient => &mut self.answers,
        };
        if let Some(protocol) = self.protocol.as_deref()
            && let Some(message) = framer.next(protocol, direction)
        {
            return Some(message);
        }
        let is_all = self.protocol.is_none() || has_ended;
        is_all.then(|| framer.rest()).filter(|rest| !rest.is_empty())
    }

    pub(super) fn lane(&self, direction: Direction) -> &Lane {
        match direction {
            Direction::ToServer => &self.to_server,
            Direction::ToClient => &self.to_client,
        }
    }

    pub(super) fn lane_mut(&mut self, direction: Direction) -> &mut Lane {
        match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        }
    }

    /// The place for the message that the next one overtakes.
    pub(super) fn overtaken(&mut self, direction: Direction) -> &mut Option<Vec<u8>> {
        let [to_server, to_client] = &mut self.overtaken;
        match direction {
            Direction::ToServer => to_server,
            Direction::ToClient => to_client,
        }
    }

    fn framer(&mut self, direction: Direction) -> &mut Framer {
        match direction {
            Direction::ToServer => &mut self.requests,
            Direction::ToClient => &mut self.answers,
        }
    }

    /// The next request that is whole behind the network.
    pub(super) fn next_request(&mut self) -> Option<Vec<u8>> {
        let protocol = self.protocol.as_deref()?;
        self.cache.requests.next(protocol, Direction::ToServer)
    }

    /// Passes on everything that the cache holds.
    pub(super) fn write_back(&mut self) {
        let Some(protocol) = self.protocol.as_mut() else {
            return;
        };
        let mut bytes = Vec::new();
        for request in std::mem::take(&mut self.cache.held) {
            let request = protocol.write_back(request);
            self.cache.awaited.insert(protocol.tag(&request));
            bytes.extend(request);
        }
        self.pass_inside(bytes);
    }

    /// Passes a request on to the server behind the cache.
    pub(super) fn pass_request(&mut self, request: Vec<u8>) {
        let request = match self.protocol.as_mut() {
            Some(protocol) => protocol.to_server(request),
            None => request,
        };
        self.pass_inside(request);
    }

    /// What the client is to see of an answer: nothing of one to a write that was acknowledged before.
    pub(super) fn unwrapped(&mut self, answer: Vec<u8>) -> Option<Vec<u8>> {
        let Some(protocol) = self.protocol.as_mut() else {
            return Some(answer);
        };
        if !self.cache.awaited.remove(&protocol.tag(&answer)) {
            return Some(protocol.to_client(answer));
        }
        if !protocol.swallow(&answer) {
            // What was acknowledged is not there: the client must write it again.
            self.is_cut = true;
            self.is_broken = true;
        }
        None
    }

    /// Sends the server bytes to which nothing happens any more.
    pub(super) fn pass_inside(&mut self, bytes: Vec<u8>) {
        self.inner.push(bytes, Instant::now());
    }

    /// Takes note of what passing bytes came to, and ends the fault that ended the connection.
    pub(super) fn note(&mut self, passed: io::Result<Passed>, fault: &mut Fault) {
        match passed {
            Ok(Passed::All) => {}
            Ok(Passed::Close) => {
                *fault = Fault::None;
                self.is_broken = true;
            }
            Err(_) => self.is_broken = true,
        }
    }

    /// Whether no request comes any more: the client is gone, or has said so.
    pub(super) fn is_left(&self) -> bool {
        self.client.is_none() || self.to_server.end_passed
    }

    /// Passes the end of the requests through the network, when all before it has passed.
    pub(super) fn pass_request_end(&mut self, to_server: Fault) {
        if self.to_server.end_is_due(to_server) {
            self.to_server.end_passed = true;
            self.inner.has_ended = true;
        }
    }

    /// Passes the ends of both streams on to the sockets, when all before them has passed.
    pub(super) fn pass_ends(&mut self, to_client: Fault) {
        // What the cache holds comes before the end.
        if self.inner.end_is_due(Fault::None) && self.cache.is_clean() {
            self.inner.end_passed = true;
            // A server that is gone needs no end.
            drop(self.server.shutdown(Shutdown::Write));
        }
        if self.to_client.end_is_due(to_client) {
            self.to_client.end_passed = true;
            if let Some(client) = &self.client {
                drop(client.shutdown(Shutdown::Write));
            }
        }
    }

    /// Whether there is nothing left to do for it.
    pub(super) fn is_through(&self) -> bool {
        let client_is_through = self.client.is_none() || self.to_client.end_passed;
        let is_cut = self.is_cut && self.cache.is_clean();
        self.is_broken || is_cut || (self.inner.end_passed && self.to_client.has_ended && client_is_through)
    }

    /// Resets the client's side, and keeps the server's until it is told to deliver.
    pub(super) fn strand(&mut self) {
        if let Some(client) = self.client.take() {
            reset(client);
            self.to_server.is_held = true;
            self.to_server.has_ended = true;
        }
    }

    /// Resets the client's side, and has the server's reset when nothing is owed to it.
    pub(super) fn cut(&mut self) {
        self.client.take().into_iter().for_each(reset);
        self.to_server.clear();
        self.requests.rest();
        self.is_cut = true;
    }

    /// Ends both sides as it was asked for: by a reset, or in the ordinary way.
    pub(super) fn close(self) {
        if self.is_cut {
            self.reset();
        }
    }

    pub(super) fn reset(self) {
        self.client.into_iter().for_each(reset);
        reset(self.server);
    }
}

fn read(mut socket: &TcpStream) -> Got {
    let mut bytes = vec![0; READ_BYTES];
    match socket.read(&mut bytes) {
        Ok(0) => Got::End,
        Ok(count) => {
            bytes.truncate(count);
            Got::Bytes(bytes)
        }
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Got::Nothing,
        Err(_) => Got::Reset,
    }
}

/// Closes a connection by RST: whoever is at its other end gets an error, and no end of the stream.
pub(super) fn reset(socket: TcpStream) {
    // A socket that cannot linger is closed in the ordinary way.
    let _ = rustix::net::sockopt::set_socket_linger(socket.as_fd(), Some(Duration::ZERO));
    drop(socket);
}
