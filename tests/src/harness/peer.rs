//! Whom a guest talks to, by TCP or by the socket of its vsock device: one connection, on a thread.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread::{self, JoinHandle};

use crate::Outcome;

/// What it does with its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Reads until the end.
    Takes,
    /// Writes so many bytes, and ends.
    Gives(usize),
    /// Writes back whatever it reads.
    Answers,
}

/// A listener that serves whoever comes first.
#[derive(Debug)]
pub struct Peer {
    port: u16,
    serves: JoinHandle<std::io::Result<usize>>,
}

/// What is read and written at a time.
const PIECE_BYTES: usize = 256 << 10;

impl Peer {
    /// Listens at `address`, in the network of the thread that calls.
    ///
    /// # Errors
    ///
    /// When that is not possible.
    pub fn new(address: IpAddr, part: Part) -> Outcome<Self> {
        let listener = TcpListener::bind((address, 0))?;
        let port = listener.local_addr()?.port();
        let serves = thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            serve(stream, part)
        });
        Ok(Self { port, serves })
    }

    /// Listens at `port` of the host for the guest whose device has this socket.
    ///
    /// # Errors
    ///
    /// When that is not possible.
    pub fn of_device(socket: &Path, port: u16, part: Part) -> Outcome<Self> {
        let listener = UnixListener::bind(format!("{}_{port}", socket.display()))?;
        let serves = thread::spawn(move || serve(listener.accept()?.0, part));
        Ok(Self { port, serves })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Waits for its end; returns how many bytes it has read, or written if it only does that.
    ///
    /// # Errors
    ///
    /// When the connection broke.
    pub fn ended(self) -> Outcome<usize> {
        let served = self.serves.join().map_err(|_| "a peer panicked")?;
        Ok(served?)
    }
}

fn serve(mut stream: impl Read + Write, part: Part) -> std::io::Result<usize> {
    let mut piece = vec![0xa5; PIECE_BYTES];
    if let Part::Gives(bytes) = part {
        let mut left = bytes;
        while left > 0 {
            left -= stream.write(piece.get(..left.min(PIECE_BYTES)).unwrap_or_default())?;
        }
        return Ok(bytes);
    }
    let mut total = 0;
    loop {
        let read = stream.read(&mut piece)?;
        if read == 0 {
            return Ok(total);
        }
        total += read;
        if part == Part::Answers {
            stream.write_all(piece.get(..read).unwrap_or_default())?;
        }
    }
}
