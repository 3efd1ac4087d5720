//! A server's volatile cache, played by the proxy: what was acknowledged is not yet safe.
//!
//! ```text
//! unstable write ──► held, acknowledged by us ──┬─ flush, or a request that depends on it ──► passed on,
//!                                               │    its answer swallowed; then the request itself passes
//!                                               ├─ its client is gone ──► passed on
//!                                               └─ crash ──► forgotten
//! ```
//!
//! A page cache survives the death of its writer, so with an ordinary server no test notices a FLUSH that was
//! never sent. Here it does: what was not flushed is gone after the crash.

use std::collections::{BTreeSet, VecDeque};

use super::Direction;

/// A protocol as far as a cache must know it.
pub trait Protocol: Send + std::fmt::Debug {
    /// The length of the first message in the stream, when enough of it is there to tell.
    fn message_bytes(&self, direction: Direction, stream: &[u8]) -> Option<usize>;

    /// What a request asks of the cache.
    fn kind(&self, request: &[u8]) -> Kind;

    /// What connects a request and its answer; unique among those in flight on one connection.
    fn tag(&self, message: &[u8]) -> u64;

    /// The answer that the server would give to an unstable write.
    fn acknowledgement(&self, request: &[u8]) -> Vec<u8>;

    /// Whether a request reads or overwrites what a held write wrote.
    fn depends(&self, request: &[u8], held: &[u8]) -> bool;
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

/// The cache's part of one connection.
#[derive(Debug, Default)]
pub(super) struct Cache {
    requests: Vec<u8>,
    answers: Vec<u8>,
    /// Writes that were acknowledged and not passed on.
    pub(super) held: Vec<Vec<u8>>,
    /// Tags of writes that were passed on and not answered: their answers are not for the client.
    pub(super) awaited: BTreeSet<u64>,
    /// Requests that wait until all caches have written back, in order.
    pub(super) waiting: VecDeque<Waiting>,
}

/// A request that waits.
#[derive(Debug)]
pub(super) enum Waiting {
    /// For what was written back on its account: then it passes.
    Served(Vec<u8>),
    /// For what was written back on another's: then it is looked at anew.
    Anew(Vec<u8>),
}

impl Cache {
    /// The requests that are whole with these bytes.
    pub(super) fn requests(&mut self, protocol: &dyn Protocol, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.requests.extend_from_slice(bytes);
        split(protocol, Direction::ToServer, &mut self.requests)
    }

    /// The answers that are whole with these bytes and meant for the client.
    pub(super) fn answers(&mut self, protocol: &dyn Protocol, bytes: &[u8]) -> Vec<u8> {
        self.answers.extend_from_slice(bytes);
        let answers = split(protocol, Direction::ToClient, &mut self.answers);
        let is_for_client = |answer: &Vec<u8>| !self.awaited.remove(&protocol.tag(answer));
        answers.into_iter().filter(is_for_client).flatten().collect()
    }

    /// What is to be passed on now, so that everything held is with the server.
    pub(super) fn write_back(&mut self, protocol: &dyn Protocol) -> Vec<u8> {
        let held = std::mem::take(&mut self.held);
        self.awaited
            .extend(held.iter().map(|request| protocol.tag(request)));
        held.concat()
    }

    /// Whether everything that it passed on was answered, and nothing is left to pass on.
    pub(super) fn is_clean(&self) -> bool {
        self.held.is_empty() && self.awaited.is_empty() && self.waiting.is_empty()
    }
}

/// Takes the whole messages off the front of a stream.
fn split(protocol: &dyn Protocol, direction: Direction, stream: &mut Vec<u8>) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let Some(length) = protocol
        .message_bytes(direction, stream)
        .filter(|length| (1..=stream.len()).contains(length))
    {
        messages.push(stream.drain(..length).collect());
    }
    messages
}
