//! What an operator does with the lease of a unit: look at it, take it away, and make a place for its records.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;

use crate::lease::{ChainError, LeaseError, Phase, Record, fill_random};
use crate::reactor::Reactor;
use crate::remote::dialogue::{self, OPERATOR_LIMIT};
use crate::request::Durability;

use super::bringup::{Refused, Stop, enter, identify, identify_without_tail, run};
use super::error::IscsiError;
use super::open::converse;
use super::plan::{Keyring, Plan};
use super::procedure::{Data, Port};
use super::reservation::{self, register, registrants, reserve_out, write_durably};
use super::scsi::cdb::{self, ReserveOut};
use super::scsi::designator::Designator;
use super::scsi::reservation::ReservationKey;
use super::tail::{FormatId, Header, Tail, UnreadableTail};
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

impl UnitStanding {
    /// Whose key has the reservation, unless it is only kept for the next owner: whoever has broken the lease has left it.
    pub fn writer(&self) -> Option<ReservationKey> {
        let newest = self.newest.as_ref().ok().and_then(Option::as_ref);
        self.holder
            .filter(|holder| !reservation::is_of_break(newest, *holder))
    }

    /// Whether `key` is one of the owner whom the newest record names.
    pub fn is_of_owner(&self, key: ReservationKey) -> bool {
        match &self.newest {
            Ok(Some(record)) => Keyring::of(record.owner.incarnation).contains(key),
            Ok(None) | Err(_) => false,
        }
    }
}

/// Whoever looks after a unit: each call has a session of its own, and none of them uses the unit as an image.
#[derive(Debug)]
pub struct Operator(Arc<Plan>);

impl Operator {
    pub(super) fn of(plan: Arc<Plan>) -> Self {
        Self(plan)
    }

    /// Looks at the unit and its lease, and changes nothing.
    ///
    /// # Errors
    ///
    /// When the unit cannot be reached or makes no sense.
    pub fn inspect(&self) -> Result<UnitStanding, IscsiError> {
        self.converse(dialogue::plain(), look)
    }

    /// Declares the lease of the unit broken: its holder is fenced, what it had under way has ended, and the next who wants
    /// the lease gets it. The record that says so, if there is a place for records.
    ///
    /// # Errors
    ///
    /// When there is nothing to break, or it cannot be done.
    pub fn break_lease(&self) -> Result<Option<Record>, IscsiError> {
        self.break_lease_on(dialogue::plain())
    }

    /// The same on this reactor.
    pub(crate) fn break_lease_on(&self, io: impl Reactor) -> Result<Option<Record>, IscsiError> {
        self.converse(io, break_off)
    }

    /// Makes a reserved tail for lease records at the end of the unit. What lies before the tail stays. Returns how many bytes
    /// a guest sees from now on.
    ///
    /// # Errors
    ///
    /// When somebody has the unit, when something is lost that is not to be replaced, or when it cannot be done.
    pub fn create(&self, replace: Replace) -> Result<u64, IscsiError> {
        self.create_on(dialogue::plain(), replace)
    }

    /// The same on this reactor.
    pub(crate) fn create_on(&self, io: impl Reactor, replace: Replace) -> Result<u64, IscsiError> {
        self.converse(io, move |port, plan| format(port, plan, replace))
    }

    fn converse<T, F>(&self, io: impl Reactor, body: impl Fn(Port, Arc<Plan>) -> F) -> Result<T, IscsiError>
    where
        F: Future<Output = Result<T, Stop>> + Send + 'static,
    {
        let mut dialogue = converse(io, &self.0, OPERATOR_LIMIT)?;
        dialogue.run(|port| body(port, Arc::clone(&self.0)))
    }
}

/// How often a reservation may change hands while it is taken away.
const PREEMPTS_MAX: u32 = 8;

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

/// Fences the holder, waits until nothing of it can still be written, and says so in the record, if there is a place for one.
async fn break_off(port: Port, plan: Arc<Plan>) -> Result<Option<Record>, Stop> {
    enter(&port, &plan).await?;
    let unit = identify(&port, &plan).await?;
    let last = newest_or_number(&port, &plan, &unit).await?;
    let holder = reservation::holder(&port).await?;
    let is_free = match &last {
        Last::Known(Some(last)) if last.phase.is_owned() => false,
        Last::Known(last) => holder.is_none_or(|holder| reservation::is_of_break(last.as_ref(), holder)),
        Last::Unreadable(..) | Last::Gone(_) => false,
    };
    if is_free {
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
    // The fence stays up, for the next owner to take over: whoever was fenced may still have commands on their way, and a
    // unit without a reservation would carry them out. Only where there is no record nobody could tell whose it is.
    let is_known = matches!(&broken, Ok(Some(record)) if record.owner.incarnation == plan.owner.incarnation);
    if !is_known {
        reservation::give_up(&port, key).await;
    }
    if broken.is_ok() {
        port.logout().await;
    }
    broken
}

/// Gets the reservation, whoever has it, and ends what they had under way.
pub(super) async fn take_away(port: &Port, plan: &Plan, key: ReservationKey) -> Result<(), Stop> {
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
    /// Records none of which is left to count from.
    Gone(Box<dyn Error + Send + Sync>),
}

async fn newest_or_number(port: &Port, plan: &Plan, unit: &Unit) -> Result<Last, Stop> {
    match reservation::read_record(port, plan, unit).await {
        Ok(record) => Ok(Last::Known(record)),
        Err(Stop::Never(IscsiError::Records { source, .. })) => {
            match reservation::unreadable_number(source.as_ref()) {
                Some((number, slots)) => Ok(Last::Unreadable(number, slots)),
                None if source.is::<UnreadableTail>() => Ok(Last::Gone(source)),
                None => Err(plan.unrecorded(source)),
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
    let (record, damaged) = match last {
        Last::Known(last) if last.as_ref().is_none_or(|last| !last.phase.is_owned()) => return Ok(last),
        Last::Known(last) => (
            reservation::next_record(last.as_ref(), Phase::Broken, plan)?,
            Vec::new(),
        ),
        Last::Gone(source) => {
            return Err(Stop::Never(IscsiError::RecordsGone {
                image: plan.name.clone(),
                source,
            }));
        }
        Last::Unreadable(number, slots) => (
            Record::over_unreadable(number, &plan.owner)
                .ok_or_else(|| plan.unrecorded(ChainError::Exhausted))?,
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

/// Whether a reserved tail may be made where there is something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replace {
    /// It is refused.
    Never,
    /// It takes the place of whatever is there, of another tail too: the records that that had are gone.
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
    if let Ok(Some(held)) = &newest
        && held.phase.is_owned()
        && reservation::holder(&port).await?.is_some()
    {
        return Err(Stop::Never(IscsiError::Held {
            image: plan.name.clone(),
            record: Box::new(held.clone()),
            reserved: true,
        }));
    }
    let key = plan.keys.next();
    register(&port, key).await?;
    let last = newest.as_ref().ok().and_then(Option::as_ref);
    let made = match reservation::take(&port, &plan, key, last).await {
        Ok(()) => make_tail(&port, &plan, &unit, replace).await,
        Err(stop) => Err(stop),
    };
    reservation::give_up(&port, key).await;
    if made.is_ok() {
        port.logout().await;
    }
    made
}

async fn make_tail(port: &Port, plan: &Plan, unit: &Unit, replace: Replace) -> Result<u64, Stop> {
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
    // Now that nobody else writes.
    if replace == Replace::Never && !is_blank(port, unit, tail.guest_bytes()).await? {
        return Err(Stop::Never(IscsiError::NotBlank {
            image: plan.name.clone(),
            tail_bytes: unit.capacity_bytes - tail.guest_bytes(),
        }));
    }
    let slots = tail.slots();
    write_durably(port, unit, slots.start, vec![0; index(slots.end - slots.start)]).await?;
    write_durably(port, unit, tail.header().start, header.encode()).await?;
    Ok(tail.guest_bytes())
}

/// Whether the unit has nothing but zeros from `start` on.
async fn is_blank(port: &Port, unit: &Unit, start: u64) -> Result<bool, Stop> {
    const READ_BYTES_MAX: u64 = 1 << 16;
    let mut at = start;
    while at < unit.capacity_bytes {
        let len = READ_BYTES_MAX.min(unit.capacity_bytes - at);
        let cdb = cdb::read(unit.blocks(at, len), Durability::Cached);
        let bytes = run(port, cdb, Data::In(index(len))).await?;
        // Bytes that did not come are not known to be zeros.
        if bytes.len() < index(len) || bytes.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += len;
    }
    Ok(true)
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a tail is short")
}
