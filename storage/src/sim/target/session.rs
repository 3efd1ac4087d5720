//! A session in the full feature phase (RFC 7143, 4.2 and 11): what it takes, and when it answers.

mod intake;
mod management;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::State;
use super::negotiation::{Negotiated, SessionKind};
use super::nexus::Nexus;
use super::options::Pace;
use super::outbox::{Outbox, Outgoing, replies};
use super::refusal::Refusal;
use super::transfer::{Transfer, TransferError};
use crate::iscsi::pdu::{
    Async, AsyncEvent, Bhs, InitiatorPdu, Lun, NopIn, PduError, Reject, RejectReason, ScsiCommand, Serial,
    Tag, TargetPdu, TaskManagementRequest, Window,
};
use crate::sim::dice::Dice;

/// One session and its one connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) nexus: Rc<Nexus>,
    pub(super) negotiated: Negotiated,
    dice: Dice,
    exp_cmd_sn: Serial,
    max_cmd_sn: Serial,
    next_stat_sn: Serial,
    /// Commands that have not been answered, with the number of their R2Ts.
    active: BTreeMap<u32, (ScsiCommand, u32)>,
    transfers: Vec<Transfer>,
    /// The tags of commands that were aborted or reset before their data was whole: the rest may be on its way.
    cut_short: BTreeSet<u32>,
    management: Vec<TaskManagementRequest>,
    outbox: Outbox,
    next_transfer_tag: u32,
    /// The pings that were not answered.
    pings: BTreeSet<u32>,
    /// The window was left closed.
    withholds_window: bool,
    /// It has been asked to end.
    is_parting: bool,
    /// It ends when all is sent.
    pub(super) is_over: bool,
}

/// What an initiator may not do.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Pdu(#[from] PduError),
    #[error("task {0:#x}: {1}")]
    Transfer(u32, #[source] TransferError),
    #[error("the Initiator Task Tag {0:#x} is in use")]
    TagInUse(u32),
    #[error("CmdSN {found} came, where {expected} was due and {max} is the last that may come")]
    CmdSn {
        found: Serial,
        expected: Serial,
        max: Serial,
    },
    #[error("Data-Out came for the task {0:#x}, which wants none")]
    NoTransfer(u32),
    #[error("data came with a command that does not write")]
    DataWithoutWrite,
    #[error("a NOP-Out answers the ping {0:#x}, which there was not")]
    NoPing(u32),
    #[error("a {0} has no place in this session")]
    Misplaced(&'static str),
}

impl Session {
    /// A session whose login is over.
    pub(super) fn new(
        nexus: Rc<Nexus>,
        negotiated: Negotiated,
        window: Window,
        next_stat_sn: Serial,
        dice: Dice,
    ) -> Self {
        Self {
            nexus,
            negotiated,
            dice,
            exp_cmd_sn: window.exp_cmd_sn,
            max_cmd_sn: window.max_cmd_sn,
            next_stat_sn,
            active: BTreeMap::new(),
            transfers: Vec::new(),
            cut_short: BTreeSet::new(),
            management: Vec::new(),
            outbox: Outbox::default(),
            next_transfer_tag: 0,
            pings: BTreeSet::new(),
            withholds_window: false,
            is_parting: false,
            is_over: false,
        }
    }

    /// Takes a PDU. What is wrong with it is answered by a Reject, and the session is over.
    pub(super) fn receive(&mut self, bhs: &Bhs, data: Vec<u8>, state: &mut State) {
        let taken = InitiatorPdu::parse(bhs).map_err(SessionError::from);
        if let Err(error) = taken.and_then(|pdu| self.take(&pdu, bhs, data, state)) {
            self.complain(&error, state);
            // What comes at the wrong turn is left unanswered (RFC 7143, 4.2.2.1).
            if !matches!(error, SessionError::CmdSn { .. }) {
                self.reject(bhs, RejectReason::PROTOCOL_ERROR);
                self.is_over = true;
            }
        }
    }

    /// Says no to a PDU.
    pub(super) fn reject(&mut self, bhs: &Bhs, reason: RejectReason) {
        let reject = TargetPdu::Reject(Reject {
            reason,
            stat_sn: Serial(0),
            window: Window::default(),
            data_sn: 0,
        });
        let data = bhs.0.to_vec();
        self.say(Outgoing { pdu: reject, data });
    }

    /// Whether there is something to send, now or later, without anything being received.
    pub(super) fn is_busy(&self, state: &State) -> bool {
        !self.outbox.is_empty()
            || !self.management.is_empty()
            || self.withholds_window
            || self
                .active
                .keys()
                .any(|tag| state.has_task(self.nexus.session, *tag))
    }

    /// The next PDUs.
    pub(super) fn transmit(&mut self, state: &mut State) -> Vec<Outgoing> {
        state.advance();
        let pace = state.options.pace;
        if !self.is_over {
            self.manage(state);
            self.reply(state);
            self.solicit(state);
            self.speak_unasked(state);
        }
        let most = match pace {
            Pace::Prompt => u64::MAX,
            Pace::Dice => self.dice.below(2 * self.outbox.len() as u64 + 2),
        };
        let mut sent = Vec::new();
        for _ in 0..most {
            let Some(mut out) = self.outbox.pop(pace, &mut self.dice) else {
                break;
            };
            if let Some(tag) = out.ended() {
                self.active.remove(&tag);
            }
            let window = self.window(state);
            out.stamp(&mut self.next_stat_sn, window);
            sent.push(out);
        }
        sent
    }

    /// Whether nothing is left to send.
    pub(super) fn is_silent(&self) -> bool {
        self.outbox.is_empty()
    }

    /// Prepares the answers to commands that have ended.
    fn reply(&mut self, state: &mut State) {
        for (tag, answer) in state.take_done(self.nexus.session) {
            if let Some((command, r2t_count)) = self.active.get(&tag) {
                let pace = state.options.pace;
                let replies = replies(
                    command,
                    *r2t_count,
                    answer,
                    &self.negotiated,
                    pace,
                    &mut self.dice,
                );
                self.outbox.push(tag, replies);
            }
        }
        self.forget_lost(state);
    }

    /// Asks for data, or refuses a command without having it.
    fn solicit(&mut self, state: &mut State) {
        let pace = state.options.pace;
        let mut refused = Vec::new();
        for transfer in &mut self.transfers {
            let tag = transfer.command.initiator_task_tag.0;
            if transfer.is_quiet() && transfer.is_doomed {
                refused.push((transfer.command, transfer.r2t_count()));
                continue;
            }
            let next = &mut self.next_transfer_tag;
            while let Some(r2t) = transfer.ask(&self.negotiated, Tag(*next), pace, &mut self.dice) {
                *next += 1;
                self.outbox.push(tag, [Outgoing::bare(TargetPdu::R2t(r2t))]);
            }
        }
        for (command, r2t_count) in refused {
            let tag = command.initiator_task_tag;
            self.transfers
                .retain(|transfer| transfer.command.initiator_task_tag != tag);
            let busy = Err(Refusal::Busy);
            let replies = replies(&command, r2t_count, busy, &self.negotiated, pace, &mut self.dice);
            self.outbox.push(tag.0, replies);
        }
    }

    /// Pings, opens the window again, asks for a logout, or leaves.
    fn speak_unasked(&mut self, state: &mut State) {
        let mishaps = state.options.mishaps;
        if self.negotiated.kind == SessionKind::Discovery {
            return;
        }
        if self.dice.one_in(mishaps.ping_one_in) && self.pings.len() < PINGS_MAX {
            self.next_transfer_tag += 1;
            let tag = self.next_transfer_tag - 1;
            self.pings.insert(tag);
            self.ping(Tag(tag));
        }
        if self.withholds_window && self.outbox.is_empty() {
            self.withholds_window = false;
            self.ping(Tag::RESERVED);
        }
        if !self.is_parting && self.dice.one_in(mishaps.logout_request_one_in) {
            self.is_parting = true;
            self.notify(AsyncEvent::LOGOUT_REQUESTED);
        }
        if self.dice.one_in(mishaps.session_drop_one_in) {
            self.is_over = true;
            self.notify(AsyncEvent::SESSION_DROPPED);
        }
    }

    fn ping(&mut self, tag: Tag) {
        self.say(Outgoing::bare(TargetPdu::NopIn(NopIn {
            lun: Lun::default(),
            initiator_task_tag: Tag::RESERVED,
            target_transfer_tag: tag,
            stat_sn: Serial(0),
            window: Window::default(),
        })));
    }

    fn notify(&mut self, async_event: AsyncEvent) {
        self.say(Outgoing::bare(TargetPdu::Async(Async {
            lun: Lun::default(),
            stat_sn: Serial(0),
            window: Window::default(),
            async_event,
            async_vcode: 0,
            parameter1: 0,
            parameter2: 0,
            parameter3: 1,
        })));
    }

    /// Sends what belongs to no command, in a stream of its own.
    fn say(&mut self, out: Outgoing) {
        self.outbox.push(out.pdu.bhs().initiator_task_tag().0, [out]);
    }

    /// The commands that are taken now. The window never becomes smaller (RFC 7143, 4.2.2.1).
    fn window(&mut self, state: &State) -> Window {
        let room = state.options.limits.commands_max;
        let active = u32::try_from(self.active.len()).unwrap_or(u32::MAX);
        let free = room.saturating_sub(active);
        let max_cmd_sn = self.exp_cmd_sn.plus(free).plus(u32::MAX);
        self.withholds_window = self.dice.one_in(state.options.mishaps.closed_window_one_in);
        if !self.withholds_window && self.max_cmd_sn.is_before(max_cmd_sn) {
            self.max_cmd_sn = max_cmd_sn;
        }
        Window {
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn,
        }
    }

    fn complain(&self, error: &SessionError, state: &mut State) {
        use std::error::Error;
        let cause = error
            .source()
            .map(|cause| format!(": {cause}"))
            .unwrap_or_default();
        let initiator = &self.nexus.initiator;
        state.complaints.push(format!("{initiator}: {error}{cause}"));
    }
}

/// How many pings wait for their answers at most.
const PINGS_MAX: usize = 4;
