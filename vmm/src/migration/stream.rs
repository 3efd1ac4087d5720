//! A connection that was checked, with as few calls of the kernel as there can be.

use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::net::TcpStream;

use rustls::Connection;

use super::tls::{ClientStream, ServerStream};

/// One end of it. What is written goes on its way when there is much of it, or by [`Write::flush`].
#[derive(Debug)]
pub struct Stream {
    tls: Connection,
    /// TLS reads records in small pieces: these come from here.
    socket: BufReader<TcpStream>,
    /// What was written and is not on its way.
    waiting_bytes: usize,
    /// What has come and was not read.
    unread_bytes: usize,
}

/// How much is read or sent at once: more than fits into the processor's nearer caches would be slower.
const PIECE_BYTES: usize = 256 << 10;

impl Stream {
    fn new(mut tls: Connection, socket: TcpStream) -> Self {
        // The limit is ours: `waiting_bytes`.
        tls.set_buffer_limit(None);
        Self {
            tls,
            socket: BufReader::with_capacity(PIECE_BYTES, socket),
            waiting_bytes: 0,
            unread_bytes: 0,
        }
    }

    /// The socket below.
    pub fn socket(&self) -> &TcpStream {
        self.socket.get_ref()
    }

    /// Whether something has come that was not read: then the socket may stay silent although there is more.
    pub fn has_unread(&self) -> bool {
        self.unread_bytes > 0 || !self.socket.buffer().is_empty()
    }

    /// Says that nothing more comes from this end; the next [`Write::flush`] sends that.
    pub fn close(&mut self) {
        self.tls.send_close_notify();
    }

    fn send(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(self.socket.get_mut()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.waiting_bytes = 0;
        Ok(())
    }

    /// Takes in what comes next. Says whether anything did.
    fn take_in(&mut self) -> io::Result<bool> {
        match self.tls.read_tls(&mut self.socket) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) => return Err(error),
        }
        match self.tls.process_new_packets() {
            Ok(state) => {
                self.unread_bytes = state.plaintext_bytes_to_read();
                Ok(true)
            }
            Err(error) => {
                // The other side is told why, if it still listens.
                let _ = self.send();
                Err(io::Error::new(io::ErrorKind::InvalidData, error))
            }
        }
    }
}

impl From<ClientStream> for Stream {
    fn from(stream: ClientStream) -> Self {
        Self::new(stream.conn.into(), stream.sock)
    }
}

impl From<ServerStream> for Stream {
    fn from(stream: ServerStream) -> Self {
        Self::new(stream.conn.into(), stream.sock)
    }
}

impl BufRead for Stream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.unread_bytes == 0 {
            // It may have come with the greeting.
            self.unread_bytes = match self.tls.process_new_packets() {
                Ok(state) => state.plaintext_bytes_to_read(),
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            };
        }
        while self.unread_bytes == 0 {
            if !self.take_in()? {
                return Ok(&[]);
            }
        }
        self.tls.reader().into_first_chunk()
    }

    fn consume(&mut self, len_bytes: usize) {
        self.tls.reader().consume(len_bytes);
        self.unread_bytes = self.unread_bytes.saturating_sub(len_bytes);
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let there = self.fill_buf()?;
        let len_bytes = there.len().min(bytes.len());
        let (part, whole) = (there.get(..len_bytes), bytes.get_mut(..len_bytes));
        if let (Some(part), Some(whole)) = (part, whole) {
            whole.copy_from_slice(part);
        }
        self.consume(len_bytes);
        Ok(len_bytes)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let written = self.tls.writer().write_vectored(slices)?;
        self.waiting_bytes += written;
        if self.waiting_bytes >= PIECE_BYTES {
            self.send()?;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}
