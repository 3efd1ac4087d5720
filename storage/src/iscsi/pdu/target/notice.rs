//! What a target sends that answers nothing.

use std::fmt;

use super::{ASYNC, REJECT, response};
use crate::iscsi::pdu::{Bhs, Lun, Serial, Tag, Window};

/// What a target says unasked (11.9.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncEvent(pub u8);

#[expect(missing_docs, reason = "RFC 7143, 11.9.1 says what each is")]
impl AsyncEvent {
    pub const SCSI: Self = Self(0);
    pub const LOGOUT_REQUESTED: Self = Self(1);
    pub const CONNECTION_DROPPED: Self = Self(2);
    pub const SESSION_DROPPED: Self = Self(3);
    pub const NEGOTIATION_REQUESTED: Self = Self(4);
    pub const TASKS_TERMINATED: Self = Self(5);
    pub const VENDOR: Self = Self(255);
}

/// Asynchronous Message (11.9). Its data segment is sense data, as in a [`ScsiResponse`](super::ScsiResponse).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Async {
    /// With an event of SCSI: where.
    pub lun: Lun,
    /// The number of this status.
    pub stat_sn: Serial,
    /// Which commands the target takes now.
    pub window: Window,
    /// What it is about.
    pub async_event: AsyncEvent,
    /// With an event of the vendor: what it is about.
    pub async_vcode: u8,
    /// With a dropped connection: its CID. With a requested logout or negotiation: nothing.
    pub parameter1: u16,
    /// With a dropped connection or session: the least time to wait, in seconds.
    pub parameter2: u16,
    /// With a requested logout or negotiation: by when, in seconds. With a dropped connection or session: for how long
    /// the target keeps what there is.
    pub parameter3: u16,
}

impl Async {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        response(ASYNC, Tag::RESERVED, self.stat_sn, self.window)
            .put_lun(self.lun)
            .put::<36, 2>([self.async_event.0, self.async_vcode])
            .put::<38, 2>(self.parameter1.to_be_bytes())
            .put::<40, 2>(self.parameter2.to_be_bytes())
            .put::<42, 2>(self.parameter3.to_be_bytes())
    }

    pub(super) fn of(bhs: &Bhs) -> Self {
        Self {
            lun: bhs.lun(),
            stat_sn: bhs.serial::<24>(),
            window: Window::of(bhs),
            async_event: AsyncEvent(bhs.byte::<36>()),
            async_vcode: bhs.byte::<37>(),
            parameter1: bhs.u16::<38>(),
            parameter2: bhs.u16::<40>(),
            parameter3: bhs.u16::<42>(),
        }
    }
}

/// Why a PDU was rejected (11.17.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RejectReason(pub u8);

#[expect(missing_docs, reason = "RFC 7143, 11.17.1 says what each is")]
impl RejectReason {
    pub const DATA_DIGEST_ERROR: Self = Self(0x02);
    pub const SNACK_REJECT: Self = Self(0x03);
    pub const PROTOCOL_ERROR: Self = Self(0x04);
    pub const COMMAND_NOT_SUPPORTED: Self = Self(0x05);
    pub const IMMEDIATE_COMMAND_REJECT: Self = Self(0x06);
    pub const TASK_IN_PROGRESS: Self = Self(0x07);
    pub const INVALID_DATA_ACK: Self = Self(0x08);
    pub const INVALID_PDU_FIELD: Self = Self(0x09);
    pub const OUT_OF_RESOURCES: Self = Self(0x0a);
    pub const NEGOTIATION_RESET: Self = Self(0x0b);
    pub const WAITING_FOR_LOGOUT: Self = Self(0x0c);
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::DATA_DIGEST_ERROR => "the data digest was wrong",
            Self::SNACK_REJECT => "the SNACK cannot be served",
            Self::PROTOCOL_ERROR => "protocol error",
            Self::COMMAND_NOT_SUPPORTED => "command not supported",
            Self::IMMEDIATE_COMMAND_REJECT => "too many immediate commands",
            Self::TASK_IN_PROGRESS => "the task is in progress",
            Self::INVALID_DATA_ACK => "invalid data acknowledgement",
            Self::INVALID_PDU_FIELD => "invalid PDU field",
            Self::OUT_OF_RESOURCES => "out of resources",
            Self::NEGOTIATION_RESET => "the negotiation is reset",
            Self::WAITING_FOR_LOGOUT => "waiting for logout",
            Self(reason) => return write!(f, "reason {reason:#04x}"),
        };
        f.write_str(name)
    }
}

/// Reject (11.17). Its data segment begins with the header of what was rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// Why.
    pub reason: RejectReason,
    /// The number of this status.
    pub stat_sn: Serial,
    /// Which commands the target takes now.
    pub window: Window,
    /// `DataSN/R2TSN`: with a rejected data acknowledgement, the number that it should have said.
    pub data_sn: u32,
}

impl Reject {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        response(REJECT, Tag::RESERVED, self.stat_sn, self.window)
            .put::<2, 1>([self.reason.0])
            .put_u32::<36>(self.data_sn)
    }

    pub(super) fn of(bhs: &Bhs) -> Self {
        Self {
            reason: RejectReason(bhs.byte::<2>()),
            stat_sn: bhs.serial::<24>(),
            window: Window::of(bhs),
            data_sn: bhs.u32::<36>(),
        }
    }
}
