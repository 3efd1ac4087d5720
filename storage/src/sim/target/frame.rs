//! PDUs in a stream of bytes, with their digests (RFC 7143, 11.2).

use super::negotiation::Digests;
use crate::iscsi::pdu::{BHS_BYTES, Bhs, padding_bytes};

/// What has arrived of a connection.
#[derive(Debug, Default)]
pub(super) struct Frames(Vec<u8>);

/// One PDU.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) bhs: Bhs,
    pub(super) data: Vec<u8>,
}

/// Why the stream ends here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("a data segment of {0} bytes is longer than the target declared to take")]
    TooLong(u32),
    #[error("the digest of a header is wrong")]
    HeaderDigest,
    #[error("the digest of a data segment is wrong")]
    DataDigest,
}

impl Frames {
    /// More bytes have arrived.
    pub(super) fn extend(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next PDU, if it is whole.
    pub(super) fn next(
        &mut self,
        digests: Digests,
        data_bytes_max: u32,
    ) -> Result<Option<Frame>, FrameError> {
        let Some(bhs) = self.0.first_chunk::<BHS_BYTES>() else {
            return Ok(None);
        };
        let bhs = Bhs(*bhs);
        let data_bytes = bhs.data_segment_bytes();
        if data_bytes > data_bytes_max {
            return Err(FrameError::TooLong(data_bytes));
        }
        let data_bytes = usize::try_from(data_bytes).expect("this is a 64-bit monitor");
        let header_bytes = BHS_BYTES + bhs.ahs_bytes();
        let header_digest = digest_bytes(digests.header);
        let data_at = header_bytes + header_digest;
        let padded_bytes = data_bytes + padding_bytes(data_bytes);
        let data_digest = if data_bytes == 0 {
            0
        } else {
            digest_bytes(digests.data)
        };
        let end = data_at + padded_bytes + data_digest;
        if self.0.len() < end {
            return Ok(None);
        }
        let rest = self.0.split_off(end);
        let bytes = std::mem::replace(&mut self.0, rest);
        let part = |at: usize, len: usize| bytes.get(at..at + len).expect("the PDU is whole");
        if header_digest != 0 && part(header_bytes, 4) != digest(part(0, header_bytes)) {
            return Err(FrameError::HeaderDigest);
        }
        if data_digest != 0 && part(data_at + padded_bytes, 4) != digest(part(data_at, padded_bytes)) {
            return Err(FrameError::DataDigest);
        }
        Ok(Some(Frame {
            bhs,
            data: part(data_at, data_bytes).to_vec(),
        }))
    }
}

impl Frame {
    /// What goes out: the header with the length of the data, the data, and the digests.
    pub(super) fn bytes(&self, digests: Digests) -> Vec<u8> {
        let data_bytes = u32::try_from(self.data.len()).expect("data segments are short");
        let mut bytes = self.bhs.with_data_segment(data_bytes).0.to_vec();
        if digests.header {
            bytes.extend(digest(&bytes));
        }
        if !self.data.is_empty() {
            let mut data = self.data.clone();
            data.resize(data.len() + padding_bytes(data.len()), 0);
            bytes.extend(&data);
            if digests.data {
                bytes.extend(digest(&data));
            }
        }
        bytes
    }
}

fn digest_bytes(is_there: bool) -> usize {
    if is_there { 4 } else { 0 }
}

fn digest(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).to_le_bytes()
}
