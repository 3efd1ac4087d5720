//! What was received on a connection, cut into RPC records.

use crate::remote::connection::Incoming;
use crate::remote::outbox::SEGMENTS_MAX;
use crate::request::{Segment, cut_first_bytes};
use crate::segments;

use super::payload::Payload;
use super::rpc::{Direction, RECORD_MARK_BYTES, RecordError, RecordMark};
use super::v4;
use super::xdr::XdrError;
use super::xid::Xid;

/// The incoming half of a connection.
///
/// ```text
///   mark ──► fragment ──any other record, with all that it has──► Item::Record
///     ▲          │ the reply to a READ
///     │          ▼
///     │   Item::Payload ──place──► filling ──► trailer ──► Item::Filled
///     └──────────────────────────────────────────┘
/// ```
///
/// Bytes are received into a buffer of our own, and payloads are copied from there; the rest of a long one is received
/// where it belongs. Replies begin as the version of `P` has it.
#[derive(Debug)]
pub(super) struct Inbox<P = v4::ReadPayload> {
    staging: Box<[u8]>,
    start: usize,
    end: usize,
    stage: Stage<P>,
    /// What has come of a record that came in more than one piece.
    assembled: Vec<u8>,
    /// Where the rest of a payload goes.
    rest: Vec<Segment>,
    /// Where the next receive goes, while it is in flight.
    space: Vec<Segment>,
    /// The receive in flight goes to `rest`.
    is_direct: bool,
}

#[derive(Debug)]
enum Stage<P> {
    Mark,
    /// So many bytes of a fragment are still to come, and it is the last of its record, or not.
    Fragment(usize, Last),
    /// A payload waits to be told its place.
    Unplaced(Arrival<P>),
    /// So many bytes of a payload are still to come.
    Filling(Arrival<P>, usize),
    /// What follows a payload is.
    Trailer(Arrival<P>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    Yes,
    No,
}

/// The reply to a READ that has succeeded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival<P = v4::ReadPayload> {
    /// Which call it answers.
    pub(super) xid: u32,
    /// What the server says of it.
    pub(super) payload: P,
    /// The length of the data.
    pub(super) len_bytes: usize,
    /// What its record has behind the data.
    trailer_bytes: usize,
}

/// What comes next.
#[derive(Debug)]
pub(super) enum Item<P = v4::ReadPayload> {
    /// A whole record. Its memory can be given back by [`Inbox::recycle`].
    Record(Vec<u8>),
    /// A reply to a READ has begun: [`Inbox::place`] has to say where its data go.
    Payload(Arrival<P>),
    /// All of its data are there.
    Filled(Arrival<P>),
}

/// What makes a stream useless.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum StreamError {
    /// A record that cannot be an answer.
    #[error("what it sent is not NFS: {0}")]
    Record(#[from] RecordError),
    /// The beginning of a reply.
    #[error("what it sent is no answer to a READ: {0}")]
    Prefix(#[from] XdrError),
    /// More behind the data than there can be.
    #[error("its answer to a READ has {0} bytes behind the data")]
    Trailer(usize),
    /// Less than the answer says.
    #[error("its answer to a READ ends before its data do")]
    Short,
}

/// The buffer for what is received.
const STAGING_BYTES: usize = 64 << 10;
/// A rest that is shorter is not worth a receive of its own.
const DIRECT_BYTES_MIN: usize = 16 << 10;
/// No record is longer: what a READ may return at most, and what stands around it.
pub(super) const RECORD_BYTES_MAX: usize = (1 << 20) + (64 << 10);
/// What may follow them: padding.
const TRAILER_BYTES_MAX: usize = 3;
/// A record that needed more is not kept for the next.
const KEPT_BYTES_MAX: usize = 64 << 10;

impl<P: Payload> Default for Inbox<P> {
    fn default() -> Self {
        Self {
            staging: vec![0; STAGING_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            stage: Stage::Mark,
            assembled: Vec::new(),
            rest: Vec::new(),
            space: Vec::new(),
            is_direct: false,
        }
    }
}

impl<P: Payload> Incoming for Inbox<P> {
    fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
        self.stage = Stage::Mark;
        self.assembled.clear();
        self.rest.clear();
        self.is_direct = false;
    }

    fn space(&mut self, limit_bytes: usize) -> &[Segment] {
        self.space.clear();
        if let Stage::Filling(_, left) = self.stage
            && left >= DIRECT_BYTES_MIN
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
            Stage::Mark => 0,
            Stage::Fragment(..) => RECORD_MARK_BYTES + self.assembled.len(),
            Stage::Unplaced(arrival) => arrival.payload.prefix_bytes(),
            Stage::Filling(arrival, left) => arrival.payload.prefix_bytes() + arrival.len_bytes - left,
            Stage::Trailer(arrival) => arrival.payload.prefix_bytes() + arrival.len_bytes,
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
            self.stage = after_filling(arrival, left.saturating_sub(bytes));
        }
        was_filled
    }
}

impl<P: Payload> Inbox<P> {
    /// The next thing that has come whole.
    ///
    /// # Errors
    ///
    /// When the stream makes no sense any more; the connection is to be left.
    pub(super) fn next(&mut self) -> Result<Option<Item<P>>, StreamError> {
        loop {
            match self.stage {
                Stage::Mark => {
                    let Some(mark) = self.come().first_chunk::<RECORD_MARK_BYTES>() else {
                        return Ok(None);
                    };
                    let mark = RecordMark::parse(*mark, RECORD_BYTES_MAX - self.assembled.len())?;
                    self.start += RECORD_MARK_BYTES;
                    let last = if mark.is_last { Last::Yes } else { Last::No };
                    self.stage = Stage::Fragment(mark.fragment_bytes, last);
                }
                Stage::Fragment(left, last) => {
                    if last == Last::Yes && self.assembled.is_empty() && self.is_of_read() {
                        match self.prefix(left)? {
                            Prefix::Incomplete => return Ok(None),
                            Prefix::Payload(arrival) => {
                                self.stage = Stage::Unplaced(arrival);
                                continue;
                            }
                            Prefix::None => {}
                        }
                    }
                    if let Some(record) = self.fragment(left, last) {
                        return Ok(Some(Item::Record(record)));
                    }
                    if matches!(self.stage, Stage::Fragment(..)) {
                        return Ok(None);
                    }
                }
                Stage::Unplaced(arrival) => return Ok(Some(Item::Payload(arrival))),
                Stage::Filling(arrival, left) => {
                    self.fill(arrival, left);
                    if !matches!(self.stage, Stage::Trailer(_)) {
                        return Ok(None);
                    }
                }
                Stage::Trailer(arrival) => {
                    if self.come().len() < arrival.trailer_bytes {
                        return Ok(None);
                    }
                    self.start += arrival.trailer_bytes;
                    self.stage = Stage::Mark;
                    return Ok(Some(Item::Filled(arrival)));
                }
            }
        }
    }

    /// Says where the payload that [`Item::Payload`] announced goes: segments of just that length.
    pub(super) fn place(&mut self, destination: impl FnOnce(&mut Vec<Segment>)) {
        let Stage::Unplaced(arrival) = self.stage else {
            panic!("a place is given to a payload that was announced");
        };
        self.rest.clear();
        destination(&mut self.rest);
        let len = usize::try_from(segments::total(&self.rest)).expect("this is a 64-bit monitor");
        assert_eq!(len, arrival.len_bytes, "a payload fills its place");
        self.stage = after_filling(arrival, len);
    }

    /// Takes the memory of a record back, for the next one.
    pub(super) fn recycle(&mut self, mut record: Vec<u8>) {
        if self.assembled.capacity() == 0 && record.capacity() <= KEPT_BYTES_MAX {
            record.clear();
            self.assembled = record;
        }
    }

    fn come(&self) -> &[u8] {
        self.staging.get(self.start..self.end).unwrap_or_default()
    }

    /// Whether a record whose number has come is the reply to a READ.
    fn is_of_read(&self) -> bool {
        let come = self.come();
        // A call of the server may have any number.
        let is_call = Direction::of(come) == Ok(Direction::Call);
        let number = come.first_chunk().copied().map(u32::from_be_bytes);
        !is_call && number.is_none_or(|number| Xid(number).is_of_read())
    }

    /// Looks at the beginning of a reply to a READ, of which `left` bytes come.
    fn prefix(&mut self, left: usize) -> Result<Prefix<P>, StreamError> {
        let come = self.come();
        let come = come.get(..left.min(come.len())).unwrap_or_default();
        let Some((xid, payload)) = P::of_prefix(come)? else {
            let is_all = come.len() == left || come.len() >= P::PREFIX_BYTES_MAX;
            return Ok(if is_all { Prefix::None } else { Prefix::Incomplete });
        };
        let Some(payload) = payload else {
            return Ok(Prefix::None);
        };
        let len_bytes = usize::try_from(payload.data_len()).map_err(|_| StreamError::Short)?;
        let behind = left.checked_sub(payload.prefix_bytes());
        let trailer_bytes = behind.and_then(|behind| behind.checked_sub(len_bytes));
        let trailer_bytes = trailer_bytes.ok_or(StreamError::Short)?;
        if trailer_bytes > TRAILER_BYTES_MAX {
            return Err(StreamError::Trailer(trailer_bytes));
        }
        self.start += payload.prefix_bytes();
        Ok(Prefix::Payload(Arrival {
            xid,
            payload,
            len_bytes,
            trailer_bytes,
        }))
    }

    /// Takes in what has come of a fragment. The record, if that was its end.
    fn fragment(&mut self, left: usize, last: Last) -> Option<Vec<u8>> {
        let come = self.staging.get(self.start..self.end).unwrap_or_default();
        let piece = come.get(..left.min(come.len())).unwrap_or_default();
        if piece.len() < left && piece.len() < STAGING_BYTES / 2 && self.assembled.is_empty() {
            // Nearly every record comes whole, and is copied once.
            return None;
        }
        self.assembled.extend_from_slice(piece);
        let (len, left) = (piece.len(), left - piece.len());
        self.start += len;
        match (left, last) {
            (0, Last::Yes) => {
                self.stage = Stage::Mark;
                Some(std::mem::take(&mut self.assembled))
            }
            (0, Last::No) => {
                self.stage = Stage::Mark;
                None
            }
            _ => {
                self.stage = Stage::Fragment(left, last);
                None
            }
        }
    }

    /// Copies what has come of a payload to its place.
    fn fill(&mut self, arrival: Arrival<P>, left: usize) {
        let come = self.staging.get(self.start..self.end).unwrap_or_default();
        let piece = come.get(..left.min(come.len())).unwrap_or_default();
        segments::fill(&self.rest, piece);
        let len = piece.len();
        cut_first_bytes(&mut self.rest, len);
        self.start += len;
        self.stage = after_filling(arrival, left - len);
    }
}

/// What the beginning of a reply to a READ says.
enum Prefix<P> {
    /// Nothing yet.
    Incomplete,
    /// Where its data are.
    Payload(Arrival<P>),
    /// That it has none.
    None,
}

fn after_filling<P>(arrival: Arrival<P>, left: usize) -> Stage<P> {
    if left == 0 {
        Stage::Trailer(arrival)
    } else {
        Stage::Filling(arrival, left)
    }
}
