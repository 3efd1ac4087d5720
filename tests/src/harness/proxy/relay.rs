//! The proxy's thread: it waits for sockets, for orders and for time, and moves bytes.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::connection::{Connection, reset};
use super::lane::Passed;
use super::volatile::{Kind, Protocol};
use super::{Direction, Fault, Order, Request};
use crate::Outcome;
use crate::seed::Seed;

/// Everything that the thread owns.
#[derive(Debug)]
pub(super) struct Relay {
    listener: TcpListener,
    server: SocketAddr,
    orders: Receiver<Order>,
    ear: UnixStream,
    to_server: Fault,
    to_client: Fault,
    seed: Seed,
    protocol: Option<Box<dyn Protocol>>,
    connections: Vec<Connection>,
}

const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// Without anything to wait for, the thread looks around this often.
const REST: Duration = Duration::from_millis(500);

impl Relay {
    pub(super) fn new(
        (listener, server): (TcpListener, SocketAddr),
        (orders, ear): (Receiver<Order>, UnixStream),
        seed: Seed,
        protocol: Option<Box<dyn Protocol>>,
    ) -> Outcome<Self> {
        listener.set_nonblocking(true)?;
        ear.set_nonblocking(true)?;
        Ok(Self {
            listener,
            server,
            orders,
            ear,
            to_server: Fault::None,
            to_client: Fault::None,
            seed,
            protocol,
            connections: vec![],
        })
    }

    /// Runs until it is told to end, or nobody can tell it any more.
    pub(super) fn run(&mut self) {
        loop {
            self.wait();
            let mut drained = [0; 64];
            // The bell only wakes; what it is about is in the channel.
            let _ = self.ear.read(&mut drained);
            while let Ok((request, answer)) = self.orders.try_recv() {
                let result = self.obey(request);
                // Bytes that the order frees are on their way before it is answered.
                self.pass();
                // Whoever asked may have given up.
                let _ = answer.send(result);
                if matches!(request, Request::End) {
                    return;
                }
            }
            self.accept();
            self.read();
            self.release();
            self.pass();
        }
    }

    fn wait(&self) {
        let now = Instant::now();
        let lanes = self
            .connections
            .iter()
            .flat_map(|c| [c.to_server.due(self.to_server), c.to_client.due(self.to_client)]);
        let until = lanes
            .flatten()
            .map(|due| due.saturating_duration_since(now))
            .min();
        let limit = Timespec::try_from(until.unwrap_or(REST).min(REST)).ok();
        let mut sources = vec![PollFd::new(&self.ear, PollFlags::IN)];
        if self.to_server != Fault::BlackHole {
            sources.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        for connection in &self.connections {
            let (client, server) = (connection.client.as_ref(), &connection.server);
            let pairs = [
                (
                    client.map(AsFd::as_fd),
                    &connection.to_server,
                    &connection.to_client,
                ),
                (Some(server.as_fd()), &connection.to_client, &connection.to_server),
            ];
            for (socket, from, to) in pairs {
                let mut events = PollFlags::empty();
                events.set(PollFlags::IN, from.is_open());
                events.set(PollFlags::OUT, to.lacks_room);
                if let Some(socket) = socket.filter(|_| !events.is_empty()) {
                    sources.push(PollFd::from_borrowed_fd(socket, events));
                }
            }
        }
        // An interrupted wait is a short one.
        let _ = rustix::event::poll(&mut sources, limit.as_ref());
    }

    fn obey(&mut self, request: Request) -> usize {
        match request {
            Request::Set(Direction::ToServer, fault) => self.to_server = fault,
            Request::Set(Direction::ToClient, fault) => self.to_client = fault,
            Request::Cut | Request::End => {
                for connection in self.connections.drain(..) {
                    connection.reset();
                }
            }
            Request::Strand => {
                // What the client has sent already is the proxy's to keep.
                self.read();
                for connection in &mut self.connections {
                    connection.strand();
                }
                return self.bytes(Direction::ToServer);
            }
            Request::DeliverLate => {
                let stranded = self.connections.iter_mut().filter(|c| c.to_server.is_held);
                return stranded
                    .map(|connection| {
                        connection.to_server.is_held = false;
                        connection.to_server.bytes()
                    })
                    .sum();
            }
            Request::HeldBytes(direction) => {
                self.read();
                return self.bytes(direction);
            }
            Request::Crash => {
                self.read();
                let forgotten = self.connections.iter().map(|c| c.cache.held.len()).sum();
                for connection in self.connections.drain(..) {
                    connection.reset();
                }
                return forgotten;
            }
        }
        0
    }

    fn bytes(&self, direction: Direction) -> usize {
        let of = |connection: &Connection| match direction {
            Direction::ToServer => connection.to_server.bytes(),
            Direction::ToClient => connection.to_client.bytes(),
        };
        self.connections.iter().map(of).sum()
    }

    fn accept(&mut self) {
        while self.to_server != Fault::BlackHole
            && let Ok((client, _)) = self.listener.accept()
        {
            match TcpStream::connect_timeout(&self.server, CONNECT_WITHIN) {
                Ok(server) => self.connections.extend(Connection::new(client, server)),
                Err(_) => reset(client),
            }
        }
    }

    fn read(&mut self) {
        for index in 0..self.connections.len() {
            let Some(connection) = self.connections.get_mut(index) else {
                continue;
            };
            let from_client = connection.read_client();
            let from_server = connection.read_server();
            if let Some(bytes) = from_client {
                self.take_requests(index, bytes);
            }
            if let Some(bytes) = from_server {
                self.take_answers(index, bytes);
            }
        }
    }

    fn take_requests(&mut self, index: usize, bytes: Vec<u8>) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        match &self.protocol {
            None => connection.to_server.push(bytes, self.to_server, &mut self.seed),
            Some(protocol) => {
                let requests = connection.cache.requests(protocol.as_ref(), &bytes);
                for request in requests {
                    self.take_request(index, request);
                }
            }
        }
    }

    fn take_answers(&mut self, index: usize, bytes: Vec<u8>) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let bytes = match &self.protocol {
            None => bytes,
            Some(protocol) => connection.cache.answers(protocol.as_ref(), &bytes),
        };
        connection.to_client.push(bytes, self.to_client, &mut self.seed);
    }

    /// What the cache does with one request: acknowledge and hold it, pass it on, or first pass on what it needs.
    fn take_request(&mut self, index: usize, request: Vec<u8>) {
        let Some(protocol) = &self.protocol else {
            return;
        };
        let kind = protocol.kind(&request);
        let depends = |held: &Vec<u8>| kind == Kind::Flush || protocol.depends(&request, held);
        let needs_all =
            kind != Kind::Unstable && self.connections.iter().any(|c| c.cache.held.iter().any(depends));
        if needs_all {
            for connection in &mut self.connections {
                let held = connection.cache.write_back(protocol.as_ref());
                connection.to_server.push(held, self.to_server, &mut self.seed);
            }
        }
        let is_writing_back = self.connections.iter().any(|c| !c.cache.awaited.is_empty());
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        if !connection.cache.waiting.is_empty() || (is_writing_back && kind != Kind::Unstable) {
            connection.cache.waiting.push_back(request);
        } else if kind == Kind::Unstable {
            let answer = protocol.acknowledgement(&request);
            connection.cache.held.push(request);
            connection.to_client.push(answer, self.to_client, &mut self.seed);
        } else {
            connection.to_server.push(request, self.to_server, &mut self.seed);
        }
    }

    /// Lets go on what waited for writes that are with the server now.
    fn release(&mut self) {
        if self.connections.iter().any(|c| !c.cache.awaited.is_empty()) {
            return;
        }
        for index in 0..self.connections.len() {
            let Some(connection) = self.connections.get_mut(index) else {
                continue;
            };
            let mut waiting = std::mem::take(&mut connection.cache.waiting);
            // What the first one waited for has happened; what came after it is looked at anew.
            if let Some(first) = waiting.pop_front() {
                connection.to_server.push(first, self.to_server, &mut self.seed);
            }
            for request in waiting {
                self.take_request(index, request);
            }
        }
    }

    /// Passes on all that may pass, and drops the connections that are through.
    fn pass(&mut self) {
        for connection in &mut self.connections {
            let to_server = connection
                .to_server
                .pass(&mut &connection.server, &mut self.to_server);
            let to_client = match &connection.client {
                Some(client) => connection.to_client.pass(&mut &*client, &mut self.to_client),
                None => {
                    connection.to_client.clear();
                    Ok(Passed::All)
                }
            };
            for (passed, fault) in [(to_server, &mut self.to_server), (to_client, &mut self.to_client)] {
                match passed {
                    Ok(Passed::All) => {}
                    Ok(Passed::Close) => {
                        *fault = Fault::None;
                        connection.is_broken = true;
                    }
                    Err(_) => connection.is_broken = true,
                }
            }
            connection.pass_ends(self.to_server, self.to_client);
        }
        self.connections.retain(|connection| !connection.is_through());
    }
}
