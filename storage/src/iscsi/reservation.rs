//! The lease of a logical unit: a persistent reservation as its fence, and a record that decides (LEASES in the design).
//!
//! The reservation is Write Exclusive (type 1): the one nexus that holds it writes, everybody may read. A nexus is a session, so
//! each session registers a key of its own, and takes the reservation over from the key of the last one:
//!
//! ```text
//!   first session:  record free? ─► REGISTER ─► RESERVE ─► record still free? ─► record `held`, durable
//!   each later one: REGISTER a new key ─► PREEMPT the old one ──────────────────► record still ours?  ─► it is ours
//!                                            │ conflict: the old key is gone          │ no
//!                                            ▼                                        ▼
//!                          nobody has it: RESERVE (the target was restarted)    RELEASE: lost for good
//! ```
//!
//! A session that broke off before it was up may have got as far as its PREEMPT: then the reservation is that of its key,
//! which is known again, and is taken over like that of the last session.
//!
//! PREEMPT is the compare-and-swap: it fails if somebody has preempted us before. A target that was restarted has forgotten
//! every key, and whoever comes first gets the reservation; the record tells whether it is rightly theirs.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::Access;
use crate::lease::{ChainError, LeaseError, Phase, Record, Succession};
use crate::request::Durability;

use super::bringup::{Refused, Stop, attempt, run};
use super::error::IscsiError;
use super::handover;
use super::plan::{Keyring, Plan, Records};
use super::procedure::{Data, Port};
use super::scsi::cdb::{self, Blocks, Persistence, ReserveIn, ReserveOut};
use super::scsi::reservation::{Capabilities, Keys, Reservation, ReservationKey};
use super::tail::UnreadableTail;
use super::unit::{Cache, Unit};

/// The right to write a unit.
#[derive(Clone, Debug)]
pub(super) struct Tenure {
    /// The key that the current session has the reservation with.
    pub(super) key: ReservationKey,
    /// The record that says so, if there is a place for one.
    pub(super) record: Option<Record>,
    /// The step by which its generation is raised, from when that has begun: it may have been made.
    pub(super) begun: Option<Record>,
}

impl Tenure {
    /// Under this key, by this record, which was made.
    fn of(key: ReservationKey, record: Option<Record>) -> Self {
        let begun = None;
        Self { key, record, begun }
    }

    /// The generation, or 0 if nothing says so.
    pub(super) fn generation(&self) -> u64 {
        self.record.as_ref().map_or(0, |record| record.generation)
    }

    /// Begins to raise the generation, unless there is none or no number is left: from now on the step is made, or the lease is
    /// lost. It is the same however often it is tried.
    pub(super) fn begin(&mut self) -> bool {
        if let (Some(record), None) = (&self.record, &self.begun) {
            let phase = match record.phase {
                Phase::Taken => Phase::Started,
                _ => Phase::Held,
            };
            self.begun = Record::after(Some(record), phase, &record.owner);
        }
        self.begun.is_some()
    }
}

/// What PERSISTENT RESERVE IN tells at most: as many keys as anybody would look at.
const RESERVE_IN_BYTES: u16 = 8 + 8 * 128;
/// How long somebody who has the reservation without a right to it is waited for: it will read the record, too.
const USURPER_WAIT: Duration = Duration::from_millis(100);
const USURPER_WAITS_MAX: u32 = 20;

/// Takes the lease of a unit that this process does not have yet.
pub(super) async fn claim(port: &Port, plan: &Plan, unit: &Unit) -> Result<Tenure, Stop> {
    if plan.succession != Succession::Raises && plan.records(unit).is_none() {
        let path = plan.name.clone();
        return Err(Stop::Never(LeaseError::Forgotten { path }.into()));
    }
    let before = read_record(port, plan, unit).await?;
    match plan.succession {
        Succession::TakesOver(offer) => handover::check_offered(plan, before.as_ref(), offer)?,
        Succession::Raises | Succession::Keeps(_) => check_free(port, plan, before.as_ref()).await?,
    }
    // Under the fence it has to be the same.
    let checked = plan.succession.check(before.as_ref());
    checked.map_err(|why| plan.not_taken(why))?;
    let key = plan.keys.next();
    register(port, key).await?;
    let mut taken = take(port, plan, key, before.as_ref()).await;
    if taken.is_ok() && before.as_ref().is_some_and(|last| last.phase == Phase::Broken) {
        // Since then the unit may have had no reservation, if the target was restarted: whoever had lost it may have got commands
        // in until now.
        taken = reset(port).await;
    }
    let settled = match taken {
        Ok(()) => record_tenure(port, plan, unit, before.as_ref(), key).await,
        Err(stop) => Err(stop),
    };
    match &settled {
        Ok(_) => plan.keys.settle(key),
        Err(_) => give_up(port, key).await,
    }
    settled
}

/// Whether the unit is still of the generation that a reader asks for, who makes no step.
pub(super) async fn check_unwritten(port: &Port, plan: &Plan, unit: &Unit) -> Result<(), Stop> {
    if plan.succession == Succession::Raises {
        return Ok(());
    }
    let last = read_record(port, plan, unit).await?;
    let checked = plan.succession.check(last.as_ref());
    checked.map_err(|why| plan.not_taken(why))
}

/// Whether a unit whose newest record is `last` may be taken.
async fn check_free(port: &Port, plan: &Plan, last: Option<&Record>) -> Result<(), Stop> {
    let Some(last) = last.filter(|last| last.phase.is_owned()) else {
        return Ok(());
    };
    if plan.has_begun(last) || plan.reaped.contains(&last.owner.incarnation) {
        return Ok(());
    }
    if last.owner.incarnation == plan.owner.incarnation {
        return Err(Stop::Never(
            LeaseError::HeldHere {
                path: plan.name.clone(),
            }
            .into(),
        ));
    }
    if let Some(key) = plan.takes_over {
        return if Keyring::of(last.owner.incarnation).contains(key) {
            Ok(())
        } else {
            Err(Stop::Never(IscsiError::NotTheHeir {
                image: plan.name.clone(),
                key,
                record: Box::new(last.clone()),
            }))
        };
    }
    let reserved = holder(port).await?.is_some();
    Err(Stop::Never(IscsiError::Held {
        image: plan.name.clone(),
        record: Box::new(last.clone()),
        reserved,
    }))
}

/// Whether the reservation is that of whoever has broken the lease, by its newest record.
pub(super) fn is_of_break(last: Option<&Record>, holder: ReservationKey) -> bool {
    last.is_some_and(|last| {
        last.phase == Phase::Broken && Keyring::of(last.owner.incarnation).contains(holder)
    })
}

/// Takes the reservation, also from a process whose heir this one is, from an owner who has offered the unit, from whoever has
/// broken the lease, and from an attempt of our own that broke off.
pub(super) async fn take(
    port: &Port,
    plan: &Plan,
    key: ReservationKey,
    last: Option<&Record>,
) -> Result<(), Stop> {
    match reserve_out(port, ReserveOut::Reserve { key }).await {
        Ok(()) => return Ok(()),
        Err(Refused::Stop(stop)) => return Err(stop),
        Err(Refused::Conflict(_)) => {}
    }
    let holder = holder(port).await?;
    let may_be_taken = |holder: &ReservationKey| {
        let is_offered = matches!(
            plan.succession,
            Succession::TakesOver(offer) if handover::is_old_owner(offer, *holder)
        );
        is_offered
            || plan.takes_over == Some(*holder)
            || plan
                .reaped
                .iter()
                .any(|reaped| Keyring::of(*reaped).contains(*holder))
            || plan.keys.has_tried(*holder)
            || is_of_break(last, *holder)
    };
    if let Some(victim) = holder.filter(may_be_taken)
        && preempt(port, key, victim).await?
    {
        return reset(port).await;
    }
    Err(Stop::Never(IscsiError::Reserved {
        image: plan.name.clone(),
        key: holder,
    }))
}

/// Looks at the record again under the fence, and writes our own.
async fn record_tenure(
    port: &Port,
    plan: &Plan,
    unit: &Unit,
    before: Option<&Record>,
    key: ReservationKey,
) -> Result<Tenure, Stop> {
    if plan.records(unit).is_none() {
        log::info!(
            "{} has a reservation only, and so no migration and no restore beside the disk, and a restart of the target ends \
             its lease: format it by `coraclectl disk create`, or name a place for records by `lease_at`",
            plan.name
        );
        return Ok(Tenure::of(key, None));
    }
    let now = read_record(port, plan, unit).await?;
    if now.as_ref() != before {
        return Err(Stop::Later(IscsiError::Raced {
            image: plan.name.clone(),
        }));
    }
    let record = match now {
        // Once more: it may not be durable.
        Some(begun) if plan.has_begun(&begun) => begun,
        now => {
            let taken = Record::taking(now.as_ref(), plan.succession, &plan.owner);
            plan.begin(taken.map_err(|why| plan.not_taken(why))?)
        }
    };
    write_record(port, plan, unit, &record).await?;
    Ok(Tenure::of(key, Some(record)))
}

/// Takes the reservation over from the last session of this process, if the lease is still its own.
pub(super) async fn reclaim(port: &Port, plan: &Plan, unit: &Unit, tenure: &Tenure) -> Result<Tenure, Stop> {
    let key = plan.keys.next();
    register(port, key).await?;
    let victim = tenure.key;
    if !preempt(port, key, victim).await? && !succeed(port, plan, key).await? {
        retake(port, plan, unit, tenure, key).await?;
    }
    let confirmed = confirm(port, plan, unit, tenure).await;
    match &confirmed {
        Ok(_) => plan.keys.settle(key),
        Err(_) => give_up(port, key).await,
    }
    confirmed.map(|record| Tenure::of(key, record))
}

/// Raises the generation, which has begun, under the key that the session has. Whoever has lost the lease gives that back.
pub(super) async fn raise(port: Port, plan: Arc<Plan>, unit: Unit, tenure: Tenure) -> Result<Tenure, Stop> {
    let confirmed = confirm(&port, &plan, &unit, &tenure).await;
    if let Err(Stop::Lost(_)) = confirmed {
        give_up(&port, tenure.key).await;
    }
    confirmed.map(|record| Tenure::of(tenure.key, record))
}

/// Says under the fence by which record the lease is still ours: that of `tenure`, or the one that it has begun, which is made.
/// From then on, whoever remembers the generation before knows that the unit may have been written since.
async fn confirm(port: &Port, plan: &Plan, unit: &Unit, tenure: &Tenure) -> Result<Option<Record>, Stop> {
    still_ours(port, plan, unit, tenure).await?;
    let Some(raised) = &tenure.begun else {
        return Ok(tenure.record.clone());
    };
    // Once more, if it is there: it may not be durable.
    write_record(port, plan, unit, raised).await?;
    Ok(Some(raised.clone()))
}

/// Takes the reservation from a session that broke off before anybody was told that it had got it.
async fn succeed(port: &Port, plan: &Plan, key: ReservationKey) -> Result<bool, Stop> {
    match holder(port).await? {
        Some(victim) if plan.keys.has_tried(victim) => preempt(port, key, victim).await,
        _ => Ok(false),
    }
}

/// Takes the reservation from `victim`; `false` if that does not have it any more.
pub(super) async fn preempt(port: &Port, key: ReservationKey, victim: ReservationKey) -> Result<bool, Stop> {
    match reserve_out(port, ReserveOut::Preempt { key, victim }).await {
        Ok(()) => Ok(true),
        Err(Refused::Stop(stop)) => Err(stop),
        Err(Refused::Conflict(_)) => Ok(false),
    }
}

/// Takes a reservation that is not ours any more: the target has forgotten it, or somebody has preempted us.
async fn retake(
    port: &Port,
    plan: &Plan,
    unit: &Unit,
    tenure: &Tenure,
    key: ReservationKey,
) -> Result<(), Stop> {
    if tenure.record.is_none() {
        give_up(port, key).await;
        let holder = holder(port).await?;
        return Err(Stop::Lost(lost_unrecorded(plan, holder)));
    }
    for _ in 0..USURPER_WAITS_MAX {
        match reserve_out(port, ReserveOut::Reserve { key }).await {
            Ok(()) => return Ok(()),
            Err(Refused::Stop(stop)) => return Err(stop),
            Err(Refused::Conflict(_)) => {}
        }
        // If the record is another's by now, that is the end of it. If it is still ours, then whoever has the
        // reservation came first after a restart of the target, and will read the record, too.
        if let Err(stop) = still_ours(port, plan, unit, tenure).await {
            give_up(port, key).await;
            return Err(stop);
        }
        port.sleep(USURPER_WAIT).await;
    }
    give_up(port, key).await;
    Err(Stop::Later(IscsiError::Usurped {
        image: plan.name.clone(),
        key: holder(port).await?,
    }))
}

/// Whether the newest record is the one of `tenure`, or the one that it has begun.
async fn still_ours(port: &Port, plan: &Plan, unit: &Unit, tenure: &Tenure) -> Result<(), Stop> {
    let Some(ours) = &tenure.record else { return Ok(()) };
    match read_record(port, plan, unit).await? {
        Some(newest) if newest == *ours || Some(&newest) == tenure.begun.as_ref() => Ok(()),
        Some(newest) => Err(Stop::Lost(format!(
            "the lease is lost: it is {} by {}",
            newest.phase, newest
        ))),
        None => Err(Stop::Lost(
            "the lease is lost: its record is gone, and with it the proof that nobody else writes".to_owned(),
        )),
    }
}

fn lost_unrecorded(plan: &Plan, holder: Option<ReservationKey>) -> String {
    match holder {
        Some(key) => format!(
            "the lease is lost: the reservation of {} is that of the key {key}",
            plan.name
        ),
        None => format!(
            "the lease is lost: the target has forgotten the reservation, and without a record nobody knows whether another \
             has written since; when you are sure that nobody has, end this machine, run \
             `coraclectl lease break {}` and start it again",
            plan.name
        ),
    }
}

/// Has everything on the medium, gives the lease back in good order, and ends the session. What cannot be done is said.
pub(super) async fn release(port: Port, plan: Arc<Plan>, unit: Unit, tenure: Option<Tenure>) {
    if let Err(stop) = try_release(&port, &plan, &unit, tenure.as_ref()).await {
        log::warn!(
            "{} is not given back in good order; if it was leased, the lease has to be broken before the next start: {stop}",
            plan.name
        );
    }
    port.logout().await;
}

async fn try_release(port: &Port, plan: &Plan, unit: &Unit, tenure: Option<&Tenure>) -> Result<(), Stop> {
    if plan.access == Access::ReadWrite && unit.cache() != Cache::None {
        run(port, cdb::synchronize_cache(Blocks::ALL), Data::None).await?;
    }
    let Some(tenure) = tenure else { return Ok(()) };
    // What was taken over and not started can be had back by whoever gave it, and by nobody else.
    if let Some(record) = &tenure.record
        && record.phase != Phase::Taken
    {
        let released = next_record(Some(record), Phase::Released, plan)?;
        write_record(port, plan, unit, &released).await?;
    }
    give_up(port, tenure.key).await;
    Ok(())
}

/// Takes the reservation and the registration back; what is not there any more is none to take back.
pub(super) async fn give_up(port: &Port, key: ReservationKey) {
    let _not_ours_any_more = reserve_out(port, ReserveOut::Release { key }).await;
    let unregister = ReserveOut::Register {
        existing: key,
        new: ReservationKey::NONE,
        persistence: Persistence::UntilPowerLoss,
    };
    let _not_ours_any_more = reserve_out(port, unregister).await;
}

/// Registers `key` for this session, to outlive a loss of power where the unit can do that.
pub(super) async fn register(port: &Port, key: ReservationKey) -> Result<(), Stop> {
    let persistence = match reserve_in(port, ReserveIn::ReportCapabilities).await {
        Ok(data) if Capabilities::parse(&data).is_ok_and(|can| can.can_persist) => {
            Persistence::ThroughPowerLoss
        }
        // The command is optional.
        _ => Persistence::UntilPowerLoss,
    };
    let register = |persistence| ReserveOut::RegisterAndIgnoreExistingKey {
        new: key,
        persistence,
    };
    match reserve_out(port, register(persistence)).await {
        Ok(()) => return Ok(()),
        Err(_) if persistence == Persistence::ThroughPowerLoss => {}
        Err(refused) => return Err(refused.into_stop()),
    }
    reserve_out(port, register(Persistence::UntilPowerLoss))
        .await
        .map_err(Refused::into_stop)
}

/// Who has the reservation.
pub(super) async fn holder(port: &Port) -> Result<Option<ReservationKey>, Stop> {
    let data = reserve_in(port, ReserveIn::ReadReservation).await?;
    let reservation = Reservation::parse(&data).map_err(|source| Stop::data("READ RESERVATION", source))?;
    Ok(reservation.holder.map(|holder| holder.key))
}

/// Who is registered.
pub(super) async fn registrants(port: &Port) -> Result<Vec<ReservationKey>, Stop> {
    let data = reserve_in(port, ReserveIn::ReadKeys).await?;
    let keys = Keys::parse(&data).map_err(|source| Stop::data("READ KEYS", source))?;
    Ok(keys.keys)
}

/// Ends every command that was accepted before, whoever sent it.
pub(super) async fn reset(port: &Port) -> Result<(), Stop> {
    use super::pdu::TaskOutcome;
    let outcome = port.reset_unit().await;
    if outcome != TaskOutcome::FUNCTION_COMPLETE {
        return Err(Stop::Later(IscsiError::Reset(outcome.0)));
    }
    // It leaves a UNIT ATTENTION behind.
    run(port, cdb::test_unit_ready(), Data::None).await.map(drop)
}

async fn reserve_in(port: &Port, what: ReserveIn) -> Result<Vec<u8>, Stop> {
    let cdb = cdb::persistent_reserve_in(what, RESERVE_IN_BYTES);
    run(port, cdb, Data::In(RESERVE_IN_BYTES.into())).await
}

pub(super) async fn reserve_out(port: &Port, what: ReserveOut) -> Result<(), Refused> {
    let (cdb, parameters) = cdb::persistent_reserve_out(what);
    attempt(port, cdb, Data::Out(parameters.to_vec())).await.map(drop)
}

/// The record that comes after `last`.
pub(super) fn next_record(last: Option<&Record>, phase: Phase, plan: &Plan) -> Result<Record, Stop> {
    Record::after(last, phase, &plan.owner).ok_or_else(|| plan.unrecorded(ChainError::Exhausted))
}

/// The newest record, if there is a place for records and one is there.
pub(super) async fn read_record(port: &Port, plan: &Plan, unit: &Unit) -> Result<Option<Record>, Stop> {
    match plan.records(unit) {
        None => Ok(None),
        // A directory of this host, or one that the user has mounted: as quick as that is.
        Some(Records::Chain(chain)) => chain.newest().map_err(|error| plan.unrecorded(error)),
        Some(Records::Tail(tail)) => {
            let range = tail.slots();
            let len = usize::try_from(range.end - range.start).expect("a tail is short");
            let cdb = cdb::read(
                unit.blocks(range.start, range.end - range.start),
                Durability::Cached,
            );
            let bytes = run(port, cdb, Data::In(len)).await?;
            if bytes.len() < len {
                return Err(plan.unrecorded(io::Error::from(io::ErrorKind::UnexpectedEof)));
            }
            tail.newest(&bytes).map_err(|error| plan.unrecorded(error))
        }
    }
}

/// Makes `record` the newest, durably; we may have done so before. Only under the fence.
pub(super) async fn write_record(port: &Port, plan: &Plan, unit: &Unit, record: &Record) -> Result<(), Stop> {
    match plan.records(unit) {
        None => Ok(()),
        Some(Records::Chain(chain)) => chain.complete(record).map_err(|error| plan.unrecorded(error)),
        Some(Records::Tail(tail)) => {
            let start = tail.slot_of(record.epoch).start;
            write_durably(port, unit, start, tail.encode_record(record)).await
        }
    }
}

/// Writes `bytes` to the unit, and returns when they are on its medium.
pub(super) async fn write_durably(
    port: &Port,
    unit: &Unit,
    offset_bytes: u64,
    bytes: Vec<u8>,
) -> Result<(), Stop> {
    let range = unit.blocks(offset_bytes, bytes.len() as u64);
    run(port, cdb::write(range, Durability::Cached), Data::Out(bytes)).await?;
    if unit.cache() != Cache::None {
        run(port, cdb::synchronize_cache(Blocks::ALL), Data::None).await?;
    }
    Ok(())
}

/// The newest step that records which cannot be read may have made, and the slots of a tail that are damaged; `None` if not even
/// that is known: then the tail has to be made anew.
pub(super) fn unreadable_number(error: &(dyn Error + Send + Sync + 'static)) -> Option<(u64, Vec<u64>)> {
    if let Some(ChainError::Unreadable { number, .. }) = error.downcast_ref() {
        return Some((*number, Vec::new()));
    }
    let tail: &UnreadableTail = error.downcast_ref()?;
    Some((
        tail.newest_possible?,
        tail.slots.iter().map(|(slot, _)| *slot).collect(),
    ))
}
