//! Record marking: where a message on a TCP connection ends (RFC 5531, 11).

use crate::nfs::xdr::{Reserved, Writer};

/// Length of a mark, in bytes.
pub const RECORD_MARK_BYTES: usize = 4;

const LAST: u32 = 1 << 31;

/// What precedes a fragment of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordMark {
    /// Whether the record ends with the fragment.
    pub is_last: bool,
    /// Length of the fragment, in bytes.
    pub fragment_bytes: usize,
}

impl RecordMark {
    /// Reads a mark in a record that may have `room_bytes` more.
    ///
    /// # Errors
    ///
    /// When it is of a fragment that is longer, or of one that is empty and not the last: such could go on for ever.
    pub fn parse(bytes: [u8; RECORD_MARK_BYTES], room_bytes: usize) -> Result<Self, RecordError> {
        let word = u32::from_be_bytes(bytes);
        let is_last = word & LAST != 0;
        let fragment_bytes = usize::try_from(word & !LAST).unwrap_or(usize::MAX);
        if fragment_bytes > room_bytes {
            return Err(RecordError::Long {
                fragment_bytes,
                room_bytes,
            });
        }
        if fragment_bytes == 0 && !is_last {
            return Err(RecordError::Empty);
        }
        Ok(Self {
            is_last,
            fragment_bytes,
        })
    }

    /// As it stands on the wire.
    ///
    /// # Panics
    ///
    /// When the fragment is longer than 2 GiB: nothing that is sent is.
    pub fn wire(self) -> [u8; RECORD_MARK_BYTES] {
        self.word().to_be_bytes()
    }

    fn word(self) -> u32 {
        let bytes = u32::try_from(self.fragment_bytes).expect("no record is so long");
        assert!(bytes & LAST == 0, "no record is so long");
        if self.is_last { bytes | LAST } else { bytes }
    }
}

/// Why a record is not read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It is longer than anything that was asked for.
    #[error("an RPC record with {fragment_bytes} bytes where at most {room_bytes} are expected")]
    Long {
        /// Length of the fragment.
        fragment_bytes: usize,
        /// What it could have had.
        room_bytes: usize,
    },
    /// It does not go on.
    #[error("an RPC record with a fragment that is empty and not its last")]
    Empty,
}

/// A record that is being written, in one fragment.
#[derive(Debug)]
pub struct Record {
    mark: Reserved,
}

impl Record {
    /// Begins one: its message is to be written behind.
    pub fn begin(writer: &mut Writer) -> Self {
        Self {
            mark: writer.reserve(),
        }
    }

    /// Ends it, with `bytes_behind` that are sent behind what the writer has, and returns how long its message is
    /// with them.
    ///
    /// # Panics
    ///
    /// When it is longer than 2 GiB: nothing that is sent is.
    pub fn finish(self, writer: &mut Writer, bytes_behind: usize) -> usize {
        let fragment_bytes = writer.bytes_behind(&self.mark) + bytes_behind;
        let mark = RecordMark {
            is_last: true,
            fragment_bytes,
        };
        writer.fill(self.mark, mark.word());
        fragment_bytes
    }
}
