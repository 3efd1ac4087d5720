//! Migrations as the `vmm` thread sees them: it gives the thread that sends what only it can, and looks after the leases.

mod offers;
mod receiving;

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use coracle_devices::virtio::device::Patience;
use coracle_devices::vmclock::VMCLOCK_BYTES;
use coracle_storage::lease::{Opposition, Phase as LeasePhase};

use super::opening::Opening;
use super::operation::{Course, Reaction, Work};
use super::{Guest, Monitor};
use crate::api::Fault;
use crate::arch::x86_64::layout;
use crate::config::{MigrationSend, MigrationStage, MigrationStatus, STREAMS_MAX};
use crate::end::End;
use crate::kvm::share::FULL;
use crate::machine::handover::{Outcome, Yielded};
use crate::machine::{Machine, Pause, Paused, Progress as RoundProgress, Refused, Round};
use crate::migration::converge::Terms;
use crate::migration::postcopy::pages_of;
use crate::migration::postcopy::source::Keeper;
use crate::migration::progress::Progress;
use crate::migration::send::{self, Desk, Given, SendError, Want};
use crate::state::Sections;

pub(super) use self::receiving::Receiving;

/// A machine that is being sent.
///
/// ```text
///   Copying ──► Stopping ──► Flushing ──► Stopped ──► Yielding ──► Yielded ──► the guest runs there: over
///      └───────────┴────────────┴────────────┴── lost: the guest runs on here
///                                                        └────────────┴── lost ──► Settling: the leases say where
///   With post-copy the guest may run there while this process is Keeping its memory: over when that was fetched.
/// ```
pub(super) struct Sending {
    thread: Opening<Result<(), SendError>>,
    clerk: Clerk,
    stage: Stage,
    to: String,
    /// The drives that go along.
    copied: Vec<String>,
    progress: Arc<Progress>,
    /// What keeps the memory of a guest that goes on without.
    keeper: Arc<Mutex<Option<Keeper>>>,
}

/// The other end of [`Desk`].
struct Clerk {
    wants: Receiver<Want>,
    given: Option<Sender<Given>>,
    /// How often the guest's vCPUs are made to rest.
    nudges: Option<Duration>,
}

enum Stage {
    /// The guest runs.
    Copying,
    /// The guest is [`Guest::Pausing`].
    Stopping,
    /// What it has written is put on its media.
    Flushing(Round),
    /// The last of it is being sent.
    Stopped,
    /// The fences are being taken down.
    Yielding(Round),
    /// The fences are down.
    Yielded,
    /// The leases are asked; what the connection came to is kept for whoever asked.
    Settling(Opening<Settled>, SendError),
    /// The guest runs elsewhere, and the rest of its memory is fetched from here.
    Keeping(Keeper),
}

/// What the leases say.
enum Settled {
    Back(Machine<Paused>),
    /// The guest is elsewhere, or nowhere: whose the images are, in words.
    Gone(Machine<Yielded>, Gone),
}

enum Gone {
    /// The target has started.
    Started,
    /// Somebody else has the images.
    Stranger(String),
    /// There is no lease that could say.
    Unknown,
}

/// How long the target may take from its first step to its second.
const START_MAX: Duration = Duration::from_secs(3);
/// How often the leases are asked.
const SETTLE_PERIOD: Duration = Duration::from_millis(20);
/// How long a loser's fence is waited for at a time.
const FENCE_MAX: Duration = Duration::from_secs(1);

impl Monitor {
    /// Begins to send the machine.
    pub(super) fn send_migration(&mut self, asked: MigrationSend) -> Result<Reaction, Fault> {
        self.check_complete("Migration")?;
        let images = self.read_images(&asked.copy_disks);
        let Guest::Running(machine) = &self.guest else {
            unreachable!("the phase was looked at");
        };
        if !(1..=STREAMS_MAX).contains(&asked.streams) {
            return Err(Fault::bad_request(format!(
                "Migration error: memory goes by 1 to {STREAMS_MAX} streams, and not by {}",
                asked.streams
            )));
        }
        let (hello, copies) = self.hello(machine, &asked)?;
        let (wants, clerk_wants) = channel();
        let (clerk_given, given) = channel();
        let progress = Arc::<Progress>::default();
        let notice = self.wakeup.notice();
        let keeper = Arc::default();
        let (timeout, postcopy_wait) = (asked.timeout(), asked.postcopy_wait());
        let job = send::Job {
            to: asked.to.clone(),
            name: asked.to_name,
            tls: asked.tls,
            memory: Arc::clone(machine.memory()),
            copies,
            terms: Terms {
                downtime: Duration::from_millis(asked.downtime_ms),
                standstill: standstill(hello.drives.len() + hello.copies.len()),
                mode: asked.mode,
                deadline: Instant::now() + timeout,
                on_timeout: asked.on_timeout,
                postcopy: asked.allow_postcopy,
            },
            keeper: Arc::clone(&keeper),
            postcopy_wait,
            bandwidth_limit: asked.bandwidth_limit,
            compression: asked.compression,
            images,
            owner: self.owner.clone(),
            hello,
            desk: Desk {
                wants,
                given,
                notice: notice.clone(),
            },
            progress: Arc::clone(&progress),
        };
        log::info!(
            "migration: {} is to go to {}; {}",
            self.id,
            asked.to,
            job.hello.offered()
        );
        let thread = Opening::begin("mover", &notice, move || job.run());
        Ok(Reaction::Begun(Work::Send(Box::new(Sending {
            thread: thread.map_err(|error| fault(&error))?,
            clerk: Clerk {
                wants: clerk_wants,
                given: Some(clerk_given),
                nudges: None,
            },
            stage: Stage::Copying,
            to: asked.to,
            copied: asked.copy_disks,
            progress,
            keeper,
        }))))
    }

    pub(super) fn go_on_sending(&mut self, mut sending: Box<Sending>) -> Course {
        let mut due = None;
        self.nudge_for(&mut sending);
        loop {
            let stage = std::mem::replace(&mut sending.stage, Stage::Copying);
            let (next, course) = match stage {
                Stage::Stopping => self.stop_for(&sending),
                Stage::Flushing(round) => self.flush_for(&sending, round),
                Stage::Yielding(round) => self.yield_for(&sending, round),
                Stage::Settling(settling, why) => match settling.poll() {
                    None => (Stage::Settling(settling, why), Step::Wait(None)),
                    Some(settled) => return self.settled(settled, &why, sending),
                },
                Stage::Keeping(keeper) => return self.go_on_keeping(sending, keeper),
                stage => self.attend_to(&mut sending.clerk, &sending.copied, stage),
            };
            sending.stage = next;
            match course {
                Step::Again => {}
                Step::Wait(until) => {
                    due = until.or_else(|| Some(Instant::now() + sending.clerk.nudges?));
                    break;
                }
                // The thread that sends hears of it, and ends.
                Step::Failed(error) => {
                    log::warn!("{}", error.message);
                    sending.clerk.given = None;
                    break;
                }
            }
        }
        if matches!(sending.stage, Stage::Settling(..)) {
            return Course::Pending(Work::Send(sending), due);
        }
        match sending.thread.poll() {
            None => Course::Pending(Work::Send(sending), due),
            Some(Ok(())) => self.has_gone(sending),
            Some(Err(error)) => self.not_sent(sending, error),
        }
    }

    /// Has a guest that is slowed down rest.
    fn nudge_for(&self, sending: &mut Sending) {
        if let (Some(_), Guest::Running(machine)) = (sending.clerk.nudges, &self.guest) {
            sending.clerk.nudges = machine.nudge();
        }
    }

    /// Gives the thread that sends what it wants, if it wants something.
    fn attend_to(&mut self, clerk: &mut Clerk, copied: &[String], stage: Stage) -> (Stage, Step) {
        let want = match clerk.wants.try_recv() {
            Ok(want) => want,
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => return (stage, Step::Wait(None)),
        };
        let (stage, given) = match (want, std::mem::take(&mut self.guest)) {
            (Want::Rounds, Guest::Running(mut machine)) => {
                let pages = machine.begin_rounds();
                self.guest = Guest::Running(machine);
                (stage, pages.map(Given::Pages).map_err(|error| fault(&error)))
            }
            (Want::Round, Guest::Running(mut machine)) => {
                let pages = machine.take_round();
                self.guest = Guest::Running(machine);
                (stage, pages.map(Given::Pages).map_err(|error| fault(&error)))
            }
            (Want::Slow(permille), Guest::Running(machine)) => {
                machine.set_share(permille);
                clerk.nudges = machine.nudge();
                self.guest = Guest::Running(machine);
                (stage, Ok(Given::Slowed))
            }
            (Want::Stop, Guest::Running(machine)) => {
                clerk.nudges = None;
                machine.set_share(FULL);
                self.guest = Guest::Pausing(machine.begin_pause(&self.wakeup.notice()));
                return (Stage::Stopping, Step::Again);
            }
            (Want::Yield, Guest::Paused(mut machine)) => {
                let round = machine.begin_yield(&self.wakeup.notice(), copied);
                self.guest = Guest::Paused(machine);
                return match round {
                    Ok(round) => (Stage::Yielding(round), Step::Again),
                    Err(error) => self.hand_over(Err(fault(&error)), copied),
                };
            }
            (_, guest) => {
                self.guest = guest;
                (
                    stage,
                    Err(Fault::bad_request("Migration error: a disk was lost meanwhile")),
                )
            }
        };
        match given {
            Ok(given) => {
                clerk.give(given);
                (stage, Step::Again)
            }
            Err(error) => (stage, Step::Failed(error)),
        }
    }

    fn stop_for(&mut self, sending: &Sending) -> (Stage, Step) {
        let Guest::Pausing(machine) = std::mem::take(&mut self.guest) else {
            unreachable!("a pause goes on while the guest is pausing");
        };
        let (guest, stage, step) = match machine.poll(Patience::None) {
            Pause::Pending(machine, until) => {
                (Guest::Pausing(machine), Stage::Stopping, Step::Wait(Some(until)))
            }
            Pause::Paused(machine) => {
                log::info!("migration: the guest stands still for {}", sending.to);
                let round = machine.begin_flush(&self.wakeup.notice());
                let (stage, step) = match round {
                    Ok(round) => (Stage::Flushing(round), Step::Again),
                    Err(error) => (Stage::Stopped, Step::Failed(fault(&error))),
                };
                (Guest::Paused(machine), stage, step)
            }
            Pause::Stranded(machine) => {
                let error = format!(
                    "Migration error: a disk was lost while the guest was stopped for {}",
                    sending.to
                );
                (
                    Guest::Stranded(machine),
                    Stage::Stopped,
                    Step::Failed(Fault::bad_request(error)),
                )
            }
            Pause::Refused(Refused { machine, error }) => (
                Guest::Running(machine),
                Stage::Copying,
                Step::Failed(fault(&error)),
            ),
        };
        self.guest = guest;
        (stage, step)
    }

    fn flush_for(&mut self, sending: &Sending, mut round: Round) -> (Stage, Step) {
        let Guest::Paused(machine) = &mut self.guest else {
            return (
                Stage::Stopped,
                Step::Failed(Fault::bad_request("Migration error: a disk was lost")),
            );
        };
        match machine.poll_round(&mut round, Patience::None) {
            RoundProgress::Pending { until } => (Stage::Flushing(round), Step::Wait(Some(until))),
            RoundProgress::Done(Err(error)) => (Stage::Stopped, Step::Failed(fault(&error))),
            RoundProgress::Done(Ok(())) => {
                let mut sections = Sections::default();
                let saved = machine.state().map_err(|error| fault(&error)).map(|state| {
                    let mut needed = state.memory_of_kvm();
                    // Whoever takes the guest tells it so there.
                    needed.push((layout::VMCLOCK.0, VMCLOCK_BYTES.into()));
                    let needed = pages_of(machine.memory(), &needed);
                    state.write(&mut sections);
                    needed
                });
                let last = saved.and_then(|needed| {
                    let pages = machine.take_round().map_err(|error| fault(&error))?;
                    Ok(Given::Last(pages, needed, sections.finish()))
                });
                match last {
                    Ok(last) => {
                        sending.clerk.give(last);
                        (Stage::Stopped, Step::Again)
                    }
                    Err(error) => (Stage::Stopped, Step::Failed(error)),
                }
            }
        }
    }

    /// Goes on with what takes the fences down.
    fn yield_for(&mut self, sending: &Sending, mut round: Round) -> (Stage, Step) {
        let Guest::Paused(machine) = &mut self.guest else {
            return (
                Stage::Stopped,
                Step::Failed(Fault::bad_request("Migration error: a disk was lost")),
            );
        };
        let yielded = match machine.poll_round(&mut round, Patience::None) {
            RoundProgress::Pending { until } => return (Stage::Yielding(round), Step::Wait(Some(until))),
            RoundProgress::Done(yielded) => yielded.map_err(|error| fault(&error)),
        };
        let (stage, step) = self.hand_over(yielded, &sending.copied);
        if let Step::Again = step {
            sending.clerk.give(Given::Yielded);
        }
        (stage, step)
    }

    /// The fences were asked for. Where one is not down, nobody is told that the disks can be had, and the leases give them back.
    fn hand_over(&mut self, yielded: Result<(), Fault>, copied: &[String]) -> (Stage, Step) {
        let Guest::Paused(machine) = std::mem::take(&mut self.guest) else {
            unreachable!("a guest that is handed over is paused");
        };
        let (machine, outcome) = match yielded {
            Ok(()) => {
                let (machine, outcome) = machine.hand_over(copied);
                (machine, outcome.map_err(|error| fault(&error)))
            }
            // A disk that has yet to do it is not to find a newer record.
            Err(error) => (machine.stay(copied), Err(error)),
        };
        self.guest = Guest::Yielded(Some(machine));
        match outcome {
            Ok(()) => {
                log::info!(
                    "migration: the fences are down: whoever makes the next step of the first disk's lease has the guest"
                );
                (Stage::Yielded, Step::Again)
            }
            Err(error) => (Stage::Yielded, Step::Failed(error)),
        }
    }

    /// The guest runs elsewhere, and so this process has nothing left to do, unless it still has some of its memory.
    fn has_gone(&mut self, sending: Box<Sending>) -> Course {
        if let Guest::Yielded(Some(machine)) = std::mem::take(&mut self.guest) {
            machine.retire();
        }
        if let Some(keeper) = sending.take_keeper() {
            return self.go_on_keeping(sending, keeper);
        }
        let to = &sending.to;
        log::info!("migration: the guest runs at {to}, and has left this process");
        self.ending.announce(End::Migrated { to: to.to_owned() });
        Course::Over(Ok(()))
    }

    fn not_sent(&mut self, mut sending: Box<Sending>, error: SendError) -> Course {
        match std::mem::take(&mut self.guest) {
            Guest::Yielded(Some(machine)) => {
                let is_certain = matches!(error, SendError::Refused(_));
                let settling = Opening::begin("lease", &self.wakeup.notice(), move || {
                    settle(machine, is_certain)
                });
                match settling {
                    Ok(settling) => {
                        self.guest = Guest::Yielded(None);
                        sending.stage = Stage::Settling(settling, error);
                        Course::Pending(Work::Send(sending), None)
                    }
                    // The machine went with the thread: its disks are whoever's who takes them.
                    Err(source) => {
                        self.ending.announce(End::HandoverLost {
                            reason: crate::api::chain(&source),
                        });
                        Course::Over(Err(fault(&error)))
                    }
                }
            }
            Guest::Running(mut machine) => {
                if let Err(also) = machine.end_rounds() {
                    log::warn!("what the guest writes is recorded on: {also}");
                }
                machine.set_share(FULL);
                self.guest = Guest::Running(machine);
                Course::Over(Err(stayed(&error)))
            }
            Guest::Paused(machine) => {
                self.guest = Guest::Paused(machine);
                self.run_on(&error)
            }
            other => {
                self.guest = other;
                Course::Over(Err(fault(&error)))
            }
        }
    }

    /// Lets the guest run on here after a migration that came to nothing.
    fn run_on(&mut self, error: &SendError) -> Course {
        if let Guest::Paused(machine) = &mut self.guest
            && let Err(also) = machine.end_rounds()
        {
            log::warn!("what the guest writes is recorded on: {also}");
        }
        let resumed = self.resume();
        Course::Over(Err(match resumed {
            Ok(()) => stayed(error),
            Err(Fault { message, .. }) => Fault::bad_request(format!(
                "{}; and the guest stands still: {message}",
                fault(error).message
            )),
        }))
    }

    fn settled(&mut self, settled: Settled, why: &SendError, sending: Box<Sending>) -> Course {
        let to = &sending.to;
        match settled {
            Settled::Back(machine) => {
                // Nobody fetches what the guest goes on to write.
                drop(sending.take_keeper());
                self.guest = Guest::Paused(machine);
                self.run_on(why)
            }
            Settled::Gone(machine, gone) => {
                machine.retire();
                self.guest = Guest::NotStarted;
                if let Gone::Started | Gone::Unknown = gone
                    && let Some(keeper) = sending.take_keeper()
                {
                    // It runs there, or may, and has no other memory than this.
                    log::warn!(
                        "migration: the target was lost before it said that the guest runs; if it does, the rest of its memory \
                         is here: {}",
                        crate::api::chain(why)
                    );
                    return self.go_on_keeping(sending, keeper);
                }
                let reason = match gone {
                    Gone::Started => {
                        log::info!(
                            "migration: the leases say that the guest has started at {to}: {}",
                            crate::api::chain(why)
                        );
                        self.ending.announce(End::Migrated { to: to.to_owned() });
                        return Course::Over(Ok(()));
                    }
                    Gone::Stranger(record) => format!("its images are another's: {record}"),
                    Gone::Unknown => format!(
                        "no image of it has a lease that could say whether the guest runs at {to}, so it does not run on here{}",
                        left_behind(&sending.copied)
                    ),
                };
                let reason = format!("{reason}; {}", crate::api::chain(why));
                log::error!("migration: the guest is not here any more: {reason}");
                self.ending.announce(End::HandoverLost {
                    reason: reason.clone(),
                });
                Course::Over(Err(Fault::bad_request(format!("Migration error: {reason}"))))
            }
        }
    }

    /// How far a migration is.
    pub(super) fn migration_status(&self) -> MigrationStatus {
        let status = |state, listen: Option<&String>, progress: Option<&Progress>| MigrationStatus {
            state,
            listen: listen.cloned(),
            to: None,
            is_connected: None,
            rounds: progress.map_or(0, Progress::rounds),
            sent_bytes: progress.map_or(0, Progress::sent_bytes),
            wire_bytes: progress.map_or(0, Progress::wire_bytes),
            left_bytes: progress.map_or(0, Progress::left_bytes),
            disk_sent_bytes: progress.map_or(0, Progress::disk_sent_bytes),
            disk_left_bytes: progress.map_or(0, Progress::disk_left_bytes),
            bytes_per_s: progress.map_or(0, Progress::bytes_per_s),
            predicted_downtime_us: progress.map_or(0, |progress| {
                u64::try_from(progress.downtime().as_micros()).unwrap_or(u64::MAX)
            }),
            vcpu_permille: progress.map_or(FULL, Progress::run_permille),
        };
        match self.operation.as_ref().map(|operation| &operation.work) {
            Some(Work::Send(sending)) => {
                let stage = match &sending.stage {
                    Stage::Keeping(keeper) => {
                        return MigrationStatus {
                            to: Some(keeper.line().to),
                            is_connected: Some(keeper.is_connected()),
                            left_bytes: keeper.left_bytes(),
                            ..status(MigrationStage::PostCopy, None, Some(&sending.progress))
                        };
                    }
                    Stage::Copying => MigrationStage::Sending,
                    Stage::Stopping | Stage::Flushing(_) | Stage::Stopped => MigrationStage::Stopping,
                    Stage::Yielding(_) | Stage::Yielded => MigrationStage::HandingOver,
                    Stage::Settling(..) => MigrationStage::Settling,
                };
                status(stage, None, Some(&sending.progress))
            }
            Some(Work::Receive(receiving)) => status(
                MigrationStage::Receiving,
                Some(receiving.listen()),
                Some(receiving.progress()),
            ),
            Some(Work::Arrive(_)) => status(MigrationStage::HandingOver, None, None),
            _ => match self.fetcher() {
                Some(fetcher) => MigrationStatus {
                    is_connected: Some(fetcher.status().is_connected()),
                    left_bytes: fetcher.status().left_bytes(),
                    ..status(MigrationStage::PostCopy, fetcher.listen().as_ref(), None)
                },
                None => status(MigrationStage::Idle, None, None),
            },
        }
    }
}

/// How long a guest stands still beside its last pages: for its state, and for disks so many of which are handed over. Each of
/// them is flushed once and gets two records, which are flushed twice; one that goes along is flushed at the target, and gets one
/// at either side.
fn standstill(drives: usize) -> Duration {
    let drives = u32::try_from(drives).unwrap_or(u32::MAX);
    STATE_TIME + FLUSH_TIME.saturating_mul(drives.saturating_mul(5))
}

/// What it takes to save, to send and to restore the state, as measured.
const STATE_TIME: Duration = Duration::from_millis(6);
/// And to put something small on its medium: between that of a good disk and of a bad one.
const FLUSH_TIME: Duration = Duration::from_millis(2);

/// How a step went.
enum Step {
    Again,
    Wait(Option<Instant>),
    Failed(Fault),
}

impl Sending {
    /// What keeps the memory of the guest, if it has gone on without.
    fn take_keeper(&self) -> Option<Keeper> {
        self.keeper.lock().expect("no holder panics").take()
    }

    /// The same, where the guest runs elsewhere.
    pub(super) fn keeper(&self) -> Option<&Keeper> {
        match &self.stage {
            Stage::Keeping(keeper) => Some(keeper),
            _ => None,
        }
    }

    /// From now on its memory is fetched by whoever has the guest.
    pub(super) fn keeps(&mut self, keeper: Keeper) {
        self.stage = Stage::Keeping(keeper);
    }

    /// Gives it up.
    pub(super) fn cancel(&self) {
        self.progress.cancel();
    }
}

impl Clerk {
    fn give(&self, given: Given) {
        if let Some(desk) = &self.given {
            // A thread that has ended says why.
            let _ = desk.send(given);
        }
    }
}

/// Asks the leases until they have an answer: as long as storage does not give one, nobody may run.
fn settle(mut machine: Machine<Yielded>, is_certain: bool) -> Settled {
    let until = Instant::now() + START_MAX;
    let mut is_told = false;
    loop {
        let opposition = if is_certain || Instant::now() >= until {
            Opposition::Reclaim
        } else {
            Opposition::Cancel
        };
        machine = match machine.settle(opposition, FENCE_MAX) {
            Ok(Outcome::Back(machine)) => return Settled::Back(machine),
            Ok(Outcome::Lost(machine, None)) => return Settled::Gone(machine, Gone::Unknown),
            Ok(Outcome::Lost(machine, Some(record))) => {
                let gone = match record.phase {
                    LeasePhase::Started => Gone::Started,
                    _ => Gone::Stranger(record.to_string()),
                };
                return Settled::Gone(machine, gone);
            }
            Ok(Outcome::Open(machine)) => machine,
            Err((machine, error)) => {
                if !is_told {
                    log::warn!(
                        "the leases are asked until they answer: {}",
                        crate::api::chain(&error)
                    );
                    is_told = true;
                }
                machine
            }
        };
        thread::sleep(SETTLE_PERIOD);
    }
}

/// What is answered when a migration came to nothing.
fn stayed(error: &SendError) -> Fault {
    log::warn!(
        "migration: it came to nothing, and the guest runs on here: {}",
        crate::api::chain(error)
    );
    Fault::bad_request(format!(
        "Migration error: {}; the guest runs on here",
        crate::api::chain(error)
    ))
}

/// What an operator can do about disks that were left behind.
fn left_behind(copied: &[String]) -> String {
    if copied.is_empty() {
        return String::new();
    }
    format!(
        "; what drives `{}` had is here and, whole, at the target: if the guest does not run there, it boots from either, \
         here after `coraclectl lease break`",
        copied.join("`, `")
    )
}

fn fault(error: &dyn std::error::Error) -> Fault {
    Fault::bad_request(format!("Migration error: {}", crate::api::chain(error)))
}
