//! Logical units of iSCSI targets (RFC 7143) as images: the protocol as values and state machines, without I/O.

pub mod chap;
pub mod digest;
pub mod discovery;
pub mod login;
pub mod name;
pub mod pdu;
pub mod portal;
pub mod secret;
pub mod text;
pub mod url;
