//! Migrations from one process to another on this host, by TLS over loopback.

pub mod link;
pub mod pair;
pub mod peer;
pub mod rows;
pub mod ways;
