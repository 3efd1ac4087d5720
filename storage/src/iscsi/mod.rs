//! Images on the logical units of iSCSI targets (RFC 7143), without an initiator on the host: the protocol as values and state
//! machines, without I/O of their own.

pub mod chap;
pub mod digest;
pub mod discovery;
pub mod login;
pub mod name;
pub mod pdu;
pub mod portal;
pub mod scsi;
pub mod secret;
pub mod tail;
pub mod text;
pub mod url;
