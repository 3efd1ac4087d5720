//! Whom a guest talks to by TCP: one connection, on a thread.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
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
    address: SocketAddr,
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
        Ok(Self {
            address: listener.local_addr()?,
            serves: thread::spawn(move || serve(&listener, part)),
        })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.address.port()
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

fn serve(listener: &TcpListener, part: Part) -> std::io::Result<usize> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut piece = vec![0xa5; PIECE_BYTES];
    match part {
        Part::Takes => pass(&mut stream, &mut piece, |_, _| Ok(())),
        Part::Answers => pass(&mut stream, &mut piece, |stream, bytes| stream.write_all(bytes)),
        Part::Gives(bytes) => {
            let mut left = bytes;
            while left > 0 {
                left -= stream.write(piece.get(..left.min(PIECE_BYTES)).unwrap_or_default())?;
            }
            Ok(bytes)
        }
    }
}

fn pass(
    stream: &mut TcpStream,
    piece: &mut [u8],
    then: impl Fn(&mut TcpStream, &[u8]) -> std::io::Result<()>,
) -> std::io::Result<usize> {
    let mut total = 0;
    loop {
        let read = stream.read(piece)?;
        if read == 0 {
            return Ok(total);
        }
        total += read;
        then(stream, piece.get(..read).unwrap_or_default())?;
    }
}
