//! What images on servers have in common, whatever protocol leads to them.

pub(crate) mod backoff;
pub(crate) mod connection;
pub(crate) mod debt;
pub(crate) mod dialogue;
pub(crate) mod flights;
pub(crate) mod lease;
pub(crate) mod outbox;
pub(crate) mod procedure;
pub(crate) mod quota;
pub(crate) mod retained;
pub(crate) mod streak;
