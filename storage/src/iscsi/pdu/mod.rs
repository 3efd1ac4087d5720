//! The 48 bytes at the head of each PDU (RFC 7143, 11), as bytes and as what they say.
//!
//! Each PDU is a struct with the fields of its section under their names there. `bhs` writes it, and
//! [`TargetPdu::parse`] and [`InitiatorPdu::parse`] read it; what the standard reserves is sent as zeros and not
//! looked at. A data segment travels beside its header, which [`Bhs::with_data_segment`] tells its length.
//!
//! ```text
//! header (48) | additional headers (4n) | header digest (0 or 4) | data (n) | padding (0 to 3) | data digest (0 or 4)
//! ```

mod bhs;
mod field;
mod initiator;
mod serial;
mod target;

pub use bhs::{BHS_BYTES, Bhs, DATA_SEGMENT_BYTES_MAX, padding_bytes};
pub use field::{Isid, Lun, Residual, Stage, Tag, TaskAttribute, Transit, Window};
pub use initiator::{
    DataOut, InitiatorPdu, LoginRequest, LogoutReason, LogoutRequest, NopOut, ScsiCommand, TaskFunction,
    TaskManagementRequest, TextRequest,
};
pub use serial::Serial;
pub use target::{
    Async, AsyncEvent, DataIn, DataInStatus, LoginResponse, LogoutOutcome, LogoutResponse, NopIn, R2t,
    Reject, RejectReason, ScsiResponse, ServiceResponse, TargetPdu, TaskManagementResponse, TaskOutcome,
    TextResponse,
};

/// Why 48 bytes are no header of a PDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PduError {
    /// An operation that nobody sends in this direction, or that was not asked for.
    #[error("a PDU of the iSCSI operation {0:#04x}, which has no place here")]
    Opcode(u8),
    /// A field with a value that the standard does not allow.
    #[error("a PDU of the iSCSI operation {opcode:#04x} whose {field} is {value}, which is not allowed")]
    Field {
        /// The operation.
        opcode: u8,
        /// What the standard calls the field.
        field: &'static str,
        /// What it said.
        value: u8,
    },
}

#[cfg(test)]
mod tests;
