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

use super::protocol::Framer;

/// The cache's part of one connection.
#[derive(Debug, Default)]
pub(super) struct Cache {
    /// What has passed the network and is no whole request yet.
    pub(super) requests: Framer,
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
    /// Whether everything that it passed on was answered, and nothing is left to pass on.
    pub(super) fn is_clean(&self) -> bool {
        self.held.is_empty() && self.awaited.is_empty() && self.waiting.is_empty()
    }
}
