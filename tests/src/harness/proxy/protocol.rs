//! What the proxy must know of a protocol to tell one message from the next, and to play its server's cache.

use std::fmt::Debug;

use super::Direction;

/// A protocol on one connection: it remembers of the messages before what it needs for the next.
///
/// ```text
/// a connection begins ──► begin
/// a message comes     ──► message_bytes ──► step ──► note
/// volatile mode:          kind ─┬─ held ──► acknowledgement … write_back … swallow
///                               └─ passes ► to_server … to_client … crash
/// ```
pub trait Protocol: Send + Debug {
    /// The same protocol for a connection that begins.
    fn begin(&self) -> Box<dyn Protocol>;

    /// The length of the first message in the stream, when enough of it is there to tell.
    fn message_bytes(&self, direction: Direction, stream: &[u8]) -> Option<usize>;

    /// Takes note of a message that has come whole, as its sender sent it.
    fn note(&mut self, direction: Direction, message: &[u8]) {
        let _nothing_is_remembered = (direction, message);
    }

    /// What the two are at, by a message that was not noted yet; nothing when it is no step.
    fn step(&self, direction: Direction, message: &[u8]) -> Option<Step> {
        let _no_steps = (direction, message);
        None
    }

    /// The message with a damage; nothing when it has no place for that.
    fn damaged(&self, direction: Direction, message: &[u8], damage: Damage) -> Option<Vec<u8>> {
        let _no_place = (direction, message, damage);
        None
    }

    /// What a request asks of the cache.
    fn kind(&self, request: &[u8]) -> Kind;

    /// What connects a request and its answer, as the server sees them; unique among those in flight on one connection.
    fn tag(&self, message: &[u8]) -> u64;

    /// The answer that the server would give to an unstable write.
    fn acknowledgement(&mut self, request: &[u8]) -> Vec<u8>;

    /// Whether a request reads or overwrites what a held write wrote.
    fn depends(&self, request: &[u8], held: &[u8]) -> bool;

    /// Whether the server does writes that overlap in the order in which they come on one connection.
    fn keeps_order(&self) -> bool {
        true
    }

    /// A held write as the server must see it now.
    fn write_back(&mut self, held: Vec<u8>) -> Vec<u8> {
        self.to_server(held)
    }

    /// The request as the server must see it, which has not seen what is held.
    fn to_server(&mut self, request: Vec<u8>) -> Vec<u8> {
        request
    }

    /// The answer as the client must see it, which has seen what we acknowledged.
    fn to_client(&mut self, answer: Vec<u8>) -> Vec<u8> {
        answer
    }

    /// Forgets, for all connections, what the server itself was let write and a power failure takes; returns how many
    /// writes. The verifier of those that come after it is another.
    fn crash(&mut self) -> usize {
        0
    }

    /// Takes in the answer to a write that was acknowledged long ago; false when the server has refused it.
    fn swallow(&mut self, answer: &[u8]) -> bool {
        let _nothing_is_remembered = answer;
        true
    }
}

/// What a client and its server are at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The session begins.
    Login,
    /// Nothing but a look whether the other is still there.
    Idle,
    /// Data is read.
    Read,
    /// Data is written.
    Write,
    /// What was written is made safe.
    Flush,
    /// Space is given back.
    Unmap,
    /// Who may write is settled.
    Reservation,
    /// A connection begins that is to serve a session which is there already.
    Connect,
    /// The client says who it is.
    ClientId,
    /// A file is opened.
    Open,
    /// A file that was open before the server's restart is claimed again.
    Reclaim,
}

/// What is wrong with one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// A bit of the data is flipped; a sum over it, if there is one, no longer fits.
    Data,
    /// A bit of the sum over the header is flipped.
    HeaderSum,
    /// A bit of the sum over the data is flipped.
    DataSum,
    /// It ends before its data does: the header promises less than was sent before, and so much follows.
    Truncated,
    /// Its header promises the most that can be promised, and not so much follows.
    Oversized,
    /// It belongs to no request.
    Tag,
    /// Its number in the order of answers is another.
    Number,
    /// A bit of what says whether it was done is flipped.
    Verdict,
}

/// What a request asks of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A write that need not be safe when it is acknowledged: without FUA, UNSTABLE4. One that the server would refuse is
    /// not of this kind: it is the server's to refuse.
    Unstable,
    /// Everything written before must be safe when it is acknowledged.
    Flush,
    /// Anything else.
    Other,
}

/// Bytes of one stream that are no whole message yet.
#[derive(Debug, Default)]
pub(super) struct Framer(Vec<u8>);

impl Framer {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next whole message.
    pub(super) fn next(&mut self, protocol: &dyn Protocol, direction: Direction) -> Option<Vec<u8>> {
        let length = protocol.message_bytes(direction, &self.0)?;
        let is_whole = (1..=self.0.len()).contains(&length);
        is_whole.then(|| self.0.drain(..length).collect())
    }

    /// What came of a message that will never be whole.
    pub(super) fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}
