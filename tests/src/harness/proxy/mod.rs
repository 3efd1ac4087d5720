//! A TCP proxy that does on command to a connection what networks and servers do to it by chance.
//!
//! ```text
//! client ──► [to the server: its fault] ──► [volatile cache, if any] ──► server
//!        ◄── [to the client: its fault] ◄──                          ◄──
//! ```
//!
//! A proxy is one thread; each command has taken effect when its call returns. It lives in the network namespace
//! of whoever starts it. A proxy that knows the [`Protocol`] has traps for single messages; in *volatile* mode it also plays
//! the server's cache.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::Outcome;
use crate::seed::Seed;

mod connection;
mod lane;
mod protocol;
mod relay;
mod trap;
mod volatile;

pub use protocol::{Damage, Kind, Protocol, Step};
use relay::{Knowledge, Relay};
pub use trap::{Then, Trap};

/// A running proxy. Dropping it resets every connection and ends its thread.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    orders: SyncSender<Order>,
    bell: UnixStream,
    thread: Option<JoinHandle<()>>,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What the client sends.
    ToServer,
    /// What the server answers.
    ToClient,
}

/// What happens to the bytes of one direction, on every connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: they pass at once.
    None,
    /// They wait, as does a connection that is opened meanwhile; nobody is told.
    BlackHole,
    /// Each piece passes after a time that the seed chooses; the order is kept.
    Delay {
        /// At least so long.
        least: Duration,
        /// At most so long.
        most: Duration,
    },
    /// So many bytes pass in a second.
    Rate {
        /// How many.
        bytes_per_second: u64,
    },
    /// After so many more bytes the connection that carried the last of them is closed on both sides. Once.
    CloseAfter {
        /// How many still pass.
        bytes: u64,
    },
    /// After so many more bytes, the bits of one are flipped. Once.
    Corrupt {
        /// How many pass before it.
        bytes: u64,
    },
}

/// What the thread is asked to do.
#[derive(Clone, Copy, Debug)]
enum Request {
    Set(Direction, Fault),
    Cut,
    Strand,
    DeliverLate,
    HeldBytes(Direction),
    Lay(Trap),
    Waiting,
    Crash,
    End,
}

/// A request, and where its answer goes.
type Order = (Request, SyncSender<usize>);

impl Proxy {
    /// Listens on a free port of the address, and connects to the server for each client.
    ///
    /// # Errors
    ///
    /// When it cannot listen there.
    pub fn start(listen: std::net::IpAddr, server: SocketAddr, seed: Seed) -> Outcome<Self> {
        Self::spawn(listen, server, seed, Knowledge::Nothing)
    }

    /// Has `visit` go to the server itself, and by a proxy whose clients come by IPv6; it is told where the host has no such
    /// loopback.
    ///
    /// # Errors
    ///
    /// As `visit`.
    pub fn both_ways(
        server: SocketAddr,
        seed: Seed,
        mut visit: impl FnMut(SocketAddr) -> Outcome,
    ) -> Outcome {
        visit(server)?;
        match Self::start(std::net::Ipv6Addr::LOCALHOST.into(), server, seed) {
            Ok(proxy) => visit(proxy.address()),
            Err(error) => {
                println!("not by IPv6: {}", error.message().unwrap_or("failed"));
                Ok(())
            }
        }
    }

    /// As [`Self::start`], with a protocol that it knows: messages pass whole, and [`Proxy::lay`] works.
    ///
    /// # Errors
    ///
    /// When it cannot listen there.
    pub fn knowing(
        listen: std::net::IpAddr,
        server: SocketAddr,
        seed: Seed,
        protocol: impl Protocol + 'static,
    ) -> Outcome<Self> {
        Self::spawn(listen, server, seed, Knowledge::Messages(Box::new(protocol)))
    }

    /// The same in volatile mode: it acknowledges unstable writes itself and holds them back until a flush, or for
    /// ever. A protocol whose sessions do not let it has another way to lose them in a crash.
    ///
    /// # Errors
    ///
    /// When it cannot listen there.
    pub fn volatile(
        listen: std::net::IpAddr,
        server: SocketAddr,
        seed: Seed,
        protocol: impl Protocol + 'static,
    ) -> Outcome<Self> {
        Self::spawn(listen, server, seed, Knowledge::Cache(Box::new(protocol)))
    }

    fn spawn(
        listen: std::net::IpAddr,
        server: SocketAddr,
        seed: Seed,
        knowledge: Knowledge,
    ) -> Outcome<Self> {
        let listener = TcpListener::bind((listen, 0)).map_err(|e| format!("proxy on {listen}: {e}"))?;
        let address = listener.local_addr()?;
        let (orders, receiver): (SyncSender<Order>, Receiver<Order>) = sync_channel(1);
        let (bell, ear) = UnixStream::pair()?;
        let mut relay = Relay::new((listener, server), (receiver, ear), seed, knowledge)?;
        let thread = std::thread::Builder::new()
            .name("proxy".into())
            .spawn(move || relay.run())?;
        Ok(Self {
            address,
            orders,
            bell,
            thread: Some(thread),
        })
    }

    /// Where clients connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets the fault of one direction, for all that has not passed yet.
    ///
    /// # Errors
    ///
    /// When the proxy's thread is gone.
    pub fn set(&self, direction: Direction, fault: Fault) -> Outcome {
        self.ask(Request::Set(direction, fault)).map(drop)
    }

    /// Resets every connection on both sides (RST); what is on its way is lost.
    ///
    /// # Errors
    ///
    /// When the proxy's thread is gone.
    pub fn cut(&self) -> Outcome {
        self.ask(Request::Cut).map(drop)
    }

    /// Resets every connection on the client's side only, and keeps the server's with the bytes that have not passed
    /// yet; returns how many. Hold some back by [`Fault::BlackHole`] first.
    ///
    /// # Errors
    ///
    /// When the proxy's thread is gone.
    pub fn strand(&self) -> Outcome<usize> {
        self.ask(Request::Strand)
    }

    /// Sends the server what [`Proxy::strand`] kept, on the old connections; returns how many bytes.
    ///
    /// # Errors
    ///
    /// When the proxy's thread is gone.
    pub fn deliver_late(&self) -> Outcome<usize> {
        self.ask(Request::DeliverLate)
    }

    /// How many bytes have come and not passed.
    ///
    /// # Errors
    ///
    /// When the proxy's thread is gone.
    pub fn held_bytes(&self, direction: Direction) -> Outcome<usize> {
        self.ask(Request::HeldBytes(direction))
    }

    /// Lays a trap for the next message of its kind, in place of one that was laid before.
    ///
    /// # Errors
    ///
    /// When the proxy's thread is gone.
    pub fn lay(&self, trap: Trap) -> Outcome {
        self.ask(Request::Lay(trap)).map(drop)
    }

    /// Waits until the trap is sprung.
    ///
    /// # Errors
    ///
    /// When no such message comes in time, or the proxy's thread is gone.
    pub fn wait_sprung(&self, limit: Duration) -> Outcome {
        let deadline = std::time::Instant::now() + limit;
        while self.ask(Request::Waiting)? > 0 {
            crate::ensure!(
                std::time::Instant::now() < deadline,
                "nothing fell into the trap within {limit:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// What a power failure does to a volatile cache: resets every connection and forgets each write that was
    /// acknowledged and not flushed; returns how many.
    ///
    /// # Errors
    ///
    /// When the proxy's thread is gone.
    pub fn crash(&self) -> Outcome<usize> {
        self.ask(Request::Crash)
    }

    fn ask(&self, request: Request) -> Outcome<usize> {
        let (answer, answered) = sync_channel(1);
        let gone = |()| "the proxy's thread is gone";
        self.orders.send((request, answer)).map_err(|_| gone(()))?;
        (&self.bell).write_all(&[0])?;
        Ok(answered.recv().map_err(|_| gone(()))?)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Both fail only when the thread is gone already, which is what is wanted.
        drop(self.ask(Request::End));
        drop(self.thread.take().map(JoinHandle::join));
    }
}

#[cfg(test)]
mod tests;
