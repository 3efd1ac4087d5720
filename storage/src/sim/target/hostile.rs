//! What becomes of well-formed PDUs under the hands of a hostile target.

use super::frame::Frame;
use super::negotiation::Digests;
use super::options::Hostility;
use super::outbox::Outgoing;
use crate::iscsi::pdu::{BHS_BYTES, LoginResponse, Serial, Stage, Tag, TargetPdu, Transit, Window};
use crate::sim::dice::Dice;

/// Spoils what passes through.
#[derive(Debug, Default)]
pub(super) struct Saboteur {
    /// What it holds back, to let it out behind the next.
    held: Vec<u8>,
}

impl Saboteur {
    /// Whether something is held back.
    pub(super) fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// What is sent in place of a PDU.
    pub(super) fn spoil(
        &mut self,
        mut out: Outgoing,
        digests: Digests,
        hostility: &Hostility,
        dice: &mut Dice,
    ) -> Vec<u8> {
        spoil_fields(&mut out, hostility, dice);
        let mut pdu = Frame {
            bhs: out.pdu.bhs(),
            data: out.data,
        }
        .bytes(digests);
        if dice.one_in(hostility.garbage_one_in) {
            let at = dice.index(BHS_BYTES);
            flip(&mut pdu, at, dice);
        }
        if dice.one_in(hostility.wrong_digest_one_in) {
            // The last bytes are a digest, if there is one.
            let at = pdu.len() - 1 - dice.index(4);
            flip(&mut pdu, at, dice);
        }
        let mut bytes = Vec::new();
        if dice.one_in(hostility.login_response_one_in) {
            bytes.extend(login_response().bytes(digests));
        }
        if dice.one_in(hostility.noise_one_in) {
            let len = 1 + dice.index(100);
            bytes.extend((0..len).map(|_| random_byte(dice)));
        }
        if dice.one_in(hostility.duplicated_one_in) {
            bytes.extend(&pdu);
        }
        if self.held.is_empty() && dice.one_in(hostility.reordered_one_in) {
            self.held = pdu;
        } else {
            bytes.extend(pdu);
            bytes.append(&mut self.held);
        }
        bytes
    }

    /// Lets out what nothing follows.
    pub(super) fn release(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }
}

/// Changes what a PDU says.
fn spoil_fields(out: &mut Outgoing, hostility: &Hostility, dice: &mut Dice) {
    if dice.one_in(hostility.wrong_tag_one_in) {
        let near = out.pdu.bhs().initiator_task_tag().0.wrapping_add(1);
        set_tag(&mut out.pdu, Tag(dice.pick(&[near, 0, 0xdead_beef])));
    }
    if dice.one_in(hostility.wrong_stat_sn_one_in) {
        let by = dice.pick(&[1, u32::MAX, 1 << 31, 1000]);
        shift_stat_sn(&mut out.pdu, by);
    }
    if dice.one_in(hostility.stray_data_one_in)
        && let TargetPdu::DataIn(pdu) = &mut out.pdu
    {
        pdu.buffer_offset = pdu
            .buffer_offset
            .wrapping_add(dice.pick(&[4, 512, 1 << 20, 0xffff_fe00]));
    }
    if dice.one_in(hostility.r2t_beyond_one_in)
        && let TargetPdu::R2t(pdu) = &mut out.pdu
    {
        let more = dice.pick(&[1, 512, 0xffff_0000]);
        if dice.one_in(2) {
            pdu.buffer_offset = pdu.buffer_offset.wrapping_add(more);
        } else {
            pdu.desired_data_transfer_length = pdu.desired_data_transfer_length.wrapping_add(more);
        }
    }
    if dice.one_in(hostility.resized_data_one_in) {
        let len = dice.pick(&[0, 1, out.data.len() / 2, out.data.len() + 4, 100_000]);
        out.data.resize(len, 0xa5);
    }
}

fn flip(pdu: &mut [u8], at: usize, dice: &mut Dice) {
    let byte = pdu.get_mut(at).expect("a PDU is longer than its header");
    *byte ^= random_byte(dice) | 1;
}

fn random_byte(dice: &mut Dice) -> u8 {
    u8::try_from(dice.below(256)).expect("it is below 256")
}

fn login_response() -> Frame {
    let response = LoginResponse {
        transit: Transit::Leave(Stage::LoginOperationalNegotiation, Stage::FullFeaturePhase),
        version_max: 0,
        version_active: 0,
        isid: crate::iscsi::pdu::Isid::default(),
        tsih: 1,
        initiator_task_tag: Tag(0),
        stat_sn: Serial(0),
        window: Window::default(),
        status_class: 0,
        status_detail: 0,
    };
    Frame {
        bhs: response.bhs(),
        data: b"MaxBurstLength=512\0".to_vec(),
    }
}

fn set_tag(pdu: &mut TargetPdu, tag: Tag) {
    match pdu {
        TargetPdu::ScsiResponse(pdu) => pdu.initiator_task_tag = tag,
        TargetPdu::DataIn(pdu) => pdu.initiator_task_tag = tag,
        TargetPdu::R2t(pdu) => pdu.initiator_task_tag = tag,
        TargetPdu::NopIn(pdu) => pdu.initiator_task_tag = tag,
        TargetPdu::LoginResponse(pdu) => pdu.initiator_task_tag = tag,
        TargetPdu::TextResponse(pdu) => pdu.initiator_task_tag = tag,
        TargetPdu::TaskManagementResponse(pdu) => pdu.initiator_task_tag = tag,
        TargetPdu::LogoutResponse(pdu) => pdu.initiator_task_tag = tag,
        // They name no task.
        TargetPdu::Async(_) | TargetPdu::Reject(_) => {}
    }
}

fn shift_stat_sn(pdu: &mut TargetPdu, by: u32) {
    let stat_sn = match pdu {
        TargetPdu::ScsiResponse(pdu) => &mut pdu.stat_sn,
        TargetPdu::DataIn(pdu) => match &mut pdu.status {
            Some(status) => &mut status.stat_sn,
            None => return,
        },
        TargetPdu::R2t(pdu) => &mut pdu.stat_sn,
        TargetPdu::NopIn(pdu) => &mut pdu.stat_sn,
        TargetPdu::LoginResponse(pdu) => &mut pdu.stat_sn,
        TargetPdu::TextResponse(pdu) => &mut pdu.stat_sn,
        TargetPdu::TaskManagementResponse(pdu) => &mut pdu.stat_sn,
        TargetPdu::LogoutResponse(pdu) => &mut pdu.stat_sn,
        TargetPdu::Async(pdu) => &mut pdu.stat_sn,
        TargetPdu::Reject(pdu) => &mut pdu.stat_sn,
    };
    *stat_sn = stat_sn.plus(by);
}
