//! What two monitors say to each other: frames over a connection that is checked already.
//!
//! ```text
//!   kind (1 byte)  zeros (3)  length of the body (4, little endian)  body
//! ```
//!
//! Each side knows at each moment which kinds it waits for; whatever else comes ends the migration.

use std::io::{self, BufRead, IoSlice, Read, Write};

use super::disks::{BLOCKS_HEAD_BYTES, HOLES_BYTES};
use super::postcopy::absent::ABSENT_BYTES_MAX;
use super::tls::ended;

/// The version of what is said. One more than before whenever a frame changes.
pub const PROTOCOL_VERSION: u32 = 4;
/// The oldest version that is still taken.
pub const PROTOCOL_VERSION_MIN: u32 = 1;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The source says what it would send.
    Hello,
    /// The target will take it.
    Ready,
    /// The target will not, or could not; why, line by line.
    Refused,
    /// Pages that lie one behind the other.
    Pages,
    /// Pages of zeros that lie one behind the other.
    Zeros,
    /// A round is sent.
    Mark,
    /// The target has all of it.
    Reached,
    /// The guest stands still, and this is all of it but its memory.
    State,
    /// The target has all it needs.
    Loaded,
    /// The source will do nothing more, unless it wins the opposing step of the leases.
    Go,
    /// The guest runs at the target.
    Running,
    /// A further connection of a migration begins; it carries pages.
    Join,
    /// It is one.
    Joined,
    /// Pages that lie one behind the other, made smaller.
    Packed,
    /// A part of a disk that goes along.
    Blocks,
    /// A part of it that is zeros.
    Holes,
    /// Pages that the target does not have.
    Absent,
    /// A connection by which the rest of the memory is fetched.
    Rejoin,
    /// A page that somebody waits for at the target.
    Want,
    /// The target has all of the memory.
    Whole,
}

impl Kind {
    /// All of them: tables over every message come from this.
    pub const ALL: [Self; 20] = [
        Self::Hello,
        Self::Ready,
        Self::Refused,
        Self::Pages,
        Self::Zeros,
        Self::Mark,
        Self::Reached,
        Self::State,
        Self::Loaded,
        Self::Go,
        Self::Running,
        Self::Join,
        Self::Joined,
        Self::Packed,
        Self::Blocks,
        Self::Holes,
        Self::Absent,
        Self::Rejoin,
        Self::Want,
        Self::Whole,
    ];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Ready => "ready",
            Self::Refused => "refused",
            Self::Pages => "pages",
            Self::Zeros => "zeros",
            Self::Mark => "mark",
            Self::Reached => "reached",
            Self::State => "state",
            Self::Loaded => "loaded",
            Self::Go => "go",
            Self::Running => "running",
            Self::Join => "join",
            Self::Joined => "joined",
            Self::Packed => "packed",
            Self::Blocks => "blocks",
            Self::Holes => "holes",
            Self::Absent => "absent",
            Self::Rejoin => "rejoin",
            Self::Want => "want",
            Self::Whole => "whole",
        }
    }

    /// The number that stands for it.
    pub fn code(self) -> u8 {
        match self {
            Self::Hello => 1,
            Self::Ready => 2,
            Self::Refused => 3,
            Self::Pages => 4,
            Self::Zeros => 5,
            Self::Mark => 6,
            Self::Reached => 7,
            Self::State => 8,
            Self::Loaded => 9,
            Self::Go => 10,
            Self::Running => 11,
            Self::Join => 12,
            Self::Joined => 13,
            Self::Packed => 14,
            Self::Blocks => 15,
            Self::Holes => 16,
            Self::Absent => 20,
            Self::Rejoin => 21,
            Self::Want => 22,
            Self::Whole => 23,
        }
    }

    /// Longest body, in bytes.
    pub fn body_bytes_max(self) -> usize {
        match self {
            Self::Hello => 2 << 20,
            Self::Refused => 64 << 10,
            Self::Pages => 8 + PAGES_BYTES_MAX,
            Self::Zeros => 16,
            // It is sent only if it is less than the pages are.
            Self::Packed => 16 + PAGES_BYTES_MAX,
            Self::Blocks => BLOCKS_HEAD_BYTES + PAGES_BYTES_MAX,
            Self::Holes => HOLES_BYTES,
            Self::Absent => ABSENT_BYTES_MAX,
            Self::Rejoin => 64,
            Self::Want => 8,
            Self::State => crate::state::STATE_BYTES_MAX,
            Self::Ready | Self::Join => 64,
            Self::Mark
            | Self::Reached
            | Self::Loaded
            | Self::Go
            | Self::Running
            | Self::Joined
            | Self::Whole => 0,
        }
    }

    /// The kind that a number stands for.
    pub fn of(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

/// Most bytes of pages, or of a disk, in one frame.
pub const PAGES_BYTES_MAX: usize = 256 << 10;

/// What stands before each body.
pub const HEADER_BYTES: usize = 8;

/// Why the other side cannot be talked to any more.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum WireError {
    #[error("the connection has ended: the other side is gone, or does not answer")]
    Io(#[from] io::Error),
    #[error("what came is no message of a migration: it begins with {0:02x?}")]
    Header([u8; HEADER_BYTES]),
    #[error("a message {kind:?} of {len_bytes} bytes is longer than any")]
    Long { kind: Kind, len_bytes: usize },
    #[error("a message {found:?} came where it has no place")]
    Unexpected { found: Kind },
}

/// One end of a connection.
#[derive(Debug)]
pub struct Wire<S> {
    stream: S,
    body: Vec<u8>,
    sent_bytes: u64,
}

impl<S: BufRead + Write> Wire<S> {
    /// An end of `stream`.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            body: Vec::new(),
            sent_bytes: 0,
        }
    }

    /// Sends a frame whose body is `parts`, one behind the other.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    ///
    /// # Panics
    ///
    /// When it is longer than its kind may be: that is the caller's own.
    pub fn send(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), WireError> {
        let len_bytes: usize = parts.iter().map(|part| part.len()).sum();
        assert!(
            len_bytes <= kind.body_bytes_max(),
            "a message of a kind has a limit"
        );
        let length = u32::try_from(len_bytes).expect("the limits are far below that");
        let mut header = [kind.code(), 0, 0, 0, 0, 0, 0, 0];
        let (_, last) = header.split_at_mut(HEADER_BYTES - 4);
        last.copy_from_slice(&length.to_le_bytes());
        self.sent_bytes += (HEADER_BYTES + len_bytes) as u64;
        // In one, or each part would travel in a record of its own.
        let mut slices = vec![IoSlice::new(&header)];
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        let mut rest = slices.as_mut_slice();
        while !rest.is_empty() {
            match self.stream.write_vectored(rest) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(written) => IoSlice::advance_slices(&mut rest, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ended(error).into()),
            }
        }
        Ok(())
    }

    /// How many bytes of frames were sent.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Has everything on its way that was sent.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub fn flush(&mut self) -> Result<(), WireError> {
        Ok(self.stream.flush().map_err(ended)?)
    }

    /// The next frame.
    ///
    /// # Errors
    ///
    /// When the connection has ended, or what came is no frame.
    pub fn receive(&mut self) -> Result<(Kind, &[u8]), WireError> {
        let (kind, len_bytes) = self.receive_head()?;
        Ok((kind, self.receive_body(len_bytes)?))
    }

    /// A body of so many bytes.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub fn receive_body(&mut self, len_bytes: usize) -> Result<&[u8], WireError> {
        self.body.clear();
        // As much as really comes, not as much as is promised.
        let mut rest = (&mut self.stream).take(len_bytes as u64);
        rest.read_to_end(&mut self.body).map_err(ended)?;
        if self.body.len() < len_bytes {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(&self.body)
    }

    /// What the next frame is, and how long its body, which is to be read to its end before the next one.
    ///
    /// # Errors
    ///
    /// As [`Self::receive`].
    pub fn receive_head(&mut self) -> Result<(Kind, usize), WireError> {
        let header: [u8; HEADER_BYTES] = self.receive_array()?;
        let [code, 0, 0, 0, length @ ..] = header else {
            return Err(WireError::Header(header));
        };
        let kind = Kind::of(code).ok_or(WireError::Header(header))?;
        let len_bytes = usize::try_from(u32::from_le_bytes(length)).expect("this is a 64-bit monitor");
        if len_bytes > kind.body_bytes_max() {
            return Err(WireError::Long { kind, len_bytes });
        }
        Ok((kind, len_bytes))
    }

    /// Reads so much of a body.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub fn receive_array<const LEN_BYTES: usize>(&mut self) -> Result<[u8; LEN_BYTES], WireError> {
        let mut bytes = [0; LEN_BYTES];
        self.stream.read_exact(&mut bytes).map_err(ended)?;
        Ok(bytes)
    }

    /// Reads so much of a body: `take` is given one piece after the other, as they lie in the stream's own buffer.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub fn receive_pieces(&mut self, len_bytes: usize, mut take: impl FnMut(&[u8])) -> Result<(), WireError> {
        let mut left = len_bytes;
        while left > 0 {
            let there = match self.stream.fill_buf() {
                Ok(there) => there,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(ended(error).into()),
            };
            let piece = there.get(..left).unwrap_or(there);
            if piece.is_empty() {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            take(piece);
            let len_bytes = piece.len();
            self.stream.consume(len_bytes);
            left -= len_bytes;
        }
        Ok(())
    }

    /// The stream itself, to look at.
    pub fn stream_ref(&self) -> &S {
        &self.stream
    }

    /// The stream itself.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_kind_of_message_arrives_as_it_was_sent() {
        let mut wire = Wire::new(Cursor::new(Vec::new()));
        let body = |kind: Kind| vec![kind.code(); kind.body_bytes_max().min(1000)];
        for kind in Kind::ALL {
            let body = body(kind);
            let (head, tail) = body.split_at(body.len() / 3);
            wire.send(kind, &[head, tail]).unwrap();
        }
        wire.stream().set_position(0);
        for kind in Kind::ALL {
            assert_eq!(wire.receive().unwrap(), (kind, &body(kind)[..]));
        }
        assert!(matches!(wire.receive(), Err(WireError::Io(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_are_more_than_a_frame_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut wire = Wire::new(Cursor::new(bytes.clone()));
            if let Ok((kind, body)) = wire.receive() {
                prop_assert_eq!(bytes.first(), Some(&kind.code()));
                prop_assert!(body.len() <= bytes.len() - HEADER_BYTES);
            }
        }
    }

    #[test]
    fn a_promise_of_more_than_comes_costs_no_memory() {
        let mut wire = Wire::new(Cursor::new(vec![Kind::State.code(), 0, 0, 0, 0, 0, 0, 11]));
        assert!(matches!(wire.receive(), Err(WireError::Io(_))));
        assert!(wire.body.capacity() < 1 << 20);
        let mut wire = Wire::new(Cursor::new(vec![Kind::Go.code(), 0, 0, 0, 1, 0, 0, 0, 7]));
        assert!(matches!(wire.receive(), Err(WireError::Long { .. })));
    }
}
