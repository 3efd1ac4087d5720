//! The data of one write on its way to the target: immediate, unsolicited, and asked for by R2T (RFC 7143, 4.2.5.2).

use std::collections::VecDeque;

use super::negotiation::Negotiated;
use super::options::Pace;
use crate::iscsi::pdu::{DataOut, R2t, ScsiCommand, Serial, Tag, Window};
use crate::sim::dice::Dice;

/// A command whose data is not all there.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) command: ScsiCommand,
    /// What has arrived, from the start on.
    data: Vec<u8>,
    /// How many Data-Outs came unasked, while more of them are to come.
    unsolicited: Option<u32>,
    asked: VecDeque<Asked>,
    /// Where the next R2T begins.
    asked_to: u32,
    r2t_sn: u32,
    /// How often the logical unit had been reset when the command came.
    pub(super) resets: u64,
    /// It is going to be refused before its data is there.
    pub(super) is_doomed: bool,
}

/// An R2T that is not answered in full.
#[derive(Debug)]
struct Asked {
    tag: Tag,
    end: u32,
    data_sn: u32,
}

/// What an initiator may not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TransferError {
    #[error("immediate data came though ImmediateData=No was agreed")]
    Immediate,
    #[error("{bytes} bytes came unasked, and FirstBurstLength is {max_bytes}")]
    FirstBurst { bytes: u32, max_bytes: u32 },
    #[error("unsolicited Data-Out was announced though InitialR2T=Yes was agreed")]
    Unsolicited,
    #[error("data ends at {end}, and the command expects to transfer {expected} bytes")]
    BeyondCommand { end: u64, expected: u32 },
    #[error("Data-Out at {offset}, where {due} was due")]
    Offset { offset: u32, due: u64 },
    #[error("Data-Out with DataSN {data_sn}, where {due} was due")]
    DataSn { data_sn: u32, due: u32 },
    #[error("Data-Out with the Target Transfer Tag {tag:#x}, where {due:#x} was due")]
    Tag { tag: u32, due: u32 },
    #[error("Data-Out goes beyond what its R2T asked for")]
    BeyondAsked,
    #[error("the F bit of Data-Out is not where its sequence ends")]
    Final,
    #[error("Data-Out came though no data is due")]
    NothingDue,
}

impl Transfer {
    /// A command with its immediate data.
    pub(super) fn new(
        command: ScsiCommand,
        data: Vec<u8>,
        negotiated: &Negotiated,
        resets: u64,
    ) -> Result<Self, TransferError> {
        if !data.is_empty() && !negotiated.immediate_data {
            return Err(TransferError::Immediate);
        }
        if !command.is_final && negotiated.initial_r2t {
            return Err(TransferError::Unsolicited);
        }
        let transfer = Self {
            command,
            data,
            unsolicited: (!command.is_final).then_some(0),
            asked: VecDeque::new(),
            asked_to: 0,
            r2t_sn: 0,
            resets,
            is_doomed: false,
        };
        transfer.check_unasked(negotiated)?;
        Ok(transfer)
    }

    /// All the data, once it is there.
    pub(super) fn take_whole(&mut self) -> Option<Vec<u8>> {
        let is_whole = self.data.len() as u64 == u64::from(self.command.expected_data_transfer_length)
            && self.unsolicited.is_none();
        is_whole.then(|| std::mem::take(&mut self.data))
    }

    /// Whether everything that was announced or asked for has come.
    pub(super) fn is_quiet(&self) -> bool {
        self.unsolicited.is_none() && self.asked.is_empty()
    }

    /// Takes data.
    pub(super) fn receive(
        &mut self,
        pdu: &DataOut,
        data: &[u8],
        negotiated: &Negotiated,
    ) -> Result<(), TransferError> {
        let due = self.data.len() as u64;
        if u64::from(pdu.buffer_offset) != due {
            return Err(TransferError::Offset {
                offset: pdu.buffer_offset,
                due,
            });
        }
        self.data.extend_from_slice(data);
        if let Some(data_sn) = self.unsolicited {
            demand_tag(pdu, Tag::RESERVED)?;
            demand_data_sn(pdu, data_sn)?;
            self.unsolicited = (!pdu.is_final).then_some(data_sn + 1);
            return self.check_unasked(negotiated);
        }
        let arrived = self.data.len() as u64;
        let asked = self.asked.front_mut().ok_or(TransferError::NothingDue)?;
        demand_tag(pdu, asked.tag)?;
        demand_data_sn(pdu, asked.data_sn)?;
        asked.data_sn += 1;
        if arrived > asked.end.into() {
            return Err(TransferError::BeyondAsked);
        }
        let is_over = arrived == u64::from(asked.end);
        if pdu.is_final != is_over {
            return Err(TransferError::Final);
        }
        if is_over {
            self.asked.pop_front();
        }
        Ok(())
    }

    /// The next R2T, if there may be one more now. Its StatSN and window are still to be filled in.
    pub(super) fn ask(
        &mut self,
        negotiated: &Negotiated,
        tag: Tag,
        pace: Pace,
        dice: &mut Dice,
    ) -> Option<R2t> {
        if self.unsolicited.is_some() {
            return None;
        }
        let arrived = u32::try_from(self.data.len()).expect("a transfer has a length of 32 bits");
        let offset = self.asked_to.max(arrived);
        let expected = self.command.expected_data_transfer_length;
        let room = usize::try_from(negotiated.max_outstanding_r2t).expect("this is a 64-bit monitor");
        if offset >= expected || self.asked.len() >= room {
            return None;
        }
        let most = (expected - offset).min(negotiated.max_burst_bytes);
        let len = match pace {
            Pace::Prompt => most,
            // Many small ones, though not thousands.
            Pace::Dice => most.min(dice.pick(&[512, 1000, 4096, u32::MAX]).max(expected / 32)),
        };
        self.asked_to = offset + len;
        self.asked.push_back(Asked {
            tag,
            end: offset + len,
            data_sn: 0,
        });
        self.r2t_sn += 1;
        Some(R2t {
            lun: self.command.lun,
            initiator_task_tag: self.command.initiator_task_tag,
            target_transfer_tag: tag,
            stat_sn: Serial(0),
            window: Window::default(),
            r2t_sn: self.r2t_sn - 1,
            buffer_offset: offset,
            desired_data_transfer_length: len,
        })
    }

    /// How many R2Ts there were.
    pub(super) fn r2t_count(&self) -> u32 {
        self.r2t_sn
    }

    /// Holds what came without an R2T to the first burst and to the command.
    fn check_unasked(&self, negotiated: &Negotiated) -> Result<(), TransferError> {
        let end = self.data.len() as u64;
        let expected = self.command.expected_data_transfer_length;
        if end > u64::from(expected) {
            return Err(TransferError::BeyondCommand { end, expected });
        }
        let bytes = u32::try_from(end).expect("it is no more than expected");
        let max_bytes = negotiated.first_burst_bytes;
        if bytes > max_bytes {
            return Err(TransferError::FirstBurst { bytes, max_bytes });
        }
        Ok(())
    }
}

fn demand_tag(pdu: &DataOut, due: Tag) -> Result<(), TransferError> {
    if pdu.target_transfer_tag == due {
        return Ok(());
    }
    Err(TransferError::Tag {
        tag: pdu.target_transfer_tag.0,
        due: due.0,
    })
}

fn demand_data_sn(pdu: &DataOut, due: u32) -> Result<(), TransferError> {
    if pdu.data_sn == due {
        return Ok(());
    }
    Err(TransferError::DataSn {
        data_sn: pdu.data_sn,
        due,
    })
}
