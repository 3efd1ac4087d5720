//! What was received on a connection, cut into PDUs.

use crate::remote::connection::Incoming;
use crate::remote::outbox::SEGMENTS_MAX;
use crate::request::{Segment, cut_first_bytes};
use crate::segments;

use super::digest::{DIGEST_BYTES, Digest, header_digest};
use super::pdu::{BHS_BYTES, Bhs, DataIn, PduError, TargetPdu, padding_bytes};
use super::session::Digests;

/// The incoming half of a connection.
///
/// ```text
///   header ──other PDU, with all of its data──► Item::Pdu
///     │  Data-In
///     ▼
///   Item::Payload ──place──► filling ──► padding, digest ──► Item::Filled
/// ```
///
/// Bytes are received into a buffer of our own, and payloads are copied from there; the rest of a long one is received
/// where it belongs.
#[derive(Debug)]
pub(super) struct Inbox {
    staging: Box<[u8]>,
    start: usize,
    end: usize,
    stage: Stage,
    /// Where the rest of a payload goes.
    rest: Vec<Segment>,
    /// Where the next receive goes, while it is in flight.
    space: Vec<Segment>,
    /// The receive in flight goes to `rest`.
    is_direct: bool,
    digest: Digest,
    /// What protects the PDUs.
    digests: Digests,
}

#[derive(Debug)]
enum Stage {
    Header,
    /// A payload waits to be told its place.
    Unplaced(Arrival),
    /// So many bytes of a payload are still to come.
    Filling(Arrival, usize),
    /// The padding and the digest of a payload are.
    Trailer(Arrival),
}

/// A Data-In PDU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    pub(super) header: DataIn,
    /// The length of its data segment.
    pub(super) len_bytes: usize,
}

/// What comes next.
#[derive(Debug)]
pub(super) enum Item {
    /// A PDU that is no Data-In, and its data segment.
    Pdu(TargetPdu, Vec<u8>),
    /// A Data-In PDU has begun: [`Inbox::place`] has to say where its data go.
    Payload(Arrival),
    /// All of its data are there.
    Filled(Arrival),
}

/// What makes a stream useless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum StreamError {
    /// A header that is none.
    #[error("what it sent is not iSCSI")]
    Pdu(#[from] PduError),
    /// More data than this kind of PDU has.
    #[error("it sent a data segment of {0} bytes with a response, which is more than any has")]
    Oversized(usize),
    /// A digest does not fit.
    #[error("the CRC32C of {0} is wrong")]
    Digest(&'static str),
}

/// The buffer for what is received.
const STAGING_BYTES: usize = 64 << 10;
/// The data segment of a PDU other than Data-In: sense data, login keys.
const DATA_BYTES_MAX: usize = 32 << 10;
/// A rest that is shorter is not worth a receive of its own.
const DIRECT_BYTES_MIN: usize = 16 << 10;

impl Default for Inbox {
    fn default() -> Self {
        Self {
            staging: vec![0; STAGING_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            stage: Stage::Header,
            rest: Vec::new(),
            space: Vec::new(),
            is_direct: false,
            digest: Digest::default(),
            digests: Digests::default(),
        }
    }
}

impl Incoming for Inbox {
    fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
        self.stage = Stage::Header;
        self.rest.clear();
        self.is_direct = false;
        self.digests = Digests::default();
    }

    fn space(&mut self, limit_bytes: usize) -> &[Segment] {
        self.space.clear();
        if let Stage::Filling(_, left) = self.stage
            && left >= DIRECT_BYTES_MIN
            && !self.digests.data
        {
            debug_assert!(self.start == self.end, "what has come was copied first");
            self.is_direct = true;
            self.space.extend(self.rest.iter().take(SEGMENTS_MAX));
            return &self.space;
        }
        if self.start > 0 {
            self.staging.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let free = self.staging.get_mut(self.end..).unwrap_or_default();
        let len = free.len().min(limit_bytes);
        self.space
            .push(segments::own(free.get_mut(..len).unwrap_or_default()));
        &self.space
    }

    fn come_bytes(&self) -> usize {
        let placed = match self.stage {
            Stage::Header => 0,
            Stage::Unplaced(_) => BHS_BYTES,
            Stage::Filling(arrival, left) => BHS_BYTES + arrival.len_bytes - left,
            Stage::Trailer(arrival) => BHS_BYTES + arrival.len_bytes,
        };
        placed + self.end - self.start
    }

    fn left_bytes(&self) -> usize {
        match self.stage {
            Stage::Filling(_, left) => left,
            _ => 0,
        }
    }

    fn received(&mut self, bytes: usize) -> bool {
        let was_filled = segments::total(&self.space) == bytes as u64;
        if !std::mem::take(&mut self.is_direct) {
            self.end = (self.end + bytes).min(self.staging.len());
            return was_filled;
        }
        cut_first_bytes(&mut self.rest, bytes);
        if let Stage::Filling(arrival, left) = self.stage {
            self.stage = Self::after_filling(arrival, left.saturating_sub(bytes));
        }
        was_filled
    }
}

impl Inbox {
    /// What protects the PDUs.
    pub(super) fn digests(&self) -> Digests {
        self.digests
    }

    /// What protects the PDUs from now on.
    pub(super) fn set_digests(&mut self, digests: Digests) {
        self.digests = digests;
    }

    /// The next thing that has come whole.
    pub(super) fn next(&mut self) -> Result<Option<Item>, StreamError> {
        let digests = self.digests;
        match self.stage {
            Stage::Header => self.header(digests),
            Stage::Unplaced(arrival) => Ok(Some(Item::Payload(arrival))),
            Stage::Filling(arrival, left) => {
                self.fill(arrival, left, digests);
                if matches!(self.stage, Stage::Trailer(_)) {
                    return self.trailer(arrival, digests);
                }
                Ok(None)
            }
            Stage::Trailer(arrival) => self.trailer(arrival, digests),
        }
    }

    /// Says where the payload that [`Item::Payload`] announced goes: segments of just that length.
    pub(super) fn place(&mut self, destination: impl FnOnce(&mut Vec<Segment>)) {
        let Stage::Unplaced(arrival) = self.stage else {
            panic!("a place is given to a payload that was announced");
        };
        self.rest.clear();
        destination(&mut self.rest);
        self.digest = Digest::default();
        let len_bytes = usize::try_from(segments::total(&self.rest)).expect("this is a 64-bit monitor");
        assert_eq!(len_bytes, arrival.len_bytes, "a payload fills its place");
        self.stage = Self::after_filling(arrival, len_bytes);
    }

    fn after_filling(arrival: Arrival, left: usize) -> Stage {
        if left == 0 {
            Stage::Trailer(arrival)
        } else {
            Stage::Filling(arrival, left)
        }
    }

    fn header(&mut self, digests: Digests) -> Result<Option<Item>, StreamError> {
        let come = self.staging.get(self.start..self.end).unwrap_or_default();
        let Some(bytes) = come.first_chunk::<BHS_BYTES>() else {
            return Ok(None);
        };
        let header = Bhs(*bytes);
        let headers = BHS_BYTES + header.ahs_bytes();
        let digest_bytes = if digests.header { DIGEST_BYTES } else { 0 };
        let Some((head, rest)) = come.split_at_checked(headers + digest_bytes) else {
            return Ok(None);
        };
        if digests.header {
            let (covered, sum) = head.split_at(headers);
            if header_digest(&header, covered.get(BHS_BYTES..).unwrap_or_default()) != sum {
                return Err(StreamError::Digest("a header"));
            }
        }
        let pdu = TargetPdu::parse(&header)?;
        let len = usize::try_from(header.data_segment_bytes()).expect("this is a 64-bit monitor");
        if let TargetPdu::DataIn(header) = pdu {
            let arrival = Arrival {
                header,
                len_bytes: len,
            };
            self.start += headers + digest_bytes;
            self.stage = Stage::Unplaced(arrival);
            return Ok(Some(Item::Payload(arrival)));
        }
        if len > DATA_BYTES_MAX {
            return Err(StreamError::Oversized(len));
        }
        let padded = len + padding_bytes(len);
        let trailer = if digests.data && len > 0 { DIGEST_BYTES } else { 0 };
        let Some(data) = rest.get(..padded + trailer) else {
            return Ok(None);
        };
        let (data, sum) = data.split_at(padded);
        if trailer > 0 {
            let mut digest = Digest::default();
            digest.add(data);
            if digest.finish() != sum {
                return Err(StreamError::Digest("a data segment"));
            }
        }
        let data = data.get(..len).unwrap_or_default().to_vec();
        self.start += headers + digest_bytes + padded + trailer;
        Ok(Some(Item::Pdu(pdu, data)))
    }

    /// Copies what has come of a payload to its place.
    fn fill(&mut self, arrival: Arrival, left: usize, digests: Digests) {
        let come = self.staging.get(self.start..self.end).unwrap_or_default();
        let piece = come.get(..left.min(come.len())).unwrap_or_default();
        segments::fill(&self.rest, piece);
        if digests.data {
            self.digest.add(piece);
        }
        let len = piece.len();
        cut_first_bytes(&mut self.rest, len);
        self.start += len;
        self.stage = Self::after_filling(arrival, left - len);
    }

    fn trailer(&mut self, arrival: Arrival, digests: Digests) -> Result<Option<Item>, StreamError> {
        let padding = padding_bytes(arrival.len_bytes);
        let digest_bytes = if digests.data && arrival.len_bytes > 0 {
            DIGEST_BYTES
        } else {
            0
        };
        let come = self.staging.get(self.start..self.end).unwrap_or_default();
        let Some(trailer) = come.get(..padding + digest_bytes) else {
            return Ok(None);
        };
        if digest_bytes > 0 {
            let (padding, sum) = trailer.split_at(padding);
            self.digest.add(padding);
            if self.digest.finish() != sum {
                return Err(StreamError::Digest("data that was read"));
            }
        }
        self.start += trailer.len();
        self.stage = Stage::Header;
        Ok(Some(Item::Filled(arrival)))
    }
}
