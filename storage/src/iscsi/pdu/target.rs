//! What a target sends.

mod notice;
mod transfer;

use super::{Bhs, Isid, Lun, PduError, Serial, Stage, Tag, Transit, Window};

pub use notice::{Async, AsyncEvent, Reject, RejectReason};
pub use transfer::{DataIn, DataInStatus, R2t, ScsiResponse, ServiceResponse};

const NOP_IN: u8 = 0x20;
const SCSI_RESPONSE: u8 = 0x21;
const TASK_MANAGEMENT_RESPONSE: u8 = 0x22;
const LOGIN_RESPONSE: u8 = 0x23;
const TEXT_RESPONSE: u8 = 0x24;
const DATA_IN: u8 = 0x25;
const LOGOUT_RESPONSE: u8 = 0x26;
const READY_TO_TRANSFER: u8 = 0x31;
const ASYNC: u8 = 0x32;
const REJECT: u8 = 0x3f;

/// F: the last PDU of its sequence. In PDUs that are always alone it is always set.
const FINAL: u8 = 0x80;
const CONTINUE: u8 = 0x40;

/// A PDU as an initiator reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the struct of its name")]
pub enum TargetPdu {
    ScsiResponse(ScsiResponse),
    DataIn(DataIn),
    R2t(R2t),
    NopIn(NopIn),
    LoginResponse(LoginResponse),
    TextResponse(TextResponse),
    TaskManagementResponse(TaskManagementResponse),
    LogoutResponse(LogoutResponse),
    Async(Async),
    Reject(Reject),
}

impl TargetPdu {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// The operation is none of a target, or a field has a value that is not allowed.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        match bhs.opcode() {
            NOP_IN => Ok(Self::NopIn(NopIn::of(bhs))),
            SCSI_RESPONSE => ScsiResponse::of(bhs).map(Self::ScsiResponse),
            TASK_MANAGEMENT_RESPONSE => Ok(Self::TaskManagementResponse(TaskManagementResponse::of(bhs))),
            LOGIN_RESPONSE => LoginResponse::of(bhs).map(Self::LoginResponse),
            TEXT_RESPONSE => Ok(Self::TextResponse(TextResponse::of(bhs))),
            DATA_IN => DataIn::of(bhs).map(Self::DataIn),
            LOGOUT_RESPONSE => Ok(Self::LogoutResponse(LogoutResponse::of(bhs))),
            READY_TO_TRANSFER => Ok(Self::R2t(R2t::of(bhs))),
            ASYNC => Ok(Self::Async(Async::of(bhs))),
            REJECT => Ok(Self::Reject(Reject::of(bhs))),
            opcode => Err(PduError::Opcode(opcode)),
        }
    }

    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        match self {
            Self::ScsiResponse(pdu) => pdu.bhs(),
            Self::DataIn(pdu) => pdu.bhs(),
            Self::R2t(pdu) => pdu.bhs(),
            Self::NopIn(pdu) => pdu.bhs(),
            Self::LoginResponse(pdu) => pdu.bhs(),
            Self::TextResponse(pdu) => pdu.bhs(),
            Self::TaskManagementResponse(pdu) => pdu.bhs(),
            Self::LogoutResponse(pdu) => pdu.bhs(),
            Self::Async(pdu) => pdu.bhs(),
            Self::Reject(pdu) => pdu.bhs(),
        }
    }

    /// Which commands the target takes now: every PDU says it.
    pub fn window(&self) -> Window {
        match self {
            Self::ScsiResponse(pdu) => pdu.window,
            Self::DataIn(pdu) => pdu.window,
            Self::R2t(pdu) => pdu.window,
            Self::NopIn(pdu) => pdu.window,
            Self::LoginResponse(pdu) => pdu.window,
            Self::TextResponse(pdu) => pdu.window,
            Self::TaskManagementResponse(pdu) => pdu.window,
            Self::LogoutResponse(pdu) => pdu.window,
            Self::Async(pdu) => pdu.window,
            Self::Reject(pdu) => pdu.window,
        }
    }

    /// The number of the status that it brings, which the initiator acknowledges: `None` of an R2T, of a Data-In without
    /// status and of a NOP-In that answers nothing, which do not use their `StatSN` up.
    pub fn status_number(&self) -> Option<Serial> {
        match self {
            Self::ScsiResponse(pdu) => Some(pdu.stat_sn),
            Self::DataIn(pdu) => pdu.status.map(|status| status.stat_sn),
            Self::NopIn(pdu) => (pdu.initiator_task_tag != Tag::RESERVED).then_some(pdu.stat_sn),
            Self::LoginResponse(pdu) => Some(pdu.stat_sn),
            Self::TextResponse(pdu) => Some(pdu.stat_sn),
            Self::TaskManagementResponse(pdu) => Some(pdu.stat_sn),
            Self::LogoutResponse(pdu) => Some(pdu.stat_sn),
            Self::Async(pdu) => Some(pdu.stat_sn),
            Self::Reject(pdu) => Some(pdu.stat_sn),
            Self::R2t(_) => None,
        }
    }
}

/// NOP-In (11.19): the answer to a ping, or a ping. Its data segment is what the ping had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NopIn {
    /// What an answer is to say.
    pub lun: Lun,
    /// The one of the NOP-Out that it answers, or reserved.
    pub initiator_task_tag: Tag,
    /// Reserved: no answer is wanted.
    pub target_transfer_tag: Tag,
    /// The number of this status; of a ping the one that the next will have.
    pub stat_sn: Serial,
    /// Which commands the target takes now.
    pub window: Window,
}

impl NopIn {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        response(NOP_IN, self.initiator_task_tag, self.stat_sn, self.window)
            .put_lun(self.lun)
            .put_u32::<20>(self.target_transfer_tag.0)
    }

    fn of(bhs: &Bhs) -> Self {
        Self {
            lun: bhs.lun(),
            initiator_task_tag: bhs.initiator_task_tag(),
            target_transfer_tag: bhs.tag::<20>(),
            stat_sn: bhs.serial::<24>(),
            window: Window::of(bhs),
        }
    }
}

/// Login Response (11.13). Its data segment is text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoginResponse {
    /// T, C, CSG and NSG. They mean nothing when the status is no success.
    pub transit: Transit,
    /// Highest version of the protocol that the target speaks.
    pub version_max: u8,
    /// The version that is spoken.
    pub version_active: u8,
    /// The initiator's part of the session's name.
    pub isid: Isid,
    /// The target's part of the session's name, in the last response.
    pub tsih: u16,
    /// Names the login.
    pub initiator_task_tag: Tag,
    /// The number of this status.
    pub stat_sn: Serial,
    /// Which commands the target takes.
    pub window: Window,
    /// 0: success, 1: redirection, 2: the initiator's fault, 3: the target's.
    pub status_class: u8,
    /// What it was, in its class (11.13.5).
    pub status_detail: u8,
}

impl LoginResponse {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        response(LOGIN_RESPONSE, self.initiator_task_tag, self.stat_sn, self.window)
            .put::<1, 3>([self.transit.bits(), self.version_max, self.version_active])
            .put::<8, 6>(self.isid.0)
            .put::<14, 2>(self.tsih.to_be_bytes())
            .put::<36, 2>([self.status_class, self.status_detail])
    }

    fn of(bhs: &Bhs) -> Result<Self, PduError> {
        let [status_class, status_detail] = bhs.at::<36, 2>();
        let transit = match Transit::of(bhs) {
            // A refusal is to be understood whatever stage it says.
            Err(_) if status_class != 0 => Transit::Stay(Stage::SecurityNegotiation),
            transit => transit?,
        };
        Ok(Self {
            transit,
            version_max: bhs.byte::<2>(),
            version_active: bhs.byte::<3>(),
            isid: Isid(bhs.at::<8, 6>()),
            tsih: bhs.u16::<14>(),
            initiator_task_tag: bhs.initiator_task_tag(),
            stat_sn: bhs.serial::<24>(),
            window: Window::of(bhs),
            status_class,
            status_detail,
        })
    }
}

/// Text Response (11.11). Its data segment is text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextResponse {
    /// F: the target has no more to say.
    pub is_final: bool,
    /// C: the text is not whole yet.
    pub is_continued: bool,
    /// What the next request is to say.
    pub lun: Lun,
    /// Names the exchange.
    pub initiator_task_tag: Tag,
    /// What the next request is to say; reserved if this ends the exchange.
    pub target_transfer_tag: Tag,
    /// The number of this status.
    pub stat_sn: Serial,
    /// Which commands the target takes now.
    pub window: Window,
}

impl TextResponse {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        response(TEXT_RESPONSE, self.initiator_task_tag, self.stat_sn, self.window)
            .put::<1, 1>([flag(self.is_final, FINAL) | flag(self.is_continued, CONTINUE)])
            .put_lun(self.lun)
            .put_u32::<20>(self.target_transfer_tag.0)
    }

    fn of(bhs: &Bhs) -> Self {
        Self {
            is_final: bhs.has(FINAL),
            is_continued: bhs.has(CONTINUE),
            lun: bhs.lun(),
            initiator_task_tag: bhs.initiator_task_tag(),
            target_transfer_tag: bhs.tag::<20>(),
            stat_sn: bhs.serial::<24>(),
            window: Window::of(bhs),
        }
    }
}

/// What came of a task management function (11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskOutcome(pub u8);

#[expect(missing_docs, reason = "RFC 7143, 11.6.1 says what each is")]
impl TaskOutcome {
    pub const FUNCTION_COMPLETE: Self = Self(0);
    pub const TASK_DOES_NOT_EXIST: Self = Self(1);
    pub const LUN_DOES_NOT_EXIST: Self = Self(2);
    pub const TASK_STILL_ALLEGIANT: Self = Self(3);
    pub const REASSIGNMENT_NOT_SUPPORTED: Self = Self(4);
    pub const FUNCTION_NOT_SUPPORTED: Self = Self(5);
    pub const AUTHORIZATION_FAILED: Self = Self(6);
    pub const FUNCTION_REJECTED: Self = Self(255);
}

/// Task Management Function Response (11.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskManagementResponse {
    /// What came of it.
    pub response: TaskOutcome,
    /// The request that it answers.
    pub initiator_task_tag: Tag,
    /// The number of this status.
    pub stat_sn: Serial,
    /// Which commands the target takes now.
    pub window: Window,
}

impl TaskManagementResponse {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        response(
            TASK_MANAGEMENT_RESPONSE,
            self.initiator_task_tag,
            self.stat_sn,
            self.window,
        )
        .put::<2, 1>([self.response.0])
    }

    fn of(bhs: &Bhs) -> Self {
        Self {
            response: TaskOutcome(bhs.byte::<2>()),
            initiator_task_tag: bhs.initiator_task_tag(),
            stat_sn: bhs.serial::<24>(),
            window: Window::of(bhs),
        }
    }
}

/// What came of a logout (11.15.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogoutOutcome(pub u8);

#[expect(missing_docs, reason = "RFC 7143, 11.15.1 says what each is")]
impl LogoutOutcome {
    pub const CLOSED: Self = Self(0);
    pub const CID_NOT_FOUND: Self = Self(1);
    pub const RECOVERY_NOT_SUPPORTED: Self = Self(2);
    pub const CLEANUP_FAILED: Self = Self(3);
}

/// Logout Response (11.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogoutResponse {
    /// What came of it.
    pub response: LogoutOutcome,
    /// The request that it answers.
    pub initiator_task_tag: Tag,
    /// The number of this status.
    pub stat_sn: Serial,
    /// Which commands the target takes now.
    pub window: Window,
    /// How long to wait before a reconnect, in seconds.
    pub time2wait: u16,
    /// For how long after that the target keeps what there is, in seconds.
    pub time2retain: u16,
}

impl LogoutResponse {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        response(
            LOGOUT_RESPONSE,
            self.initiator_task_tag,
            self.stat_sn,
            self.window,
        )
        .put::<2, 1>([self.response.0])
        .put::<40, 2>(self.time2wait.to_be_bytes())
        .put::<42, 2>(self.time2retain.to_be_bytes())
    }

    fn of(bhs: &Bhs) -> Self {
        Self {
            response: LogoutOutcome(bhs.byte::<2>()),
            initiator_task_tag: bhs.initiator_task_tag(),
            stat_sn: bhs.serial::<24>(),
            window: Window::of(bhs),
            time2wait: bhs.u16::<40>(),
            time2retain: bhs.u16::<42>(),
        }
    }
}

/// What nearly all have in the same places.
fn response(opcode: u8, tag: Tag, stat_sn: Serial, window: Window) -> Bhs {
    let bhs = Bhs::of(opcode)
        .put::<1, 1>([FINAL])
        .put_u32::<16>(tag.0)
        .put_u32::<24>(stat_sn.0);
    window.put(bhs)
}

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}
