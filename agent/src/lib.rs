//! What `coraclectl` and the agent in a guest say to each other, and how files go from one to the other.
//!
//! The agent (`main.rs`) listens on a vsock port of the guest. Each connection is one errand: a command that is run, or
//! files that are brought or fetched. Neither side trusts the other: a guest is hostile to its host, and a host has
//! every right in its guest, but may be an older or a newer `coraclectl`.

pub mod files;
pub mod wire;
