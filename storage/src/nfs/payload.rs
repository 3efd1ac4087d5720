//! What replies to a READ have before their data, whichever version they are of.

use std::fmt;

use super::xdr::XdrError;
use super::{v3, v4};

/// What the reply to a READ has before its data, in one version of NFS.
pub(super) trait Payload: Copy + fmt::Debug {
    /// Its length is at most this, in bytes.
    const PREFIX_BYTES_MAX: usize;

    /// Reads the first bytes of a record: which call it answers, and what it has before its data, if it has some. `None` if it
    /// takes more of them.
    fn of_prefix(bytes: &[u8]) -> Result<Option<(u32, Option<Self>)>, XdrError>;

    /// How many data there are, as the server says.
    fn data_len(&self) -> u32;

    /// How many bytes of the record stand before them.
    fn prefix_bytes(&self) -> usize;
}

impl Payload for v4::ReadPayload {
    const PREFIX_BYTES_MAX: usize = v4::PREFIX_BYTES_MAX;

    fn of_prefix(bytes: &[u8]) -> Result<Option<(u32, Option<Self>)>, XdrError> {
        Ok(v4::read_prefix(bytes)?.map(|prefix| (prefix.xid, prefix.payload)))
    }

    fn data_len(&self) -> u32 {
        self.data_len
    }

    fn prefix_bytes(&self) -> usize {
        self.prefix_bytes
    }
}

impl Payload for v3::ReadPayload {
    const PREFIX_BYTES_MAX: usize = v3::PREFIX_BYTES_MAX;

    fn of_prefix(bytes: &[u8]) -> Result<Option<(u32, Option<Self>)>, XdrError> {
        Ok(v3::read_prefix(bytes)?.map(|prefix| (prefix.xid, prefix.payload)))
    }

    fn data_len(&self) -> u32 {
        self.data_len
    }

    fn prefix_bytes(&self) -> usize {
        self.prefix_bytes
    }
}
