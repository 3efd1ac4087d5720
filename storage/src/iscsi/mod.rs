//! Images on the logical units of iSCSI targets (RFC 7143), without an initiator on the host.

pub mod scsi;
pub mod tail;
