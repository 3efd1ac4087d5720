//! The part of a reply that stands before the data of a READ, so that they can go where they belong without a copy.

use super::Status;
use super::nfs::ReadHead;
use crate::nfs::rpc::{AUTH_BODY_BYTES_MAX, Reply};
use crate::nfs::xdr::{Reader, Xdr, XdrError, padding_bytes};

/// Longest part before the data, in bytes: header with verifier, status, attributes and three numbers.
pub const PREFIX_BYTES_MAX: usize = 6 * 4 + AUTH_BODY_BYTES_MAX + 4 + 4 + 84 + 3 * 4;

/// What is known of a reply to a READ from its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPrefix {
    /// Which call it answers.
    pub xid: u32,
    /// Where the data are. `None`: there are none, and the whole record is to be read as any other.
    pub payload: Option<ReadPayload>,
}

/// Where the data of a READ are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPayload {
    /// Whether the file ends behind them.
    pub eof: bool,
    /// How many there are, in bytes. It is what the server says, and nobody has compared it to what was asked for.
    pub data_len: u32,
    /// How many bytes of the record stand before them.
    pub prefix_bytes: usize,
}

impl ReadPayload {
    /// Length of the record, if it ends as it should: with the data and their padding. `None` if no record is so long.
    pub fn record_bytes(&self) -> Option<usize> {
        let data_len = usize::try_from(self.data_len).ok()?;
        let bytes = self.prefix_bytes.checked_add(data_len)?;
        bytes.checked_add(padding_bytes(data_len))
    }
}

/// Reads the first bytes of a record, behind its mark, that is the reply to a READ. `None` if it takes more of them, of which
/// [`PREFIX_BYTES_MAX`] are always enough. It has to be known that it is: the reply to another call may look the same.
///
/// # Errors
///
/// When they are the first bytes of no such reply, or have something that is too long.
pub fn read_prefix(bytes: &[u8]) -> Result<Option<ReadPrefix>, XdrError> {
    match parse(bytes) {
        Ok(prefix) => Ok(Some(prefix)),
        Err(XdrError::Short) => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse(bytes: &[u8]) -> Result<ReadPrefix, XdrError> {
    let mut reader = Reader::new(bytes);
    let reply = Reply::parse(&mut reader)?;
    let has_data = reply.outcome.is_ok() && Status::read(&mut reader)? == Status::OK;
    let head = has_data.then(|| ReadHead::read(&mut reader)).transpose()?;
    Ok(ReadPrefix {
        xid: reply.xid,
        payload: head.map(|head| ReadPayload {
            eof: head.eof,
            data_len: head.data_len,
            prefix_bytes: reader.read_bytes(),
        }),
    })
}
