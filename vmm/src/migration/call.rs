//! The way from a source to its target: the first connection, and those that join it.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::thread;

use super::join::{Join, Token};
use super::progress::Progress;
use super::send::{SILENCE_MAX, SendError, expect};
use super::stream::Stream;
use super::tls::{Identity, TlsFiles};
use super::wire::{Kind, Wire};

/// Where the target is, and who it has to be.
pub(super) struct Way<'a> {
    to: &'a str,
    /// The name in the certificate of the target.
    name: &'a str,
    identity: Identity,
    /// Every connection is one that is cut when this is given up.
    progress: &'a Progress,
}

impl<'a> Way<'a> {
    /// That to HOST:PORT, whose certificate has `name`, or that of HOST.
    ///
    /// # Errors
    ///
    /// When our own certificates cannot be read.
    pub(super) fn new(
        to: &'a str,
        name: Option<&'a str>,
        tls: &TlsFiles,
        progress: &'a Progress,
    ) -> Result<Self, SendError> {
        let host = to.rsplit_once(':').map_or(to, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        Ok(Self {
            to,
            name: name.unwrap_or(host),
            identity: Identity::read(tls)?,
            progress,
        })
    }

    /// The first connection.
    ///
    /// # Errors
    ///
    /// When nobody is there, or somebody else is.
    pub(super) fn call(&self) -> Result<Wire<Stream>, SendError> {
        let addresses = self
            .to
            .to_socket_addrs()
            .map_err(|source| self.unreachable(source))?;
        let mut outcome = Err(self.unreachable(io::ErrorKind::AddrNotAvailable.into()));
        for address in addresses {
            outcome = self.connect(address);
            if outcome.is_ok() {
                break;
            }
        }
        self.greet(outcome?)
    }

    /// The connections that join `first`, as many as make `streams` with it, all at once.
    ///
    /// # Errors
    ///
    /// When one of them cannot.
    pub(super) fn join(
        &self,
        token: Token,
        streams: u8,
        first: &Wire<Stream>,
    ) -> Result<Vec<Wire<Stream>>, SendError> {
        let address = first.stream_ref().socket().peer_addr();
        let address = address.map_err(|source| self.unreachable(source))?;
        thread::scope(|scope| {
            let joining: Vec<_> = (1..streams)
                .map(|number| {
                    let join = Join { token, number };
                    let thread = thread::Builder::new().name("mover".to_owned());
                    thread.spawn_scoped(scope, move || self.join_one(address, join))
                })
                .collect();
            // Each is waited for, and the first that cannot is told of.
            let joined: Vec<_> = joining
                .into_iter()
                .map(|thread| match thread {
                    Ok(thread) => thread.join().expect("a thread that panics ends the process"),
                    Err(source) => Err(SendError::Host(source)),
                })
                .collect();
            joined.into_iter().collect()
        })
    }

    fn join_one(&self, address: SocketAddr, join: Join) -> Result<Wire<Stream>, SendError> {
        let mut wire = self.greet(self.connect(address)?)?;
        let body = postcard::to_stdvec(&join).expect("plain data can be written");
        wire.send(Kind::Join, &[&body])?;
        expect(&mut wire, Kind::Joined)?;
        Ok(wire)
    }

    fn connect(&self, address: SocketAddr) -> Result<TcpStream, SendError> {
        let socket = TcpStream::connect_timeout(&address, SILENCE_MAX);
        let socket = socket.map_err(|source| self.unreachable(source))?;
        let prepared = socket
            .set_nodelay(true)
            .and_then(|()| socket.set_read_timeout(Some(SILENCE_MAX)))
            .and_then(|()| socket.set_write_timeout(Some(SILENCE_MAX)))
            .and_then(|()| self.progress.goes_by(&socket));
        prepared.map_err(|source| self.unreachable(source))?;
        Ok(socket)
    }

    fn greet(&self, socket: TcpStream) -> Result<Wire<Stream>, SendError> {
        let stream = self.identity.call(socket, self.name)?;
        Ok(Wire::new(Stream::from(stream)))
    }

    fn unreachable(&self, source: io::Error) -> SendError {
        SendError::Connect {
            to: self.to.to_owned(),
            source,
        }
    }
}
