//! The part of a reply that stands before the data of a READ, so that they can go where they belong without a copy.

use super::{CompoundReply, MalformedReply, Operation, ReplyError, SequenceResult, Status, TAG_BYTES_MAX};
use crate::nfs::rpc::{AUTH_BODY_BYTES_MAX, Reply};
use crate::nfs::xdr::{Reader, XdrError, padding_bytes};

/// Longest part before the data, in bytes: header with verifier, status, tag and count, and three results.
pub const PREFIX_BYTES_MAX: usize =
    6 * 4 + AUTH_BODY_BYTES_MAX + 3 * 4 + TAG_BYTES_MAX + (2 * 4 + 16 + 5 * 4) + 2 * 4 + (2 * 4 + 2 * 4);

/// What is known of a reply from its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPrefix {
    /// Which call it answers.
    pub xid: u32,
    /// Where the data are. `None`: there are none, or they are no READ's, and the whole record is to be read as any other.
    pub payload: Option<ReadPayload>,
}

/// Where the data of a READ are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPayload {
    /// What the server says to the slot.
    pub sequence: SequenceResult,
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

/// Reads the first bytes of a record, behind its mark, that may be the reply to a compound of SEQUENCE, PUTFH and READ. `None`
/// if it takes more of them, of which [`PREFIX_BYTES_MAX`] are always enough.
///
/// # Errors
///
/// When they are the first bytes of no reply, or have something that is too long.
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
    let payload = match reply.outcome {
        Ok(()) => payload(reader)?,
        Err(_) => None,
    };
    Ok(ReadPrefix {
        xid: reply.xid,
        payload,
    })
}

fn payload(reader: Reader<'_>) -> Result<Option<ReadPayload>, XdrError> {
    /// SEQUENCE, PUTFH and READ.
    const RESULTS: usize = 3;
    let mut reply = CompoundReply::of_reader(reader)?;
    if reply.status() != Status::OK || reply.left() != RESULTS {
        return Ok(None);
    }
    match results(&mut reply) {
        Ok(payload) => Ok(Some(payload)),
        Err(ReplyError::Malformed(MalformedReply::Xdr(error))) => Err(error),
        // Something else was asked for, and what is wrong with it shows when it is read for that.
        Err(_) => Ok(None),
    }
}

fn results(reply: &mut CompoundReply<'_>) -> Result<ReadPayload, ReplyError> {
    let sequence = reply.sequence()?;
    reply.put_fh()?;
    reply.begin(Operation::READ)?;
    let (eof, data_len) = (reply.wire()?, reply.wire()?);
    Ok(ReadPayload {
        sequence,
        eof,
        data_len,
        prefix_bytes: reply.reader().read_bytes(),
    })
}
