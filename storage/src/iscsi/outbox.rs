//! What waits to be sent on a connection, and what is being sent: every PDU that is queued goes in one send.

use crate::request::{Segment, cut_first_bytes};
use crate::segments;

use super::connection::SEGMENTS_MAX;
use super::digest::{Digest, header_digest};
use super::pdu::{Bhs, Tag, padding_bytes};
use super::session::Digests;

/// The outgoing half of a connection.
///
/// ```text
///   push ──► filling ──depart──► sending ──sent──► … ──► all of it is sent: its lenders may have their memory back
/// ```
///
/// Headers and short payloads are copied, one after the other, so that a batch of commands is one piece of memory; long payloads
/// are sent from where they are.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    filling: Batch,
    sending: Batch,
    /// What of `sending` is not sent yet.
    unsent: Vec<Segment>,
    /// How many batches have departed.
    departures: u64,
}

/// PDUs in the order in which they are sent.
#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
    /// The tasks whose memory is sent from where it is, once for each payload.
    lenders: Vec<Tag>,
}

#[derive(Debug)]
enum Piece {
    /// So many of the copied bytes.
    Copied(usize),
    /// Memory of a request.
    Lent(Segment),
}

/// The data segment of a PDU.
#[derive(Clone, Copy, Debug)]
pub(super) enum Payload<'a> {
    /// Bytes of our own, copied now.
    Own(&'a [u8]),
    /// Memory of a request, copied now: it is short, or what is sent has a digest and must not change any more.
    Copied(&'a [Segment]),
    /// Memory of the request of this task, which stays in place until the payload was sent.
    Lent(&'a [Segment], Tag),
}

impl Payload<'_> {
    /// No data segment.
    pub(super) const NONE: Self = Self::Own(&[]);
}

/// A batch that needed more is given back to the allocator.
const KEPT_BYTES_MAX: usize = 256 << 10;

impl Outbox {
    /// Queues a PDU. `digests` say what its header and its data are protected by; lent memory has no data digest.
    pub(super) fn push(&mut self, header: &Bhs, payload: Payload<'_>, digests: Digests) {
        let batch = &mut self.filling;
        let start = batch.bytes.len();
        batch.bytes.extend_from_slice(&header.0);
        if digests.header {
            batch.bytes.extend_from_slice(&header_digest(header, &[]));
        }
        let data = batch.bytes.len();
        match payload {
            Payload::Own(bytes) => batch.bytes.extend_from_slice(bytes),
            Payload::Copied(pieces) => segments::gather(pieces, &mut batch.bytes),
            Payload::Lent(pieces, task) => {
                assert!(!digests.data, "what has a digest is copied");
                batch.copied(data - start);
                batch.pieces.extend(pieces.iter().copied().map(Piece::Lent));
                batch.lenders.push(task);
                let len = usize::try_from(segments::total(pieces)).expect("this is a 64-bit monitor");
                let padding = padding_bytes(len);
                batch.bytes.resize(data + padding, 0);
                batch.copied(padding);
                return;
            }
        }
        let len = batch.bytes.len() - data;
        let mut digest = Digest::default();
        if digests.data {
            digest.add(batch.bytes.get(data..).unwrap_or_default());
        }
        batch.bytes.resize(data + len + padding_bytes(len), 0);
        if digests.data && len > 0 {
            batch.bytes.extend_from_slice(&digest.finish());
        }
        batch.copied(batch.bytes.len() - start);
    }

    /// Whether there is something to send, and nothing is being sent.
    pub(super) fn may_depart(&self) -> bool {
        self.unsent.is_empty() && !self.filling.pieces.is_empty()
    }

    /// Whether something is being sent.
    pub(super) fn is_sending(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// How many batches have departed: as long as it is the same, the target has not taken the last one.
    pub(super) fn departures(&self) -> u64 {
        self.departures
    }

    /// Turns what waits into what is being sent.
    pub(super) fn depart(&mut self) {
        assert!(self.unsent.is_empty(), "one batch is sent at a time");
        std::mem::swap(&mut self.filling, &mut self.sending);
        self.departures += 1;
        let mut copied = self.sending.bytes.as_mut_slice();
        for piece in &self.sending.pieces {
            match piece {
                Piece::Copied(len) => {
                    let (piece, rest) = std::mem::take(&mut copied).split_at_mut(*len);
                    self.unsent.push(segments::own(piece));
                    copied = rest;
                }
                Piece::Lent(segment) => self.unsent.push(*segment),
            }
        }
    }

    /// What the next send is to send; it stays in place until [`Self::sent`].
    pub(super) fn unsent(&self) -> &[Segment] {
        let count = self.unsent.len().min(SEGMENTS_MAX);
        self.unsent.get(..count).unwrap_or_default()
    }

    /// Takes in that `bytes` were sent. When the whole batch was, `returned` gets the tasks that have their memory back.
    pub(super) fn sent(&mut self, bytes: usize, returned: &mut Vec<Tag>) {
        cut_first_bytes(&mut self.unsent, bytes);
        if self.unsent.is_empty() {
            returned.append(&mut self.sending.lenders);
            self.sending.clear();
        }
    }

    /// Forgets everything, when nothing is being sent by the kernel any more; `returned` gets every lender.
    pub(super) fn clear(&mut self, returned: &mut Vec<Tag>) {
        self.unsent.clear();
        for batch in [&mut self.sending, &mut self.filling] {
            returned.append(&mut batch.lenders);
            batch.clear();
        }
    }
}

impl Batch {
    fn copied(&mut self, bytes: usize) {
        match self.pieces.last_mut() {
            _ if bytes == 0 => {}
            Some(Piece::Copied(len)) => *len += bytes,
            _ => self.pieces.push(Piece::Copied(bytes)),
        }
    }

    fn clear(&mut self) {
        self.pieces.clear();
        self.lenders.clear();
        self.bytes.clear();
        if self.bytes.capacity() > KEPT_BYTES_MAX {
            self.bytes = Vec::new();
        }
    }
}
