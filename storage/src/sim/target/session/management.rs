//! Task management (RFC 7143, 11.5): what a session's initiator has aborted and reset.

use super::Session;
use crate::iscsi::pdu::{
    ScsiCommand, Serial, TargetPdu, TaskFunction, TaskManagementRequest, TaskManagementResponse, TaskOutcome,
    Window,
};
use crate::sim::target::State;
use crate::sim::target::options::Pace;
use crate::sim::target::outbox::Outgoing;
use crate::sim::target::transfer::Transfer;

impl Session {
    /// Carries task management out, at once or later.
    pub(super) fn manage(&mut self, state: &mut State) {
        for request in std::mem::take(&mut self.management) {
            if state.options.pace == Pace::Dice && self.dice.one_in(2) {
                self.management.push(request);
                continue;
            }
            let response = self.manage_one(&request, state);
            self.say(Outgoing::bare(TargetPdu::TaskManagementResponse(
                TaskManagementResponse {
                    response,
                    initiator_task_tag: request.initiator_task_tag,
                    stat_sn: Serial(0),
                    window: Window::default(),
                },
            )));
        }
    }

    fn manage_one(&mut self, request: &TaskManagementRequest, state: &mut State) -> TaskOutcome {
        let of_unit = |command: &ScsiCommand| command.lun.number() == request.lun.number();
        match request.function {
            TaskFunction::ABORT_TASK => {
                let tag = request.referenced_task_tag.0;
                if !self.active.contains_key(&tag) {
                    return TaskOutcome::TASK_DOES_NOT_EXIST;
                }
                self.abort(tag, state);
            }
            TaskFunction::ABORT_TASK_SET => {
                let active = self.active.iter();
                let tags = active
                    .filter(|(_, (command, _))| of_unit(command))
                    .map(|(tag, _)| *tag);
                for tag in tags.collect::<Vec<_>>() {
                    self.abort(tag, state);
                }
            }
            TaskFunction::LOGICAL_UNIT_RESET => {
                if !state.reset(&self.nexus, request.lun.number()) {
                    return TaskOutcome::LUN_DOES_NOT_EXIST;
                }
                self.forget_lost(state);
            }
            TaskFunction::TARGET_WARM_RESET => {
                let numbers: Vec<u16> = state.units.keys().copied().collect();
                for number in numbers {
                    state.reset(&self.nexus, Some(number));
                }
                self.forget_lost(state);
            }
            TaskFunction::TASK_REASSIGN => return TaskOutcome::REASSIGNMENT_NOT_SUPPORTED,
            _ => return TaskOutcome::FUNCTION_NOT_SUPPORTED,
        }
        TaskOutcome::FUNCTION_COMPLETE
    }

    fn abort(&mut self, tag: u32, state: &mut State) {
        state.abort(self.nexus.session, tag);
        self.outbox.forget(tag);
        self.active.remove(&tag);
        let (cut_short, is_of) = (&mut self.cut_short, |transfer: &mut Transfer| {
            transfer.command.initiator_task_tag.0 == tag
        });
        cut_short.extend(self.transfers.extract_if(.., is_of).map(|_| tag));
    }

    /// Forgets the commands that a reset, by this session or another, has ended.
    pub(super) fn forget_lost(&mut self, state: &mut State) {
        self.hand_over(state);
        let (transfers, outbox, session) = (&self.transfers, &self.outbox, self.nexus.session);
        let is_coming = |tag: u32| {
            let mut transfers = transfers.iter();
            transfers.any(|transfer| transfer.command.initiator_task_tag.0 == tag)
        };
        self.active
            .retain(|tag, _| is_coming(*tag) || outbox.has(*tag) || state.has_task(session, *tag));
    }
}
