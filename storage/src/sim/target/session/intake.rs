//! What a session takes from its initiator.

use super::{Session, SessionError};
use crate::iscsi::pdu::{
    Bhs, DataOut, InitiatorPdu, LogoutOutcome, LogoutReason, LogoutRequest, LogoutResponse, Lun, NopIn,
    NopOut, RejectReason, ScsiCommand, Serial, Tag, TargetPdu, TextRequest, TextResponse, Window,
};
use crate::sim::target::State;
use crate::sim::target::negotiation::{SessionKind, pairs, segment};
use crate::sim::target::outbox::Outgoing;
use crate::sim::target::transfer::Transfer;

impl Session {
    /// Takes a PDU, or finds what is wrong with it.
    pub(super) fn take(
        &mut self,
        pdu: &InitiatorPdu,
        bhs: &Bhs,
        data: Vec<u8>,
        state: &mut State,
    ) -> Result<(), SessionError> {
        match pdu {
            InitiatorPdu::ScsiCommand(pdu) => {
                self.take_turn(pdu.immediate, pdu.cmd_sn)?;
                self.begin(*pdu, bhs, data, state)
            }
            InitiatorPdu::DataOut(pdu) => self.take_data(pdu, &data, state),
            InitiatorPdu::NopOut(pdu) => {
                self.take_turn(pdu.immediate, pdu.cmd_sn)?;
                self.take_nop(pdu, data)
            }
            InitiatorPdu::TextRequest(pdu) => {
                self.take_turn(pdu.immediate, pdu.cmd_sn)?;
                self.answer_text(pdu, &data, state);
                Ok(())
            }
            InitiatorPdu::TaskManagementRequest(pdu) => {
                self.take_turn(pdu.immediate, pdu.cmd_sn)?;
                self.management.push(*pdu);
                Ok(())
            }
            InitiatorPdu::LogoutRequest(pdu) => {
                self.take_turn(pdu.immediate, pdu.cmd_sn)?;
                self.log_out(pdu, state);
                Ok(())
            }
            InitiatorPdu::LoginRequest(_) => Err(SessionError::Misplaced("Login Request")),
        }
    }

    /// Counts a PDU that has a CmdSN.
    fn take_turn(&mut self, immediate: bool, cmd_sn: Serial) -> Result<(), SessionError> {
        // One connection keeps the order, so there is no gap to wait for.
        let is_open = immediate || !self.max_cmd_sn.is_before(cmd_sn);
        if cmd_sn != self.exp_cmd_sn || !is_open {
            return Err(SessionError::CmdSn {
                found: cmd_sn,
                expected: self.exp_cmd_sn,
                max: self.max_cmd_sn,
            });
        }
        if !immediate {
            self.exp_cmd_sn = cmd_sn.next();
        }
        Ok(())
    }

    fn begin(
        &mut self,
        command: ScsiCommand,
        bhs: &Bhs,
        data: Vec<u8>,
        state: &mut State,
    ) -> Result<(), SessionError> {
        let tag = command.initiator_task_tag;
        if self.negotiated.kind == SessionKind::Discovery {
            return Err(SessionError::Misplaced("SCSI Command"));
        }
        if tag == Tag::RESERVED || self.active.contains_key(&tag.0) {
            return Err(SessionError::TagInUse(tag.0));
        }
        if self.is_parting {
            self.cut_short.insert(tag.0);
            self.reject(bhs, RejectReason::WAITING_FOR_LOGOUT);
            return Ok(());
        }
        let writes = matches!(command.cdb.first(), Some(0x2a | 0x8a));
        if writes && self.dice.one_in(state.options.mishaps.poison_one_in) {
            self.is_over = true;
            return Ok(());
        }
        let may_reject = command.is_final;
        if may_reject && self.dice.one_in(state.options.mishaps.reject_one_in) {
            self.reject(bhs, RejectReason::OUT_OF_RESOURCES);
            return Ok(());
        }
        if command.write {
            let resets = resets(command.lun, state);
            let transfer = Transfer::new(command, data, &self.negotiated, resets);
            let mut transfer = transfer.map_err(|error| SessionError::Transfer(tag.0, error))?;
            transfer.is_doomed = self.dice.one_in(state.options.mishaps.busy_one_in);
            self.transfers.push(transfer);
        } else {
            if !data.is_empty() {
                return Err(SessionError::DataWithoutWrite);
            }
            state.receive(&self.nexus, command, data);
        }
        self.active.insert(tag.0, (command, 0));
        self.cut_short.remove(&tag.0);
        self.hand_over(state);
        Ok(())
    }

    fn take_data(&mut self, pdu: &DataOut, data: &[u8], state: &mut State) -> Result<(), SessionError> {
        let tag = pdu.initiator_task_tag.0;
        let mut transfers = self.transfers.iter_mut();
        let found = transfers.find(|transfer| transfer.command.initiator_task_tag.0 == tag);
        let Some(transfer) = found else {
            // The command may have been aborted or reset while the data was on its way.
            let is_late = match pdu.target_transfer_tag {
                Tag::RESERVED => self.cut_short.contains(&tag),
                asked => asked.0 < self.next_transfer_tag,
            };
            return if is_late {
                Ok(())
            } else {
                Err(SessionError::NoTransfer(tag))
            };
        };
        let taken = transfer.receive(pdu, data, &self.negotiated);
        taken.map_err(|error| SessionError::Transfer(tag, error))?;
        self.hand_over(state);
        Ok(())
    }

    /// Gives commands whose data is whole to the target, and forgets those that were reset before.
    pub(super) fn hand_over(&mut self, state: &mut State) {
        let (nexus, active, cut_short) = (&self.nexus, &mut self.active, &mut self.cut_short);
        self.transfers.retain_mut(|transfer| {
            let command = transfer.command;
            if transfer.resets != resets(command.lun, state) {
                active.remove(&command.initiator_task_tag.0);
                cut_short.insert(command.initiator_task_tag.0);
                return false;
            }
            let Some(data) = transfer.take_whole() else {
                return true;
            };
            if let Some((_, r2t_count)) = active.get_mut(&command.initiator_task_tag.0) {
                *r2t_count = transfer.r2t_count();
            }
            state.receive(nexus, command, data);
            false
        });
    }

    fn take_nop(&mut self, pdu: &NopOut, data: Vec<u8>) -> Result<(), SessionError> {
        let is_answer = pdu.target_transfer_tag != Tag::RESERVED;
        if is_answer && !self.pings.remove(&pdu.target_transfer_tag.0) {
            return Err(SessionError::NoPing(pdu.target_transfer_tag.0));
        }
        if pdu.initiator_task_tag != Tag::RESERVED {
            let echo = TargetPdu::NopIn(NopIn {
                lun: Lun::default(),
                initiator_task_tag: pdu.initiator_task_tag,
                target_transfer_tag: Tag::RESERVED,
                stat_sn: Serial(0),
                window: Window::default(),
            });
            self.say(Outgoing { pdu: echo, data });
        }
        Ok(())
    }

    fn answer_text(&mut self, pdu: &TextRequest, data: &[u8], state: &State) {
        let place = &state.options.place;
        let mut answers = Vec::new();
        for (key, value) in pairs(data) {
            let is_known = value == "All" || value.is_empty() || value == place.name;
            if key != "SendTargets" {
                answers.push((key, "NotUnderstood".to_owned()));
            } else if is_known {
                answers.push(("TargetName".to_owned(), place.name.clone()));
                answers.push(("TargetAddress".to_owned(), place.address.clone()));
            }
        }
        let response = TargetPdu::TextResponse(TextResponse {
            is_final: true,
            is_continued: false,
            lun: Lun::default(),
            initiator_task_tag: pdu.initiator_task_tag,
            target_transfer_tag: Tag::RESERVED,
            stat_sn: Serial(0),
            window: Window::default(),
        });
        self.say(Outgoing {
            pdu: response,
            data: segment(&answers),
        });
    }

    fn log_out(&mut self, pdu: &LogoutRequest, state: &mut State) {
        let is_recovery = pdu.reason == LogoutReason::REMOVE_FOR_RECOVERY;
        if !is_recovery {
            for tag in self.active.keys() {
                state.abort(self.nexus.session, *tag);
                self.outbox.forget(*tag);
            }
            self.active.clear();
            self.transfers.clear();
        }
        self.is_over = !is_recovery;
        self.say(Outgoing::bare(TargetPdu::LogoutResponse(LogoutResponse {
            response: if is_recovery {
                LogoutOutcome::RECOVERY_NOT_SUPPORTED
            } else {
                LogoutOutcome::CLOSED
            },
            initiator_task_tag: pdu.initiator_task_tag,
            stat_sn: Serial(0),
            window: Window::default(),
            time2wait: 0,
            time2retain: 0,
        })));
    }
}

fn resets(lun: Lun, state: &State) -> u64 {
    let unit = lun.number().and_then(|number| state.units.get(&number));
    unit.map_or(0, |unit| unit.resets)
}
