//! Logical units of iSCSI targets (RFC 7143) as images: the protocol as values and state machines, without I/O.

pub mod pdu;
