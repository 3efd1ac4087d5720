//! What an initiator sends.

use super::{Bhs, Isid, Lun, PduError, Serial, Tag, TaskAttribute, Transit};

const NOP_OUT: u8 = 0x00;
const SCSI_COMMAND: u8 = 0x01;
const TASK_MANAGEMENT_REQUEST: u8 = 0x02;
const LOGIN_REQUEST: u8 = 0x03;
const TEXT_REQUEST: u8 = 0x04;
const DATA_OUT: u8 = 0x05;
const LOGOUT_REQUEST: u8 = 0x06;

/// F: the last PDU of its sequence. In PDUs that are always alone it is always set.
const FINAL: u8 = 0x80;
const CONTINUE: u8 = 0x40;

/// A PDU as a target reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the struct of its name")]
pub enum InitiatorPdu {
    ScsiCommand(ScsiCommand),
    DataOut(DataOut),
    NopOut(NopOut),
    LoginRequest(LoginRequest),
    TextRequest(TextRequest),
    TaskManagementRequest(TaskManagementRequest),
    LogoutRequest(LogoutRequest),
}

impl InitiatorPdu {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// The operation is none of an initiator (or SNACK, which error recovery level 0 has not), or a field has a value
    /// that is not allowed.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        match bhs.opcode() {
            NOP_OUT => Ok(Self::NopOut(NopOut::of(bhs))),
            SCSI_COMMAND => ScsiCommand::of(bhs).map(Self::ScsiCommand),
            TASK_MANAGEMENT_REQUEST => Ok(Self::TaskManagementRequest(TaskManagementRequest::of(bhs))),
            LOGIN_REQUEST => LoginRequest::of(bhs).map(Self::LoginRequest),
            TEXT_REQUEST => Ok(Self::TextRequest(TextRequest::of(bhs))),
            DATA_OUT => Ok(Self::DataOut(DataOut::of(bhs))),
            LOGOUT_REQUEST => Ok(Self::LogoutRequest(LogoutRequest::of(bhs))),
            opcode => Err(PduError::Opcode(opcode)),
        }
    }

    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        match self {
            Self::ScsiCommand(pdu) => pdu.bhs(),
            Self::DataOut(pdu) => pdu.bhs(),
            Self::NopOut(pdu) => pdu.bhs(),
            Self::LoginRequest(pdu) => pdu.bhs(),
            Self::TextRequest(pdu) => pdu.bhs(),
            Self::TaskManagementRequest(pdu) => pdu.bhs(),
            Self::LogoutRequest(pdu) => pdu.bhs(),
        }
    }
}

/// SCSI Command (11.3). Its data segment is immediate data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScsiCommand {
    /// I: it does not wait for its turn.
    pub immediate: bool,
    /// F: no unsolicited Data-Out follows.
    pub is_final: bool,
    /// R: data is expected to come.
    pub read: bool,
    /// W: data is expected to go.
    pub write: bool,
    /// ATTR.
    pub attribute: TaskAttribute,
    /// Which logical unit.
    pub lun: Lun,
    /// Names the task.
    pub initiator_task_tag: Tag,
    /// In bytes, of the direction that there is.
    pub expected_data_transfer_length: u32,
    /// Its turn.
    pub cmd_sn: Serial,
    /// The status that is waited for.
    pub exp_stat_sn: Serial,
    /// The command descriptor block, with zeros behind it.
    pub cdb: [u8; 16],
}

impl ScsiCommand {
    const READ: u8 = 0x40;
    const WRITE: u8 = 0x20;

    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        let flags = flag(self.is_final, FINAL)
            | flag(self.read, Self::READ)
            | flag(self.write, Self::WRITE)
            | self.attribute.bits();
        command(SCSI_COMMAND, self.immediate)
            .put::<1, 1>([flags])
            .put_lun(self.lun)
            .put_u32::<16>(self.initiator_task_tag.0)
            .put_u32::<20>(self.expected_data_transfer_length)
            .put_u32::<24>(self.cmd_sn.0)
            .put_u32::<28>(self.exp_stat_sn.0)
            .put::<32, 16>(self.cdb)
    }

    fn of(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            immediate: bhs.is_immediate(),
            is_final: bhs.has(FINAL),
            read: bhs.has(Self::READ),
            write: bhs.has(Self::WRITE),
            attribute: TaskAttribute::of(bhs)?,
            lun: bhs.lun(),
            initiator_task_tag: bhs.initiator_task_tag(),
            expected_data_transfer_length: bhs.u32::<20>(),
            cmd_sn: bhs.serial::<24>(),
            exp_stat_sn: bhs.serial::<28>(),
            cdb: bhs.at::<32, 16>(),
        })
    }
}

/// SCSI Data-Out (11.7). Its data segment is the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataOut {
    /// F: the last of its sequence, that is of the answer to an R2T or of the unsolicited data.
    pub is_final: bool,
    /// The one of the R2T, or zeros with unsolicited data.
    pub lun: Lun,
    /// The task that it is for.
    pub initiator_task_tag: Tag,
    /// The one of the R2T; reserved with unsolicited data.
    pub target_transfer_tag: Tag,
    /// The status that is waited for.
    pub exp_stat_sn: Serial,
    /// Its place in its sequence, from 0.
    pub data_sn: u32,
    /// Its place in the command's data, in bytes.
    pub buffer_offset: u32,
}

impl DataOut {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        Bhs::of(DATA_OUT)
            .put::<1, 1>([flag(self.is_final, FINAL)])
            .put_lun(self.lun)
            .put_u32::<16>(self.initiator_task_tag.0)
            .put_u32::<20>(self.target_transfer_tag.0)
            .put_u32::<28>(self.exp_stat_sn.0)
            .put_u32::<36>(self.data_sn)
            .put_u32::<40>(self.buffer_offset)
    }

    fn of(bhs: &Bhs) -> Self {
        Self {
            is_final: bhs.has(FINAL),
            lun: bhs.lun(),
            initiator_task_tag: bhs.initiator_task_tag(),
            target_transfer_tag: bhs.tag::<20>(),
            exp_stat_sn: bhs.serial::<28>(),
            data_sn: bhs.u32::<36>(),
            buffer_offset: bhs.u32::<40>(),
        }
    }
}

/// NOP-Out (11.18): a ping, or the answer to one. Its data segment is to be sent back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NopOut {
    /// I: it does not wait for its turn. Set in an answer.
    pub immediate: bool,
    /// The one of the NOP-In that it answers, or zeros.
    pub lun: Lun,
    /// Reserved: no answer is wanted.
    pub initiator_task_tag: Tag,
    /// The one of the NOP-In that it answers, or reserved.
    pub target_transfer_tag: Tag,
    /// Its turn.
    pub cmd_sn: Serial,
    /// The status that is waited for.
    pub exp_stat_sn: Serial,
}

impl NopOut {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        command(NOP_OUT, self.immediate)
            .put::<1, 1>([FINAL])
            .put_lun(self.lun)
            .put_u32::<16>(self.initiator_task_tag.0)
            .put_u32::<20>(self.target_transfer_tag.0)
            .put_u32::<24>(self.cmd_sn.0)
            .put_u32::<28>(self.exp_stat_sn.0)
    }

    fn of(bhs: &Bhs) -> Self {
        Self {
            immediate: bhs.is_immediate(),
            lun: bhs.lun(),
            initiator_task_tag: bhs.initiator_task_tag(),
            target_transfer_tag: bhs.tag::<20>(),
            cmd_sn: bhs.serial::<24>(),
            exp_stat_sn: bhs.serial::<28>(),
        }
    }
}

/// Login Request (11.12). Its data segment is text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoginRequest {
    /// T, C, CSG and NSG.
    pub transit: Transit,
    /// Highest version of the protocol that the initiator speaks.
    pub version_max: u8,
    /// Lowest version of the protocol that the initiator speaks.
    pub version_min: u8,
    /// The initiator's part of the session's name.
    pub isid: Isid,
    /// The target's part of the session's name; 0 asks for a new session.
    pub tsih: u16,
    /// Names the login.
    pub initiator_task_tag: Tag,
    /// Names the connection in its session.
    pub cid: u16,
    /// The turn of the session's first command.
    pub cmd_sn: Serial,
    /// The status that is waited for. In the first request it means nothing.
    pub exp_stat_sn: Serial,
}

impl LoginRequest {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        command(LOGIN_REQUEST, true)
            .put::<1, 3>([self.transit.bits(), self.version_max, self.version_min])
            .put::<8, 6>(self.isid.0)
            .put::<14, 2>(self.tsih.to_be_bytes())
            .put_u32::<16>(self.initiator_task_tag.0)
            .put::<20, 2>(self.cid.to_be_bytes())
            .put_u32::<24>(self.cmd_sn.0)
            .put_u32::<28>(self.exp_stat_sn.0)
    }

    fn of(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            transit: Transit::of(bhs)?,
            version_max: bhs.byte::<2>(),
            version_min: bhs.byte::<3>(),
            isid: Isid(bhs.at::<8, 6>()),
            tsih: bhs.u16::<14>(),
            initiator_task_tag: bhs.initiator_task_tag(),
            cid: bhs.u16::<20>(),
            cmd_sn: bhs.serial::<24>(),
            exp_stat_sn: bhs.serial::<28>(),
        })
    }
}

/// Text Request (11.10). Its data segment is text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextRequest {
    /// I: it does not wait for its turn.
    pub immediate: bool,
    /// F: the initiator has no more to say.
    pub is_final: bool,
    /// C: the text is not whole yet.
    pub is_continued: bool,
    /// The one of the response that it goes on from, or zeros.
    pub lun: Lun,
    /// Names the exchange.
    pub initiator_task_tag: Tag,
    /// The one of the response that it goes on from, or reserved.
    pub target_transfer_tag: Tag,
    /// Its turn.
    pub cmd_sn: Serial,
    /// The status that is waited for.
    pub exp_stat_sn: Serial,
}

impl TextRequest {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        command(TEXT_REQUEST, self.immediate)
            .put::<1, 1>([flag(self.is_final, FINAL) | flag(self.is_continued, CONTINUE)])
            .put_lun(self.lun)
            .put_u32::<16>(self.initiator_task_tag.0)
            .put_u32::<20>(self.target_transfer_tag.0)
            .put_u32::<24>(self.cmd_sn.0)
            .put_u32::<28>(self.exp_stat_sn.0)
    }

    fn of(bhs: &Bhs) -> Self {
        Self {
            immediate: bhs.is_immediate(),
            is_final: bhs.has(FINAL),
            is_continued: bhs.has(CONTINUE),
            lun: bhs.lun(),
            initiator_task_tag: bhs.initiator_task_tag(),
            target_transfer_tag: bhs.tag::<20>(),
            cmd_sn: bhs.serial::<24>(),
            exp_stat_sn: bhs.serial::<28>(),
        }
    }
}

/// What is to be done with tasks (11.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskFunction(pub u8);

#[expect(missing_docs, reason = "RFC 7143, 11.5.1 says what each is")]
impl TaskFunction {
    pub const ABORT_TASK: Self = Self(1);
    pub const ABORT_TASK_SET: Self = Self(2);
    pub const CLEAR_ACA: Self = Self(3);
    pub const CLEAR_TASK_SET: Self = Self(4);
    pub const LOGICAL_UNIT_RESET: Self = Self(5);
    pub const TARGET_WARM_RESET: Self = Self(6);
    pub const TARGET_COLD_RESET: Self = Self(7);
    pub const TASK_REASSIGN: Self = Self(8);

    const BITS: u8 = 0x7f;
}

/// Task Management Function Request (11.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskManagementRequest {
    /// I: it does not wait for its turn.
    pub immediate: bool,
    /// What is to be done; seven bits.
    pub function: TaskFunction,
    /// Which logical unit's tasks.
    pub lun: Lun,
    /// Names the request.
    pub initiator_task_tag: Tag,
    /// The task that is meant, with [`TaskFunction::ABORT_TASK`]; reserved otherwise.
    pub referenced_task_tag: Tag,
    /// Its turn.
    pub cmd_sn: Serial,
    /// The status that is waited for.
    pub exp_stat_sn: Serial,
    /// The turn of the task that is meant.
    pub ref_cmd_sn: Serial,
    /// Of a task that is reassigned: the data that is waited for.
    pub exp_data_sn: u32,
}

impl TaskManagementRequest {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        command(TASK_MANAGEMENT_REQUEST, self.immediate)
            .put::<1, 1>([FINAL | self.function.0 & TaskFunction::BITS])
            .put_lun(self.lun)
            .put_u32::<16>(self.initiator_task_tag.0)
            .put_u32::<20>(self.referenced_task_tag.0)
            .put_u32::<24>(self.cmd_sn.0)
            .put_u32::<28>(self.exp_stat_sn.0)
            .put_u32::<32>(self.ref_cmd_sn.0)
            .put_u32::<36>(self.exp_data_sn)
    }

    fn of(bhs: &Bhs) -> Self {
        Self {
            immediate: bhs.is_immediate(),
            function: TaskFunction(bhs.byte::<1>() & TaskFunction::BITS),
            lun: bhs.lun(),
            initiator_task_tag: bhs.initiator_task_tag(),
            referenced_task_tag: bhs.tag::<20>(),
            cmd_sn: bhs.serial::<24>(),
            exp_stat_sn: bhs.serial::<28>(),
            ref_cmd_sn: bhs.serial::<32>(),
            exp_data_sn: bhs.u32::<36>(),
        }
    }
}

/// What is to end (11.14.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogoutReason(pub u8);

#[expect(missing_docs, reason = "RFC 7143, 11.14.1 says what each is")]
impl LogoutReason {
    pub const CLOSE_SESSION: Self = Self(0);
    pub const CLOSE_CONNECTION: Self = Self(1);
    pub const REMOVE_FOR_RECOVERY: Self = Self(2);

    const BITS: u8 = 0x7f;
}

/// Logout Request (11.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogoutRequest {
    /// I: it does not wait for its turn.
    pub immediate: bool,
    /// What is to end; seven bits.
    pub reason: LogoutReason,
    /// Names the request.
    pub initiator_task_tag: Tag,
    /// The connection, if it is one that is to end.
    pub cid: u16,
    /// Its turn.
    pub cmd_sn: Serial,
    /// The status that is waited for.
    pub exp_stat_sn: Serial,
}

impl LogoutRequest {
    /// The header of it.
    pub fn bhs(&self) -> Bhs {
        command(LOGOUT_REQUEST, self.immediate)
            .put::<1, 1>([FINAL | self.reason.0 & LogoutReason::BITS])
            .put_u32::<16>(self.initiator_task_tag.0)
            .put::<20, 2>(self.cid.to_be_bytes())
            .put_u32::<24>(self.cmd_sn.0)
            .put_u32::<28>(self.exp_stat_sn.0)
    }

    fn of(bhs: &Bhs) -> Self {
        Self {
            immediate: bhs.is_immediate(),
            reason: LogoutReason(bhs.byte::<1>() & LogoutReason::BITS),
            initiator_task_tag: bhs.initiator_task_tag(),
            cid: bhs.u16::<20>(),
            cmd_sn: bhs.serial::<24>(),
            exp_stat_sn: bhs.serial::<28>(),
        }
    }
}

fn command(opcode: u8, immediate: bool) -> Bhs {
    Bhs::of(opcode | flag(immediate, Bhs::IMMEDIATE))
}

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}
