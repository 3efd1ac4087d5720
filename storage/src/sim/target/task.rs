//! Commands that have arrived whole, and how they are carried out.

use std::rc::Rc;

use super::cdb::Command;
use super::description::{Addressee, luns};
use super::nexus::Nexus;
use super::options::{Pace, Support};
use super::plan::Plan;
use super::refusal::{Attention, Illegal, Refusal, sense};
use super::reservation::Order;
use super::{Event, Execution, State};
use crate::iscsi::pdu::{ScsiCommand, TaskAttribute};
use crate::sim::medium::Horizon;

/// One command of a session.
///
/// ```text
///   Received ──let in (attentions, reservation)──► Underway ──each effect──► Done
///      └──────────────────refused───────────────────────────────────────────►┘
/// ```
///
/// A reservation that changes stops no command that is underway: only an abort or a reset does.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) nexus: Rc<Nexus>,
    pub(super) command: ScsiCommand,
    /// What came with it.
    data: Vec<u8>,
    /// What a SYNCHRONIZE CACHE covers at least.
    arrived: Option<Horizon>,
    /// How many of its turns pass until anything is done.
    idle_turns: u32,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Received,
    Underway(Command, Plan),
    Done(Answer),
}

/// What the initiator is told.
pub(super) type Answer = Result<Vec<u8>, Refusal>;

impl Task {
    fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done(_))
    }

    fn is_on(&self, lun: Option<u16>) -> bool {
        self.command.lun.number() == lun
    }
}

impl State {
    /// Takes on a command that has arrived whole.
    pub(super) fn receive(&mut self, nexus: &Rc<Nexus>, command: ScsiCommand, data: Vec<u8>) {
        let idle_turns = if self.dice.one_in(self.options.mishaps.slow_one_in) {
            self.dice.pick(&[30, 500])
        } else {
            0
        };
        let task = Task {
            idle_turns,
            nexus: Rc::clone(nexus),
            command,
            data,
            arrived: Some(self.medium.horizon()),
            stage: Stage::Received,
        };
        self.next_arrival += 1;
        self.tasks.insert(self.next_arrival, task);
    }

    /// Whether anything is left to carry out.
    pub(super) fn is_working(&self) -> bool {
        self.tasks.values().any(|task| !task.is_done())
    }

    /// Whether the session has such a command.
    pub(super) fn has_task(&self, session: u64, tag: u32) -> bool {
        let mut tasks = self.tasks.values();
        tasks.any(|task| task.nexus.session == session && task.command.initiator_task_tag.0 == tag)
    }

    /// Carries commands on: all to their ends in order, or some of them a little.
    pub(super) fn advance(&mut self) {
        match self.options.pace {
            Pace::Prompt => {
                for arrival in self.unfinished() {
                    while self.tasks.get(&arrival).is_some_and(|task| !task.is_done()) {
                        self.step(arrival);
                    }
                }
            }
            Pace::Dice => {
                let unfinished = self.unfinished();
                for _ in 0..self.dice.below(3 * unfinished.len() as u64 + 1) {
                    let arrival = self.dice.pick(&unfinished);
                    if self.has_its_turn(arrival) {
                        self.step(arrival);
                    }
                }
            }
        }
        // Nobody is there to be told.
        let sessions = &self.sessions;
        self.tasks
            .retain(|_, task| !task.is_done() || sessions.contains_key(&task.nexus.session));
    }

    /// The commands of a session that have ended: their tags, and how.
    pub(super) fn take_done(&mut self, session: u64) -> Vec<(u32, Answer)> {
        let is_taken = |task: &Task| task.nexus.session == session && task.is_done();
        let taken = self.tasks.extract_if(.., |_, task| is_taken(task));
        taken
            .filter_map(|(_, task)| match task.stage {
                Stage::Done(answer) => Some((task.command.initiator_task_tag.0, answer)),
                Stage::Received | Stage::Underway(..) => None,
            })
            .collect()
    }

    fn unfinished(&self) -> Vec<u64> {
        let tasks = self.tasks.iter();
        tasks
            .filter(|(_, task)| !task.is_done())
            .map(|(arrival, _)| *arrival)
            .collect()
    }

    /// Whether the attributes let a command go on: an ordered one waits for those before it, and those behind wait for it.
    fn has_its_turn(&self, arrival: u64) -> bool {
        let Some(task) = self.tasks.get(&arrival) else {
            return false;
        };
        let is_ordered = |task: &Task| task.command.attribute == TaskAttribute::Ordered;
        let mut before = self.tasks.range(..arrival).map(|(_, task)| task).filter(|other| {
            !other.is_done() && other.nexus == task.nexus && other.command.lun == task.command.lun
        });
        !before.any(|other| is_ordered(other) || is_ordered(task))
    }

    fn step(&mut self, arrival: u64) {
        // A command may end others, or be told of something itself.
        let Some(mut task) = self.tasks.remove(&arrival) else {
            return;
        };
        task.stage = match task.stage {
            Stage::Received => match self.let_in(&task.nexus, &task.command, &task.data, &mut task.arrived) {
                Ok((command, plan)) => Stage::Underway(command, plan),
                Err(refusal) => Stage::Done(Err(refusal)),
            },
            Stage::Underway(..) if task.idle_turns > 0 => {
                task.idle_turns -= 1;
                task.stage
            }
            Stage::Underway(command, mut plan) => match plan.effects.pop() {
                None => Stage::Done(Ok(plan.data)),
                Some(effect) => match self.carry_out(&task.nexus, &task.command, effect, &mut plan.data) {
                    Ok(()) => Stage::Underway(command, plan),
                    Err(refusal) => Stage::Done(Err(refusal)),
                },
            },
            done @ Stage::Done(_) => done,
        };
        self.tasks.insert(arrival, task);
    }

    fn carry_out(
        &mut self,
        nexus: &Rc<Nexus>,
        command: &ScsiCommand,
        effect: super::plan::Effect,
        data: &mut [u8],
    ) -> Result<(), Refusal> {
        let number = command.lun.number();
        let unit = number.and_then(|number| self.units.get(&number));
        let unit = unit.expect("a logical unit was there when the command was let in, and none goes away");
        if let Some((extent, written)) = effect.change() {
            self.events.push(Event::Executed(Execution {
                nexus: Rc::clone(nexus),
                initiator_task_tag: command.initiator_task_tag.0,
                lun: unit.number,
                offset_bytes: extent.offset_bytes,
                len_bytes: extent.len_bytes,
                written,
                allowed: unit.reservations.lets_write(nexus),
            }));
        }
        effect.happen(&self.medium, unit, data)
    }

    /// Decides whether a command is carried out, and how; what only talks is over with that.
    fn let_in(
        &mut self,
        nexus: &Rc<Nexus>,
        request: &ScsiCommand,
        data: &[u8],
        arrived: &mut Option<Horizon>,
    ) -> Result<(Command, Plan), Refusal> {
        self.suffer_mishaps()?;
        let command = Command::parse(&request.cdb).map_err(Refusal::Illegal)?;
        let number = request.lun.number();
        let Some(unit) = number.and_then(|number| self.units.get_mut(&number)) else {
            let data = self
                .answer_without_disk(number, command)
                .map_err(Refusal::Illegal)?;
            return Ok((command, Plan::saying(data)));
        };
        if !command.ignores_attention()
            && let Some(attention) = unit.take_attention(nexus.session)
        {
            return Err(Refusal::Attention(attention));
        }
        if !unit.reservations.allows(nexus, command) {
            return Err(Refusal::ReservationConflict);
        }
        if command.writes() && unit.access == crate::backend::Access::ReadOnly {
            return Err(Refusal::Protected);
        }
        if matches!(command, Command::CompareAndWrite { .. })
            && self.options.quirks.compare_and_write == Support::Missing
        {
            return Err(Refusal::Illegal(Illegal::OperationCode));
        }
        if let Command::ReservationOut {
            action,
            kind,
            list_bytes,
        } = command
        {
            if u32::try_from(data.len()) != Ok(list_bytes) {
                return Err(Refusal::Illegal(Illegal::ParameterListLength));
            }
            let order = Order::parse(action, kind, data).map_err(Refusal::Illegal)?;
            self.reserve(nexus, number, order)?;
            return Ok((command, Plan::default()));
        }
        let arrived = arrived.take().expect("a command is let in once");
        let mut plan = match self.tell(number, command) {
            Some(told) => Plan::saying(told.map_err(Refusal::Illegal)?),
            None => self
                .plan(number, command, data, arrived)
                .map_err(Refusal::Illegal)?,
        };
        if self.options.pace == Pace::Dice {
            plan.cut(&mut self.dice);
        }
        Ok((command, plan))
    }

    fn suffer_mishaps(&mut self) -> Result<(), Refusal> {
        let mishaps = self.options.mishaps;
        if self.dice.one_in(mishaps.busy_one_in) {
            return Err(Refusal::Busy);
        }
        if self.dice.one_in(mishaps.task_set_full_one_in) {
            return Err(Refusal::TaskSetFull);
        }
        if self.dice.one_in(mishaps.attention_one_in) {
            return Err(Refusal::Attention(Attention::ParametersChanged));
        }
        Ok(())
    }

    fn plan(
        &self,
        number: Option<u16>,
        command: Command,
        data: &[u8],
        arrived: Horizon,
    ) -> Result<Plan, Illegal> {
        let unit = number.and_then(|number| self.units.get(&number));
        Plan::of(command, unit.ok_or(Illegal::LogicalUnit)?, data, arrived)
    }

    /// The data of a command that only asks; `None` of the others.
    fn tell(&self, number: Option<u16>, command: Command) -> Option<Result<Vec<u8>, Illegal>> {
        let unit = self.units.get(&number?)?;
        let (told, allocation_bytes) = match command {
            Command::TestUnitReady => (Ok(Vec::new()), 0),
            Command::RequestSense { allocation_bytes } => (Ok(sense(0, 0, None).to_vec()), allocation_bytes),
            Command::Inquiry {
                page,
                allocation_bytes,
            } => (Addressee::Disk(unit).inquiry(page), allocation_bytes),
            Command::ReportLuns { allocation_bytes } => (Ok(self.report_luns()), allocation_bytes),
            Command::ModeSense {
                form,
                page,
                allocation_bytes,
            } => (unit.mode(form, page), allocation_bytes),
            Command::ReadCapacity10 => (Ok(unit.capacity10()), 8),
            Command::ReadCapacity16 { allocation_bytes } => (Ok(unit.capacity16()), allocation_bytes),
            Command::ReservationIn {
                action,
                allocation_bytes,
            } => (unit.reservations.report(action), allocation_bytes),
            _ => return None,
        };
        Some(told.map(|data| cut(data, allocation_bytes)))
    }

    fn answer_without_disk(&self, number: Option<u16>, command: Command) -> Result<Vec<u8>, Illegal> {
        let addressee = if number == Some(0) {
            Addressee::Controller
        } else {
            Addressee::Nobody
        };
        match command {
            Command::Inquiry {
                page,
                allocation_bytes,
            } => Ok(cut(addressee.inquiry(page)?, allocation_bytes)),
            Command::ReportLuns { allocation_bytes } => Ok(cut(self.report_luns(), allocation_bytes)),
            Command::RequestSense { allocation_bytes } => {
                Ok(cut(sense(0, 0, None).to_vec(), allocation_bytes))
            }
            Command::TestUnitReady if number == Some(0) => Ok(Vec::new()),
            _ => Err(Illegal::LogicalUnit),
        }
    }

    fn report_luns(&self) -> Vec<u8> {
        let controller = (!self.units.contains_key(&0)).then_some(0);
        luns(controller.into_iter().chain(self.units.keys().copied()))
    }

    fn reserve(&mut self, nexus: &Rc<Nexus>, number: Option<u16>, order: Order) -> Result<(), Refusal> {
        let registrant = self.options.quirks.registrant;
        let unit = number.and_then(|number| self.units.get_mut(&number));
        let unit = unit.ok_or(Refusal::Illegal(Illegal::LogicalUnit))?;
        let outcome = unit.reservations.obey(nexus, order)?;
        self.events.push(Event::Reserved {
            nexus: Rc::clone(nexus),
            lun: unit.number,
            keys: unit.reservations.keys(),
            held: unit.reservations.held(),
        });
        for (identity, attention) in outcome.notices {
            for (session, nexus) in &self.sessions {
                if nexus.identity(registrant) == identity {
                    unit.alarm(*session, attention);
                }
            }
        }
        let aborted = outcome.aborted;
        self.tasks
            .retain(|_, task| !task.is_on(number) || !aborted.contains(&task.nexus.identity(registrant)));
        Ok(())
    }

    /// Forgets a command of a session; whether there was one that had not ended.
    pub(super) fn abort(&mut self, session: u64, tag: u32) -> bool {
        let before = self.tasks.len();
        self.tasks
            .retain(|_, task| task.nexus.session != session || task.command.initiator_task_tag.0 != tag);
        self.tasks.len() < before
    }

    /// Forgets the commands of all sessions on a logical unit, and tells these so. `false` if there is no such unit.
    pub(super) fn reset(&mut self, nexus: &Rc<Nexus>, number: Option<u16>) -> bool {
        let Some(unit) = number.and_then(|number| self.units.get_mut(&number)) else {
            return false;
        };
        unit.resets += 1;
        for session in self.sessions.keys() {
            unit.alarm(*session, Attention::PowerOn);
        }
        self.events.push(Event::Reset {
            nexus: Rc::clone(nexus),
            lun: unit.number,
        });
        self.tasks.retain(|_, task| !task.is_on(number));
        true
    }
}

impl Plan {
    fn saying(data: Vec<u8>) -> Self {
        Self {
            data,
            ..Self::default()
        }
    }
}

fn cut(mut data: Vec<u8>, allocation_bytes: u32) -> Vec<u8> {
    data.truncate(usize::try_from(allocation_bytes).expect("this is a 64-bit monitor"));
    data
}
