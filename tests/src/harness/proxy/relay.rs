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
use super::protocol::{Kind, Protocol};
use super::trap::{Passage, Then, Trap};
use super::volatile::Waiting;
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
    knowledge: Knowledge,
    trap: Option<Trap>,
    connections: Vec<Connection>,
}

/// What the proxy knows of the bytes that it passes, and does with it.
#[derive(Debug)]
pub(super) enum Knowledge {
    /// They are bytes.
    Nothing,
    /// They are messages.
    Messages(Box<dyn Protocol>),
    /// They are messages, and it plays the server's cache.
    Cache(Box<dyn Protocol>),
}

const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// Without anything to wait for, the thread looks around this often.
const REST: Duration = Duration::from_millis(500);

impl Relay {
    pub(super) fn new(
        (listener, server): (TcpListener, SocketAddr),
        (orders, ear): (Receiver<Order>, UnixStream),
        seed: Seed,
        knowledge: Knowledge,
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
            knowledge,
            trap: None,
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
            self.read();
            self.release();
            self.pass();
            // Last: a client that comes back has left its old connection before.
            self.accept();
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
        if self.may_accept() {
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
                (Some(server.as_fd()), &connection.to_client, &connection.inner),
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
            Request::Lay(trap) => self.trap = Some(trap),
            Request::Waiting => return usize::from(self.trap.is_some()),
            Request::Cut => self.connections.iter_mut().for_each(Connection::cut),
            Request::End => {
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
                let held: usize = self.connections.iter().map(|c| c.cache.held.len()).sum();
                for connection in self.connections.drain(..) {
                    connection.reset();
                }
                return held + self.knowledge.crash();
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

    /// A new session may fence the old one, so what the cache holds of that is with the server first.
    fn may_accept(&self) -> bool {
        let owes_nothing = |c: &Connection| !c.is_left() || c.cache.is_clean();
        self.to_server != Fault::BlackHole && self.connections.iter().all(owes_nothing)
    }

    fn accept(&mut self) {
        while self.may_accept()
            && let Ok((client, _)) = self.listener.accept()
        {
            match TcpStream::connect_timeout(&self.server, CONNECT_WITHIN) {
                Ok(server) => {
                    let protocol = self.knowledge.begin();
                    self.connections.extend(Connection::new(client, server, protocol));
                }
                Err(_) => reset(client),
            }
        }
    }

    fn read(&mut self) {
        for index in 0..self.connections.len() {
            let Some(connection) = self.connections.get_mut(index) else {
                continue;
            };
            if let Some(bytes) = connection.read_client() {
                connection.take_in(Direction::ToServer, &bytes);
            }
            if let Some(bytes) = connection.read_server() {
                connection.take_in(Direction::ToClient, &bytes);
            }
            self.forward(index);
        }
    }

    /// Puts every message that is whole on its way.
    fn forward(&mut self, index: usize) {
        while let Some(request) = self.next_message(index, Direction::ToServer) {
            self.dispatch(index, Direction::ToServer, request);
        }
        while let Some(answer) = self.next_message(index, Direction::ToClient) {
            let connection = self.connections.get_mut(index);
            let answer = match (&self.knowledge, connection) {
                (Knowledge::Cache(_), Some(connection)) => connection.unwrapped(answer),
                _ => Some(answer),
            };
            if let Some(answer) = answer {
                self.dispatch(index, Direction::ToClient, answer);
            }
        }
    }

    fn next_message(&mut self, index: usize, direction: Direction) -> Option<Vec<u8>> {
        self.connections.get_mut(index)?.next_message(direction)
    }

    /// Hands a message to the network, unless it falls into the trap.
    fn dispatch(&mut self, index: usize, direction: Direction, message: Vec<u8>) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let passage = match connection.protocol.as_mut() {
            Some(protocol) => {
                let step = protocol.step(direction, &message);
                protocol.note(direction, &message);
                match self.trap {
                    Some(trap) => trap.meet(direction, message, step, protocol.as_ref()),
                    None => Passage::Free(message),
                }
            }
            None => Passage::Free(message),
        };
        match passage {
            Passage::Free(message) => self.push(index, direction, message),
            Passage::Sprung(then, message) => self.spring(index, direction, then, message),
        }
    }

    /// Lets the trap's fault happen to the message.
    fn spring(&mut self, index: usize, direction: Direction, then: Then, message: Vec<u8>) {
        self.trap = None;
        let half = u64::try_from(message.len() / 2).unwrap_or(u64::MAX);
        let waiting = |c: &Connection| u64::try_from(c.lane(direction).bytes()).unwrap_or(u64::MAX);
        match then {
            Then::Fault(fault) => *self.fault(direction) = fault,
            Then::CloseInside => {
                let before = self.connections.get(index).map_or(0, waiting);
                *self.fault(direction) = Fault::CloseAfter {
                    bytes: before.saturating_add(half),
                };
            }
            Then::Cut => return self.connections.iter_mut().for_each(Connection::cut),
            Then::Swap => {
                if let Some(connection) = self.connections.get_mut(index) {
                    *connection.overtaken(direction) = Some(message);
                }
                return;
            }
            Then::Damage(_) | Then::Twice => {}
        }
        self.push(index, direction, message);
    }

    fn fault(&mut self, direction: Direction) -> &mut Fault {
        match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        }
    }

    fn push(&mut self, index: usize, direction: Direction, message: Vec<u8>) {
        let fault = *self.fault(direction);
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let overtaken = connection.overtaken(direction).take();
        for message in [Some(message), overtaken].into_iter().flatten() {
            let due = due(fault, &mut self.seed);
            connection.lane_mut(direction).push(message, due);
        }
    }

    /// Gives the server, or the cache in front of it, what has passed the network.
    fn deliver(&mut self, index: usize, bytes: Vec<u8>) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        if connection.to_client.has_ended {
            return;
        }
        if !matches!(self.knowledge, Knowledge::Cache(_)) {
            return connection.pass_inside(bytes);
        }
        connection.cache.requests.push(&bytes);
        while let Some(request) = self.connections.get_mut(index).and_then(Connection::next_request) {
            self.take_request(index, request);
        }
    }

    /// What the cache does with one request: acknowledge and hold it, pass it on, or first pass on what it needs.
    fn take_request(&mut self, index: usize, request: Vec<u8>) {
        let is_writing_back = self.is_writing_back();
        let Some(protocol) = self.connections.get(index).and_then(|c| c.protocol.as_deref()) else {
            return;
        };
        let kind = protocol.kind(&request);
        // One connection may keep the order of its own writes; two do not keep that between them.
        let needs = |(holder, connection): (usize, &Connection)| {
            let is_ordered = kind == Kind::Unstable && holder == index && protocol.keeps_order();
            let depends = |held: &Vec<u8>| kind == Kind::Flush || protocol.depends(&request, held);
            !is_ordered && connection.cache.held.iter().any(depends)
        };
        let needs_all = self.connections.iter().enumerate().any(needs);
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let has_to_wait = is_writing_back && (kind != Kind::Unstable || needs_all);
        if has_to_wait || !connection.cache.waiting.is_empty() {
            connection.cache.waiting.push_back(Waiting::Anew(request));
        } else if needs_all {
            connection.cache.waiting.push_back(Waiting::Served(request));
            self.connections.iter_mut().for_each(Connection::write_back);
        } else if kind == Kind::Unstable {
            let answer = connection.protocol.as_mut().map(|p| p.acknowledgement(&request));
            connection.cache.held.push(request);
            self.dispatch(index, Direction::ToClient, answer.unwrap_or_default());
        } else {
            connection.pass_request(request);
        }
    }

    fn is_writing_back(&self) -> bool {
        self.connections.iter().any(|c| !c.cache.awaited.is_empty())
    }

    /// Lets go on what waited for writes that are with the server now.
    fn release(&mut self) {
        for index in 0..self.connections.len() {
            if self.is_writing_back() {
                return;
            }
            let Some(connection) = self.connections.get_mut(index) else {
                continue;
            };
            for waiting in std::mem::take(&mut connection.cache.waiting) {
                match (waiting, self.connections.get_mut(index)) {
                    (Waiting::Served(request), Some(connection)) => connection.pass_request(request),
                    (Waiting::Anew(request) | Waiting::Served(request), _) => {
                        self.take_request(index, request);
                    }
                }
            }
        }
    }

    /// Passes on all that may pass, and drops the connections that are through.
    fn pass(&mut self) {
        self.pass_network();
        self.write_back_lost();
        for connection in &mut self.connections {
            let passed = connection.inner.pass(&mut &connection.server, &mut Fault::None);
            connection.note(passed, &mut Fault::None);
            let passed = match &connection.client {
                Some(client) => connection.to_client.pass(&mut &*client, &mut self.to_client),
                None => {
                    connection.to_client.clear();
                    Ok(Passed::All)
                }
            };
            match passed {
                Ok(_) => connection.note(passed, &mut self.to_client),
                Err(_) => connection.lose_client(),
            }
            connection.pass_ends(self.to_client);
        }
        for connection in self.connections.extract_if(.., |c| c.is_through()) {
            connection.close();
        }
    }

    /// What has passed the network reaches the server, or the cache in front of it.
    fn pass_network(&mut self) {
        for index in 0..self.connections.len() {
            let Some(connection) = self.connections.get_mut(index) else {
                continue;
            };
            if connection.inner.is_open() {
                let mut bytes = Vec::new();
                let passed = connection.to_server.pass(&mut bytes, &mut self.to_server);
                connection.note(passed, &mut self.to_server);
                self.deliver(index, bytes);
            }
            if let Some(connection) = self.connections.get_mut(index) {
                connection.pass_request_end(self.to_server);
            }
        }
    }

    /// A server keeps what it holds when a client goes; here the connection is needed for it, so it is written back.
    fn write_back_lost(&mut self) {
        if let Knowledge::Cache(_) = self.knowledge {
            let left = self.connections.iter_mut().filter(|c| c.is_left());
            left.for_each(Connection::write_back);
        }
    }
}

impl Knowledge {
    /// What is known of a connection that begins.
    fn begin(&self) -> Option<Box<dyn Protocol>> {
        match self {
            Self::Nothing => None,
            Self::Messages(protocol) | Self::Cache(protocol) => Some(protocol.begin()),
        }
    }

    /// What a power failure takes besides what the cache holds.
    fn crash(&mut self) -> usize {
        match self {
            Self::Nothing | Self::Messages(_) => 0,
            Self::Cache(protocol) => protocol.crash(),
        }
    }
}

/// When bytes that come now may pass.
fn due(fault: Fault, seed: &mut Seed) -> Instant {
    let now = Instant::now();
    let Fault::Delay { least, most } = fault else {
        return now;
    };
    let spread = u64::try_from(most.saturating_sub(least).as_micros()).unwrap_or(u64::MAX);
    now + least + Duration::from_micros(seed.below(spread.saturating_add(1).max(1)))
}
