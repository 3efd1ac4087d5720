//! What waits to be sent on a connection, and what is being sent: all that is queued goes in one send.

use crate::request::{Segment, cut_first_bytes};
use crate::segments;

/// Segments of one send or receive (IOV_MAX of Linux).
pub(crate) const SEGMENTS_MAX: usize = 1024;

/// The outgoing half of a connection.
///
/// ```text
///   write, gather, lend ──► filling ──depart──► sending ──sent──► … ──► all is sent: its lenders may have their memory back
/// ```
///
/// Headers and short payloads are copied, one after the other, so that a batch of commands is one piece of memory; long payloads
/// are sent from where they are.
#[derive(Debug)]
pub(crate) struct Outbox<L> {
    filling: Batch<L>,
    sending: Batch<L>,
    /// What of `sending` is not sent yet.
    unsent: Vec<Segment>,
    /// How many batches have departed.
    departures: u64,
}

/// Messages in the order in which they are sent.
#[derive(Debug)]
struct Batch<L> {
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
    /// Whose memory is sent from where it is, once for each payload.
    lenders: Vec<L>,
}

#[derive(Debug)]
enum Piece {
    /// So many of the copied bytes.
    Copied(usize),
    /// Memory of a request.
    Lent(Segment),
}

/// A batch that needed more is given back to the allocator.
const KEPT_BYTES_MAX: usize = 256 << 10;

impl<L> Default for Outbox<L> {
    fn default() -> Self {
        Self {
            filling: Batch::default(),
            sending: Batch::default(),
            unsent: Vec::new(),
            departures: 0,
        }
    }
}

impl<L> Default for Batch<L> {
    fn default() -> Self {
        Self {
            bytes: Vec::new(),
            pieces: Vec::new(),
            lenders: Vec::new(),
        }
    }
}

impl<L> Outbox<L> {
    /// Queues bytes of our own, which are copied now.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.filling.bytes.extend_from_slice(bytes);
        self.filling.copied(bytes.len());
    }

    /// Queues memory of a request, which is copied now: it is short, or must not change any more. Returns the copy.
    pub(crate) fn gather(&mut self, pieces: &[Segment]) -> &[u8] {
        let start = self.filling.bytes.len();
        segments::gather(pieces, &mut self.filling.bytes);
        self.filling.copied(self.filling.bytes.len() - start);
        self.filling.bytes.get(start..).unwrap_or_default()
    }

    /// Queues memory of a request, which stays in place until it was sent: `lender` is told then.
    pub(crate) fn lend(&mut self, pieces: &[Segment], lender: L) {
        self.filling
            .pieces
            .extend(pieces.iter().copied().map(Piece::Lent));
        self.filling.lenders.push(lender);
    }

    /// Whether there is something to send, and nothing is being sent.
    pub(crate) fn may_depart(&self) -> bool {
        self.unsent.is_empty() && !self.filling.pieces.is_empty()
    }

    /// Whether something is being sent.
    pub(crate) fn is_sending(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// How many batches have departed: as long as it is the same, the server has not taken the last one.
    pub(crate) fn departures(&self) -> u64 {
        self.departures
    }

    /// Turns what waits into what is being sent.
    pub(crate) fn depart(&mut self) {
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
    pub(crate) fn unsent(&self) -> &[Segment] {
        let count = self.unsent.len().min(SEGMENTS_MAX);
        self.unsent.get(..count).unwrap_or_default()
    }

    /// Takes in that `bytes` were sent. When the whole batch was, `returned` gets those who have their memory back.
    pub(crate) fn sent(&mut self, bytes: usize, returned: &mut Vec<L>) {
        cut_first_bytes(&mut self.unsent, bytes);
        if self.unsent.is_empty() {
            returned.append(&mut self.sending.lenders);
            self.sending.clear();
        }
    }

    /// Forgets everything, when nothing is being sent by the kernel any more; `returned` gets every lender.
    pub(crate) fn clear(&mut self, returned: &mut Vec<L>) {
        self.unsent.clear();
        for batch in [&mut self.sending, &mut self.filling] {
            returned.append(&mut batch.lenders);
            batch.clear();
        }
    }
}

impl<L> Batch<L> {
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
