//! What a target sends.

use std::fmt;

use super::{Bhs, Isid, Lun, PduError, Residual, Serial, Stage, Tag, Transit, Window};

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

/// Whether a command was carried out at all (11.4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceResponse(pub u8);

#[expect(missing_docs, reason = "RFC 7143, 11.4.3 says what each is")]
impl ServiceResponse {
    pub const COMMAND_COMPLETED: Self = Self(0);
    pub const TARGET_FAILURE: Self = Self(1);
}

/// SCSI Response (11.4). Its data segment is the length of the sense data (two bytes), the sense data, and what more
/// the target has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScsiResponse {
    /// Only with [`ServiceResponse::COMMAND_COMPLETED`] does the status mean something.
    pub response: ServiceResponse,
    /// As SAM-5 numbers it.
    pub status: u8,
    /// What was not transferred. Of a bidirectional command: of what it wrote.
    pub residual: Residual,
    /// The task that has ended.
    pub initiator_task_tag: Tag,
    /// The number of this status.
    pub stat_sn: Serial,
    /// Which commands the target takes now.
    pub window: Window,
    /// How many R2T and Data-In PDUs the target has sent for the command.
    pub exp_data_sn: u32,
}

impl ScsiResponse {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        response(SCSI_RESPONSE, self.initiator_task_tag, self.stat_sn, self.window)
            .put::<1, 3>([FINAL | self.residual.bits(), self.response.0, self.status])
            .put_u32::<36>(self.exp_data_sn)
            .put_u32::<44>(self.residual.count())
    }

    fn of(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            response: ServiceResponse(bhs.byte::<2>()),
            status: bhs.byte::<3>(),
            residual: Residual::of(bhs)?,
            initiator_task_tag: bhs.initiator_task_tag(),
            stat_sn: bhs.serial::<24>(),
            window: Window::of(bhs),
            exp_data_sn: bhs.u32::<36>(),
        })
    }
}

/// SCSI Data-In (11.7). Its data segment is the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataIn {
    /// F: the last of its sequence.
    pub is_final: bool,
    /// A: it is to be acknowledged. Not with error recovery level 0.
    pub acknowledge: bool,
    /// S: the command has ended, and well. Then it is final too.
    pub status: Option<DataInStatus>,
    /// With A: what the acknowledgement says.
    pub lun: Lun,
    /// The task that it is of.
    pub initiator_task_tag: Tag,
    /// With A: what the acknowledgement says; else reserved.
    pub target_transfer_tag: Tag,
    /// Which commands the target takes now.
    pub window: Window,
    /// Its place among the command's Data-In PDUs, from 0.
    pub data_sn: u32,
    /// Its place in the command's data, in bytes.
    pub buffer_offset: u32,
}

/// What a Data-In says of its command's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataInStatus {
    /// As SAM-5 numbers it. One with sense data has no place here.
    pub status: u8,
    /// The number of this status.
    pub stat_sn: Serial,
    /// What was not transferred.
    pub residual: Residual,
}

impl DataIn {
    const ACKNOWLEDGE: u8 = 0x40;
    const STATUS: u8 = 0x01;

    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        let flags = flag(self.is_final, FINAL) | flag(self.acknowledge, Self::ACKNOWLEDGE);
        let bhs = Bhs::of(DATA_IN)
            .put::<1, 1>([flags])
            .put_lun(self.lun)
            .put_u32::<16>(self.initiator_task_tag.0)
            .put_u32::<20>(self.target_transfer_tag.0)
            .put_u32::<36>(self.data_sn)
            .put_u32::<40>(self.buffer_offset);
        let bhs = self.window.put(bhs);
        let Some(end) = self.status else {
            return bhs;
        };
        bhs.put::<1, 1>([flags | Self::STATUS | end.residual.bits()])
            .put::<3, 1>([end.status])
            .put_u32::<24>(end.stat_sn.0)
            .put_u32::<44>(end.residual.count())
    }

    fn of(bhs: &Bhs) -> Result<Self, PduError> {
        let is_final = bhs.has(FINAL);
        let status = bhs.has(Self::STATUS).then(|| {
            if !is_final {
                return Err(PduError::Field {
                    opcode: DATA_IN,
                    field: "S without F",
                    value: 1,
                });
            }
            Ok(DataInStatus {
                status: bhs.byte::<3>(),
                stat_sn: bhs.serial::<24>(),
                residual: Residual::of(bhs)?,
            })
        });
        Ok(Self {
            is_final,
            acknowledge: bhs.has(Self::ACKNOWLEDGE),
            status: status.transpose()?,
            lun: bhs.lun(),
            initiator_task_tag: bhs.initiator_task_tag(),
            target_transfer_tag: bhs.tag::<20>(),
            window: Window::of(bhs),
            data_sn: bhs.u32::<36>(),
            buffer_offset: bhs.u32::<40>(),
        })
    }
}

/// Ready To Transfer (11.8): the target asks for data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct R2t {
    /// What the Data-Out PDUs say.
    pub lun: Lun,
    /// The task that it is of.
    pub initiator_task_tag: Tag,
    /// What the Data-Out PDUs say.
    pub target_transfer_tag: Tag,
    /// The number that the next status will have.
    pub stat_sn: Serial,
    /// Which commands the target takes now.
    pub window: Window,
    /// Its place among the command's R2T PDUs, from 0.
    pub r2t_sn: u32,
    /// The place of the data in the command's data, in bytes.
    pub buffer_offset: u32,
    /// How much of it, in bytes.
    pub desired_data_transfer_length: u32,
}

impl R2t {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        response(
            READY_TO_TRANSFER,
            self.initiator_task_tag,
            self.stat_sn,
            self.window,
        )
        .put_lun(self.lun)
        .put_u32::<20>(self.target_transfer_tag.0)
        .put_u32::<36>(self.r2t_sn)
        .put_u32::<40>(self.buffer_offset)
        .put_u32::<44>(self.desired_data_transfer_length)
    }

    fn of(bhs: &Bhs) -> Self {
        Self {
            lun: bhs.lun(),
            initiator_task_tag: bhs.initiator_task_tag(),
            target_transfer_tag: bhs.tag::<20>(),
            stat_sn: bhs.serial::<24>(),
            window: Window::of(bhs),
            r2t_sn: bhs.u32::<36>(),
            buffer_offset: bhs.u32::<40>(),
            desired_data_transfer_length: bhs.u32::<44>(),
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

/// Asynchronous Message (11.9). Its data segment is sense data, as in a [`ScsiResponse`].
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

    fn of(bhs: &Bhs) -> Self {
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

    fn of(bhs: &Bhs) -> Self {
        Self {
            reason: RejectReason(bhs.byte::<2>()),
            stat_sn: bhs.serial::<24>(),
            window: Window::of(bhs),
            data_sn: bhs.u32::<36>(),
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
