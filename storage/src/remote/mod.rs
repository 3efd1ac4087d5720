//! What images on servers have in common, whatever protocol leads to them.

pub(crate) mod outbox;
pub(crate) mod procedure;
pub(crate) mod retained;
