//! What an operator does with the lease of a unit: look at it, take it away, and make a place for its records.

use std::sync::Arc;

use crate::lease::{LeaseError, Phase, Record, fill_random};
use crate::reactor::Reactor;

use super::bringup::{Refused, Stop, enter, identify, identify_without_tail};
use super::dialogue::{Dialogue, OPERATOR_LIMIT};
use super::error::IscsiError;
use super::plan::Plan;
use super::procedure::Port;
use super::reservation::{self, register, registrants, reserve_out, write_durably};
use super::scsi::cdb::ReserveOut;
use super::scsi::designator::Designator;
use super::scsi::reservation::ReservationKey;
use super::tail::{FormatId, Header, Tail};
use super::unit::Unit;

/// How things stand with a unit and its lease.
#[derive(Debug)]
pub struct UnitStanding {
    /// What the unit calls itself.
    pub identity: Option<String>,
    /// All of it, in bytes.
    pub capacity_bytes: u64,
    /// What a guest sees of it, in bytes.
    pub size_bytes: u64,
    /// Whether it takes no writes.
    pub is_write_protected: bool,
    /// Where records are kept, in words; `None` if nowhere.
    pub records: Option<String>,
    /// The newest record, if there is one that can be read.
    pub newest: Result<Option<Record>, IscsiError>,
    /// Whose key has the reservation.
    pub holder: Option<ReservationKey>,
    /// The keys that are registered.
    pub registrants: Vec<ReservationKey>,
}

/// How often a reservation may change hands while it is taken away.
const PREEMPTS_MAX: u32 = 8;

/// Looks at the lease of the unit of `plan`, and changes nothing.
pub(super) fn inspect(io: impl Reactor, plan: Arc<Plan>) -> Result<UnitStanding, IscsiError> {
    let shared = Arc::clone(&plan);
    Dialogue::new(io, plan, OPERATOR_LIMIT)?.run(move |port| look(port, Arc::clone(&shared)))
}

async fn look(port: Port, plan: Arc<Plan>) -> Result<UnitStanding, Stop> {
    enter(&port, &plan).await?;
    let unit = identify(&port, &plan).await?;
    let newest = match reservation::read_record(&port, &plan, &unit).await {
        Ok(record) => Ok(record),
        Err(Stop::Never(error @ IscsiError::Records { .. })) => Err(error),
        Err(stop) => return Err(stop),
    };
    // Not every target has reservations.
    let holder = optional(reservation::holder(&port).await)?.flatten();
    let registrants = optional(registrants(&port).await)?.unwrap_or_default();
    port.logout().await;
    Ok(UnitStanding {
        identity: unit.identity.as_ref().map(ToString::to_string),
        capacity_bytes: unit.capacity_bytes,
        size_bytes: unit.size_bytes,
        is_write_protected: unit.is_write_protected(),
        records: plan.records(&unit).map(|records| records.to_string()),
        newest,
        holder,
        registrants,
    })
}

fn optional<T>(asked: Result<T, Stop>) -> Result<Option<T>, Stop> {
    match asked {
        Ok(told) => Ok(Some(told)),
        Err(Stop::Never(IscsiError::Command { .. })) => Ok(None),
        Err(stop) => Err(stop),
    }
}

/// Declares the lease of the unit of `plan` broken: fences its holder, waits until nothing of it can still be written, and says
/// so in the record, if there is a place for one.
pub(super) fn break_lease(io: impl Reactor, plan: Arc<Plan>) -> Result<Option<Record>, IscsiError> {
    let shared = Arc::clone(&plan);
    Dialogue::new(io, plan, OPERATOR_LIMIT)?.run(move |port| break_off(port, Arc::clone(&shared)))
}

async fn break_off(port: Port, plan: Arc<Plan>) -> Result<Option<Record>, Stop> {
    enter(&port, &plan).await?;
    let unit = identify(&port, &plan).await?;
    let last = newest_or_number(&port, &plan, &unit).await?;
    let is_free =
        matches!(&last, Last::Known(last) if last.as_ref().is_none_or(|last| last.phase != Phase::Held));
    if is_free && reservation::holder(&port).await?.is_none() {
        return Err(Stop::Never(
            LeaseError::Free {
                path: plan.name.clone(),
            }
            .into(),
        ));
    }
    let key = plan.keys.next();
    register(&port, key).await?;
    let broken = match take_away(&port, &plan, key).await {
        Ok(()) => declare_broken(&port, &plan, &unit).await,
        Err(stop) => Err(stop),
    };
    reservation::give_up(&port, key).await;
    if broken.is_ok() {
        port.logout().await;
    }
    broken
}

/// Gets the reservation, whoever has it, and ends what they had under way.
async fn take_away(port: &Port, plan: &Plan, key: ReservationKey) -> Result<(), Stop> {
    for _ in 0..PREEMPTS_MAX {
        let taken = match reservation::holder(port).await? {
            None => reserve_out(port, ReserveOut::Reserve { key }).await,
            Some(victim) => preempt(port, key, victim).await,
        };
        match taken {
            // PREEMPT alone does not stop what was accepted before, and PREEMPT AND ABORT is not to be trusted.
            Ok(()) => return reservation::reset(port).await,
            Err(Refused::Conflict(_)) => {}
            Err(Refused::Stop(stop)) => return Err(stop),
        }
    }
    Err(Stop::Never(IscsiError::Raced {
        image: plan.name.clone(),
    }))
}

async fn preempt(port: &Port, key: ReservationKey, victim: ReservationKey) -> Result<(), Refused> {
    match reserve_out(port, ReserveOut::PreemptAndAbort { key, victim }).await {
        Err(Refused::Stop(Stop::Never(IscsiError::Command { .. }))) => {
            reserve_out(port, ReserveOut::Preempt { key, victim }).await
        }
        done => done,
    }
}

/// What can be known of the last step.
enum Last {
    Known(Option<Record>),
    /// Records that cannot be read, up to this number.
    Unreadable(u64, Vec<u64>),
}

async fn newest_or_number(port: &Port, plan: &Plan, unit: &Unit) -> Result<Last, Stop> {
    match reservation::read_record(port, plan, unit).await {
        Ok(record) => Ok(Last::Known(record)),
        Err(Stop::Never(IscsiError::Records { source, .. })) => {
            match reservation::unreadable_number(source.as_ref()) {
                Some((number, slots)) => Ok(Last::Unreadable(number, slots)),
                None => Err(Stop::Never(IscsiError::Records {
                    image: plan.name.clone(),
                    source,
                })),
            }
        }
        Err(stop) => Err(stop),
    }
}

async fn declare_broken(port: &Port, plan: &Plan, unit: &Unit) -> Result<Option<Record>, Stop> {
    if plan.records(unit).is_none() {
        return Ok(None);
    }
    // Again, now that nobody else writes.
    let last = newest_or_number(port, plan, unit).await?;
    let exhausted = || {
        Stop::Never(IscsiError::Records {
            image: plan.name.clone(),
            source: Box::new(crate::lease::ChainError::Exhausted),
        })
    };
    let (record, damaged) = match last {
        Last::Known(last) if last.as_ref().is_none_or(|last| last.phase != Phase::Held) => return Ok(last),
        Last::Known(last) => (
            Record::after(last.as_ref(), Phase::Broken, &plan.owner).ok_or_else(exhausted)?,
            Vec::new(),
        ),
        Last::Unreadable(number, slots) => (
            Record::over_unreadable(number, &plan.owner).ok_or_else(exhausted)?,
            slots,
        ),
    };
    reservation::write_record(port, plan, unit, &record).await?;
    // In this order: a crash in between leaves what is unreadable unreadable.
    if let Some(tail) = &unit.tail {
        for slot in damaged
            .into_iter()
            .filter(|slot| *slot != record.epoch % super::tail::SLOTS)
        {
            write_durably(
                port,
                unit,
                tail.slot_of(slot).start,
                vec![0; index(tail.piece_bytes())],
            )
            .await?;
        }
    }
    Ok(Some(record))
}

/// Makes a reserved tail on the unit of `plan`, in place of the one that it has if `replace` is said; what lies
/// before it stays. Returns how many bytes a guest will see.
pub(super) fn create(io: impl Reactor, plan: Arc<Plan>, replace: Replace) -> Result<u64, IscsiError> {
    let shared = Arc::clone(&plan);
    Dialogue::new(io, plan, OPERATOR_LIMIT)?.run(move |port| format(port, Arc::clone(&shared), replace))
}

/// Whether a reserved tail may be made where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replace {
    /// It is refused.
    Never,
    /// It is made anew: the records that it had are gone.
    Always,
}

async fn format(port: Port, plan: Arc<Plan>, replace: Replace) -> Result<u64, Stop> {
    enter(&port, &plan).await?;
    let unit = match (identify(&port, &plan).await, replace) {
        // Something that looks like one, and is none.
        (Err(Stop::Never(IscsiError::Tail(_))), Replace::Always) => {
            identify_without_tail(&port, &plan).await?
        }
        (identified, _) => identified?,
    };
    if unit.is_write_protected() {
        return Err(Stop::Never(IscsiError::WriteProtected {
            initiator: plan.login.initiator.to_string(),
        }));
    }
    if unit.tail.is_some() && replace == Replace::Never {
        return Err(Stop::Never(IscsiError::Formatted {
            image: plan.name.clone(),
        }));
    }
    let newest = reservation::read_record(&port, &plan, &unit).await;
    if let (Ok(Some(held)), true) = (&newest, reservation::holder(&port).await?.is_some()) {
        return Err(Stop::Never(IscsiError::Held {
            image: plan.name.clone(),
            record: Box::new(held.clone()),
            reserved: true,
        }));
    }
    let key = plan.keys.next();
    register(&port, key).await?;
    let made = match reserve_out(&port, ReserveOut::Reserve { key }).await {
        Ok(()) => make_tail(&port, &unit).await,
        Err(Refused::Conflict(_)) => Err(Stop::Never(IscsiError::Reserved {
            image: plan.name.clone(),
            key: reservation::holder(&port).await?,
        })),
        Err(Refused::Stop(stop)) => Err(stop),
    };
    reservation::give_up(&port, key).await;
    if made.is_ok() {
        port.logout().await;
    }
    made
}

async fn make_tail(port: &Port, unit: &Unit) -> Result<u64, Stop> {
    let tail = Tail::layout(unit.capacity_bytes, unit.block_bytes);
    let tail = tail.ok_or(Stop::Never(IscsiError::TooSmall {
        size_bytes: unit.capacity_bytes,
    }))?;
    let identity = unit
        .identity
        .as_ref()
        .map(Designator::identity)
        .unwrap_or_default();
    let mut id = [0; 16];
    fill_random(&mut id);
    let header = Header::new(tail, &identity, FormatId(id)).ok_or(Stop::Never(IscsiError::Nameless))?;
    let slots = tail.slots();
    write_durably(port, unit, slots.start, vec![0; index(slots.end - slots.start)]).await?;
    write_durably(port, unit, tail.header().start, header.encode()).await?;
    Ok(tail.guest_bytes())
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a tail is short")
}
