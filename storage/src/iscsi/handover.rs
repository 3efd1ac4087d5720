//! A unit on its way from one living owner to another: what each does with the records and the reservation.
//!
//! ```text
//!   old owner:  LOGOUT ─ offered ············ hears nothing: PREEMPT whoever ─► still as it was? `cancelled`, `reclaimed`
//!   new owner:           newest record as offered? ─► PREEMPT the old one ─► still as offered? `taken` ─► `started`
//! ```
//!
//! Each step is made under the reservation, by whoever has it after a reset has ended what was under way: so each number has
//! one winner, and whoever finds another's record there gives the reservation back. The old owner does not: what it leaves is
//! reserved until somebody preempts it, and so is what it has back until its disk takes that over. A unit that nobody has
//! reserved would carry out a loser's record that comes late, over the winner's.

use std::sync::Arc;

use crate::backend::Access;
use crate::lease::{LeaseError, Lock, Offer, Record, Terms};
use crate::open::OpenError;
use crate::remote::dialogue::{self, OPERATOR_LIMIT};
use crate::remote::lease::{Newest, RemoteChain};

use super::bringup::{Stop, enter, identify};
use super::error::IscsiError;
use super::open::{converse, plan};
use super::operator::take_away;
use super::plan::{Keyring, Plan};
use super::procedure::Port;
use super::reservation::{self, register};
use super::scsi::reservation::ReservationKey;
use super::unit::Unit;

/// Whether a unit whose newest record is `last` is as it was offered, or was taken by an attempt of ours that broke off.
pub(super) fn check_offered(plan: &Plan, last: Option<&Record>, offer: Offer) -> Result<(), Stop> {
    let is_offered = |last: &Record| last.offer() == offer && last.phase.is_owned();
    match last {
        Some(last) if is_offered(last) || plan.has_begun(last) => Ok(()),
        last => Err(Stop::Never(withdrawn(plan, last).into())),
    }
}

/// Whether `holder` is the old owner, from whom the reservation is to be taken.
pub(super) fn is_old_owner(offer: Offer, holder: ReservationKey) -> bool {
    Keyring::of(offer.incarnation).contains(holder)
}

fn withdrawn(plan: &Plan, newest: Option<&Record>) -> LeaseError {
    LeaseError::Withdrawn {
        path: plan.name.clone(),
        newest: newest.cloned().map(Box::new),
    }
}

/// Looks at the unit that `url` names, and says whether it is the one that is offered. Nothing is changed.
pub(crate) fn check_offer(url: &str, terms: &Terms<'_>, offer: Offer) -> Result<(), IscsiError> {
    let terms = Terms {
        lock: Lock::Exclusive,
        ..*terms
    };
    let (plan, _) = plan(url, Access::ReadWrite, &terms)?;
    let chain = UnitChain(Arc::new(plan));
    match chain.run(look)? {
        Some(newest) if newest.offer() == offer && newest.phase.is_owned() => Ok(()),
        newest => Err(withdrawn(&chain.0, newest.as_ref()).into()),
    }
}

/// The records of a unit, for whoever holds it while its disk has no session.
#[derive(Debug)]
pub(super) struct UnitChain(Arc<Plan>);

impl UnitChain {
    /// Those of the unit of a disk of that plan.
    pub(super) fn of(plan: &Plan) -> Self {
        Self(Arc::new(plan.for_records()))
    }

    fn run<T, F>(&self, body: impl Fn(Port, Arc<Plan>) -> F) -> Result<T, IscsiError>
    where
        F: Future<Output = Result<T, Stop>> + Send + 'static,
    {
        let mut dialogue = converse(dialogue::plain(), &self.0, OPERATOR_LIMIT)?;
        dialogue.run(|port| body(port, Arc::clone(&self.0)))
    }

    fn failed(&self, source: IscsiError) -> OpenError {
        OpenError::of_unit(&self.0.name, source)
    }
}

impl RemoteChain for UnitChain {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn newest(&self) -> Result<Newest, OpenError> {
        let newest = self.run(look);
        let newest = newest.map_err(|error| self.failed(error))?;
        Ok(newest.map_or(Newest::None, Newest::Record))
    }

    fn append(&self, record: &Record) -> Result<Option<Record>, OpenError> {
        self.run(|port, plan| append(port, plan, record.clone()))
            .map_err(|error| self.failed(error))
    }
}

async fn look(port: Port, plan: Arc<Plan>) -> Result<Option<Record>, Stop> {
    enter(&port, &plan).await?;
    let unit = identify(&port, &plan).await?;
    let newest = reservation::read_record(&port, &plan, &unit).await?;
    let is_ours = |newest: &Record| newest.owner.incarnation == plan.owner.incarnation;
    if newest.as_ref().is_some_and(|newest| !is_ours(newest)) {
        let_go(&port, &plan).await?;
    }
    port.logout().await;
    Ok(newest)
}

/// Gives a reservation back that an attempt of ours has got which broke off: the unit is another's.
async fn let_go(port: &Port, plan: &Plan) -> Result<(), Stop> {
    let holder = reservation::holder(port).await?;
    let Some(victim) = holder.filter(|holder| plan.keys.has_tried(*holder)) else {
        return Ok(());
    };
    let key = plan.keys.next();
    register(port, key).await?;
    let _another_was_first = reservation::preempt(port, key, victim).await?;
    reservation::give_up(port, key).await;
    Ok(())
}

/// Makes the step, unless its number is another's. The reservation stays for the disk where it was made.
async fn append(port: Port, plan: Arc<Plan>, record: Record) -> Result<Option<Record>, Stop> {
    enter(&port, &plan).await?;
    let unit = identify(&port, &plan).await?;
    // The same, if it was begun before: a connection that broke off may still deliver that.
    let record = plan.begin(record);
    let before = reservation::read_record(&port, &plan, &unit).await?;
    let is_next = before
        .as_ref()
        .is_some_and(|before| *before == record || before.epoch.checked_add(1) == Some(record.epoch));
    let made = if is_next {
        append_reserved(&port, &plan, &unit, before.as_ref(), &record).await?
    } else {
        false
    };
    port.logout().await;
    Ok(made.then_some(record))
}

async fn append_reserved(
    port: &Port,
    plan: &Plan,
    unit: &Unit,
    before: Option<&Record>,
    record: &Record,
) -> Result<bool, Stop> {
    let key = plan.keys.next();
    register(port, key).await?;
    // Whoever has it reads the record, too, and finds what is made here.
    take_away(port, plan, key).await?;
    let now = reservation::read_record(port, plan, unit).await?;
    if now.as_ref() != before {
        reservation::give_up(port, key).await;
        return Ok(false);
    }
    reservation::write_record(port, plan, unit, record).await?;
    plan.keys.settle(key);
    Ok(true)
}
