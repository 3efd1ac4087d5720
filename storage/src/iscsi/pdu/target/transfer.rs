//! What a target sends of commands: their data and their ends.

use super::{DATA_IN, FINAL, READY_TO_TRANSFER, SCSI_RESPONSE, flag, response};
use crate::iscsi::pdu::{Bhs, Lun, PduError, Residual, Serial, Tag, Window};

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

    pub(super) fn of(bhs: &Bhs) -> Result<Self, PduError> {
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

    pub(super) fn of(bhs: &Bhs) -> Result<Self, PduError> {
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

    pub(super) fn of(bhs: &Bhs) -> Self {
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
