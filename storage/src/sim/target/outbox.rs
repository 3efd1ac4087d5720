//! What a target is going to send: for each task in order, among tasks in any.

use std::collections::VecDeque;

use super::negotiation::Negotiated;
use super::options::Pace;
use super::refusal::GOOD;
use super::task::Answer;
use crate::iscsi::pdu::{
    DataIn, DataInStatus, Lun, Residual, ScsiCommand, ScsiResponse, Serial, ServiceResponse, Tag, TargetPdu,
    Window,
};
use crate::sim::dice::Dice;

/// A PDU whose StatSN and window are filled in when it is sent, and its data segment.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    pub(super) pdu: TargetPdu,
    pub(super) data: Vec<u8>,
}

/// Streams of PDUs by their Initiator Task Tag.
#[derive(Debug, Default)]
pub(super) struct Outbox(Vec<(u32, VecDeque<Outgoing>)>);

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many streams there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn has(&self, tag: u32) -> bool {
        self.0.iter().any(|(of, _)| *of == tag)
    }

    /// Puts PDUs behind those of the same task.
    pub(super) fn push(&mut self, tag: u32, pdus: impl IntoIterator<Item = Outgoing>) {
        match self.0.iter_mut().find(|(of, _)| *of == tag) {
            Some((_, stream)) => stream.extend(pdus),
            None => self.0.push((tag, pdus.into_iter().collect())),
        }
    }

    /// Forgets what was to be sent of a task.
    pub(super) fn forget(&mut self, tag: u32) {
        self.0.retain(|(of, _)| *of != tag);
    }

    /// What is sent next.
    pub(super) fn pop(&mut self, pace: Pace, dice: &mut Dice) -> Option<Outgoing> {
        if self.0.is_empty() {
            return None;
        }
        let place = match pace {
            Pace::Prompt => 0,
            Pace::Dice => dice.index(self.0.len()),
        };
        let (_, stream) = self.0.get_mut(place)?;
        let pdu = stream.pop_front();
        if stream.is_empty() {
            self.0.remove(place);
        }
        pdu
    }
}

impl Outgoing {
    /// A PDU without data.
    pub(super) fn bare(pdu: TargetPdu) -> Self {
        Self {
            pdu,
            data: Vec::new(),
        }
    }

    /// Fills in what is known when it is sent. The number of the next status goes on if this is one.
    pub(super) fn stamp(&mut self, next: &mut Serial, window: Window) {
        let stat_sn = *next;
        if self.pdu.status_number().is_some() {
            *next = next.next();
        }
        match &mut self.pdu {
            TargetPdu::DataIn(pdu) => {
                pdu.window = window;
                if let Some(status) = &mut pdu.status {
                    status.stat_sn = stat_sn;
                }
            }
            TargetPdu::ScsiResponse(pdu) => (pdu.stat_sn, pdu.window) = (stat_sn, window),
            TargetPdu::R2t(pdu) => (pdu.stat_sn, pdu.window) = (stat_sn, window),
            TargetPdu::NopIn(pdu) => (pdu.stat_sn, pdu.window) = (stat_sn, window),
            TargetPdu::LoginResponse(pdu) => (pdu.stat_sn, pdu.window) = (stat_sn, window),
            TargetPdu::TextResponse(pdu) => (pdu.stat_sn, pdu.window) = (stat_sn, window),
            TargetPdu::TaskManagementResponse(pdu) => (pdu.stat_sn, pdu.window) = (stat_sn, window),
            TargetPdu::LogoutResponse(pdu) => (pdu.stat_sn, pdu.window) = (stat_sn, window),
            TargetPdu::Async(pdu) => (pdu.stat_sn, pdu.window) = (stat_sn, window),
            TargetPdu::Reject(pdu) => (pdu.stat_sn, pdu.window) = (stat_sn, window),
        }
    }

    /// The command that has ended with it.
    pub(super) fn ended(&self) -> Option<u32> {
        match &self.pdu {
            TargetPdu::ScsiResponse(pdu) => Some(pdu.initiator_task_tag.0),
            TargetPdu::DataIn(pdu) => pdu.status.map(|_| pdu.initiator_task_tag.0),
            _ => None,
        }
    }
}

/// The PDUs that tell of the end of a command, for which there were so many R2Ts.
pub(super) fn replies(
    command: &ScsiCommand,
    r2t_count: u32,
    answer: Answer,
    negotiated: &Negotiated,
    pace: Pace,
    dice: &mut Dice,
) -> Vec<Outgoing> {
    let expected = command.expected_data_transfer_length;
    let (mut data, refusal) = match answer {
        Ok(data) => (data, None),
        Err(refusal) => (Vec::new(), Some(refusal)),
    };
    let residual = residual(command, &data, refusal.is_some());
    data.truncate(usize::try_from(expected).expect("this is a 64-bit monitor"));
    let mut pdus = data_ins(command, &data, negotiated, pace, dice);
    let joins = pace == Pace::Prompt || dice.one_in(2);
    let data_in_count = u32::try_from(pdus.len()).expect("a transfer has a length of 32 bits");
    if let Some(Outgoing {
        pdu: TargetPdu::DataIn(last),
        ..
    }) = pdus.last_mut()
        && joins
    {
        last.status = Some(DataInStatus {
            status: GOOD,
            stat_sn: Serial(0),
            residual,
        });
        return pdus;
    }
    pdus.push(Outgoing {
        pdu: TargetPdu::ScsiResponse(ScsiResponse {
            response: ServiceResponse::COMMAND_COMPLETED,
            status: refusal.map_or(GOOD, |refusal| refusal.status()),
            residual,
            initiator_task_tag: command.initiator_task_tag,
            stat_sn: Serial(0),
            window: Window::default(),
            exp_data_sn: data_in_count + r2t_count,
        }),
        data: refusal.map_or(Vec::new(), |refusal| refusal.sense_segment()),
    });
    pdus
}

fn residual(command: &ScsiCommand, data: &[u8], is_refused: bool) -> Residual {
    let expected = command.expected_data_transfer_length;
    let moved = match (command.read, is_refused) {
        (true, _) => u32::try_from(data.len()).expect("a transfer has a length of 32 bits"),
        (false, true) => 0,
        (false, false) => expected,
    };
    match moved.cmp(&expected) {
        std::cmp::Ordering::Less => Residual::Underflow(expected - moved),
        std::cmp::Ordering::Equal => Residual::None,
        std::cmp::Ordering::Greater => Residual::Overflow(moved - expected),
    }
}

/// Data-In PDUs of at most what the initiator takes, in sequences of at most a burst.
fn data_ins(
    command: &ScsiCommand,
    data: &[u8],
    negotiated: &Negotiated,
    pace: Pace,
    dice: &mut Dice,
) -> Vec<Outgoing> {
    let most = negotiated.max_recv_data_segment_bytes;
    let piece = match pace {
        Pace::Prompt => most,
        Pace::Dice => most.min(dice.pick(&[512, 1000, 4096, u32::MAX])),
    };
    let index = |bytes: u32| usize::try_from(bytes).expect("this is a 64-bit monitor");
    let mut pdus = Vec::new();
    let mut offset = 0;
    for burst in data.chunks(index(negotiated.max_burst_bytes)) {
        let pieces = burst.chunks(index(piece));
        let last = pieces.len() - 1;
        for (number, bytes) in pieces.enumerate() {
            let data_sn = u32::try_from(pdus.len()).expect("a transfer has a length of 32 bits");
            let pdu = TargetPdu::DataIn(DataIn {
                is_final: number == last,
                acknowledge: false,
                status: None,
                lun: Lun::default(),
                initiator_task_tag: command.initiator_task_tag,
                target_transfer_tag: Tag::RESERVED,
                window: Window::default(),
                data_sn,
                buffer_offset: offset,
            });
            pdus.push(Outgoing {
                pdu,
                data: bytes.to_vec(),
            });
            offset += u32::try_from(bytes.len()).expect("a piece is short");
        }
    }
    pdus
}
