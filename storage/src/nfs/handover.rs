//! A file on a server on its way from one living owner to another: what each does with the records and the fence.
//!
//! ```text
//!   old owner:  CLOSE ─ offered ······················ hears nothing: `cancelled` / `reclaimed` ─► OPEN, deny WRITE ─► LOCK
//!   new owner:          newest record as offered? ─► `taken` ─► OPEN, deny WRITE ─► LOCK ─► still ours? ─► `started`
//! ```
//!
//! The records decide, as those of a file on the host do ([`crate::lease`]). Each owner is a client of its own to the server, and
//! what the old one has open is closed before anybody is told that the file is offered: nothing of it can be in the new one's
//! way, or be recovered later.

use std::sync::Arc;

use crate::backend::Access;
use crate::lease::{LeaseError, Lock, Offer, Phase, Record, Terms};
use crate::open::OpenError;
use crate::remote::dialogue::{self, OPERATOR_LIMIT};
use crate::remote::lease::{Newest, RemoteChain};

use super::bringup::{self, File, Stop};
use super::error::NfsError;
use super::fence::{self, Claim, Refused, Restored, Tenure};
use super::open::{converse, plan};
use super::plan::Plan;
use super::procedure::Port;
use super::records;
use super::v4::Verifier;

/// How long a new owner waits for the old one's fence to come down, which it does before it says so: a server may be slow to
/// forget.
const YIELDED_WAIT: std::time::Duration = std::time::Duration::from_millis(20);
const YIELDED_WAITS_MAX: u32 = 100;

/// Takes the file over that is offered: by the step after that, and then the fence.
pub(super) async fn take_over(
    port: &Port,
    plan: &Plan,
    file: File,
    offer: Offer,
) -> Result<(File, Tenure), Stop> {
    let record = take(port, plan, &file, offer).await?;
    let mut file = open_when_yielded(port, plan, file, &record).await?;
    match fence_in(port, plan, &mut file, &record).await {
        Ok(()) => Ok((file, Tenure::of(record))),
        Err(stop) => {
            fence::close(port, &file).await;
            Err(stop)
        }
    }
}

/// Makes the step by which the file is taken, unless an attempt that broke off has made it.
async fn take(port: &Port, plan: &Plan, file: &File, offer: Offer) -> Result<Record, Stop> {
    let offered = match records::newest(port, plan, file.directory).await? {
        Newest::Record(newest) if is_taken(plan, &newest, offer) => {
            records::confirm(port, plan, file, &newest).await?;
            return Ok(newest);
        }
        Newest::Record(newest) if newest.offer() == offer && newest.phase.is_owned() => newest,
        // It may be that of an attempt of ours: then it is written now.
        Newest::Torn(number) if Some(number) == offer.epoch.checked_add(1) => {
            let below = records::of_torn(port, plan, file.directory, number).await?;
            let below = below.map(|below| Record {
                epoch: offer.epoch,
                ..below
            });
            match below {
                Some(below) if below.offer() == offer => below,
                other => return Err(withdrawn(plan, other)),
            }
        }
        newest => return Err(withdrawn(plan, record_of(newest))),
    };
    let record = Record::taking(Some(&offered), plan.succession, &plan.owner);
    let record = record.map_err(|why| plan.not_taken(why))?;
    match records::append(port, plan, file, &record).await {
        Err(Stop::Later(NfsError::Raced { .. })) => {}
        appended => return appended.map(|()| record),
    }
    // By ourselves, and the answer was lost; or by another.
    match records::newest(port, plan, file.directory).await? {
        Newest::Record(newest) if is_taken(plan, &newest, offer) => {
            records::confirm(port, plan, file, &newest).await?;
            Ok(newest)
        }
        newest => Err(withdrawn(plan, record_of(newest))),
    }
}

/// Whether the newest step is the one by which this process has taken what was offered.
fn is_taken(plan: &Plan, newest: &Record, offer: Offer) -> bool {
    newest.phase == Phase::Taken
        && newest.owner.incarnation == plan.owner.incarnation
        && Some(newest.epoch) == offer.epoch.checked_add(1)
}

async fn open_when_yielded(port: &Port, plan: &Plan, file: File, record: &Record) -> Result<File, Stop> {
    for _ in 0..YIELDED_WAITS_MAX {
        match fence::open(port, plan, &file, &Claim::ByName).await {
            Ok(opened) => return Ok(opened),
            Err(Refused::Stop(stop)) => return Err(stop),
            Err(Refused::Denied) => {}
        }
        check_newest(port, plan, &file, record).await?;
        port.sleep(YIELDED_WAIT).await;
    }
    Err(Stop::Never(NfsError::InUse {
        image: plan.name.clone(),
        is_writer: false,
    }))
}

/// Locks the file, which is open, and looks whether it may still be had.
async fn fence_in(port: &Port, plan: &Plan, file: &mut File, record: &Record) -> Result<(), Stop> {
    file.lock = Some(fence::lock(port, plan, file, Restored::No).await?);
    check_newest(port, plan, file, record).await?;
    file.can_deallocate = bringup::can_deallocate(port, file).await?;
    file.life = Some(fence::commit(port, file).await?);
    Ok(())
}

async fn check_newest(port: &Port, plan: &Plan, file: &File, record: &Record) -> Result<(), Stop> {
    match records::newest(port, plan, file.directory).await? {
        Newest::Record(newest) if newest == *record => Ok(()),
        newest => Err(withdrawn(plan, record_of(newest))),
    }
}

fn record_of(newest: Newest) -> Option<Record> {
    match newest {
        Newest::Record(record) => Some(record),
        Newest::Torn(_) | Newest::None => None,
    }
}

/// That the file is not as it was offered.
fn withdrawn(plan: &Plan, newest: Option<Record>) -> Stop {
    let path = plan.name.clone();
    let newest = newest.map(Box::new);
    Stop::Never(LeaseError::Withdrawn { path, newest }.into())
}

/// Takes the fence down. It is an error if it may still be up.
pub(super) async fn take_down(port: Port, plan: Arc<Plan>, file: File) -> Result<(), Stop> {
    let is_closed = fence::close(&port, &file).await;
    fence::leave(&port, &file.client()).await;
    if is_closed {
        Ok(())
    } else {
        Err(Stop::Later(NfsError::NotClosed {
            image: plan.name.clone(),
        }))
    }
}

/// The same on a later connection: the server forgets all that this client had in its earlier life.
pub(super) async fn take_down_again(port: Port, plan: Arc<Plan>) -> Result<(), Stop> {
    let client = bringup::enter(&port, &plan, Verifier(bringup::random())).await?;
    fence::leave(&port, &client).await;
    Ok(())
}

/// Looks at the file that `url` names, and says whether it is the one that is offered. Nothing is opened and nothing is changed.
pub(crate) fn check_offer(url: &str, terms: &Terms<'_>, offer: Offer) -> Result<(), NfsError> {
    let chain = FileChain::new(url, terms)?;
    match chain.run(look)? {
        Newest::Record(newest) if newest.offer() == offer && newest.phase.is_owned() => Ok(()),
        newest => Err(LeaseError::Withdrawn {
            path: chain.0.name.clone(),
            newest: record_of(newest).map(Box::new),
        }
        .into()),
    }
}

/// The records of a file, for whoever holds it while its disk has no session.
#[derive(Debug)]
pub(super) struct FileChain(Arc<Plan>);

impl FileChain {
    /// Those of the file that `url` names, as another client than its disk is.
    pub(super) fn new(url: &str, terms: &Terms<'_>) -> Result<Self, NfsError> {
        let terms = Terms {
            lock: Lock::Exclusive,
            ..*terms
        };
        let (plan, _) = plan(url, Access::ReadWrite, &terms)?;
        Ok(Self(Arc::new(plan)))
    }

    fn run<T, F>(&self, body: impl Fn(Port, Arc<Plan>) -> F) -> Result<T, NfsError>
    where
        F: Future<Output = Result<T, Stop>> + Send + 'static,
    {
        let mut dialogue = converse(dialogue::plain(), &self.0, OPERATOR_LIMIT)?;
        dialogue.run(|port| body(port, Arc::clone(&self.0)))
    }

    fn failed(&self, source: NfsError) -> OpenError {
        OpenError::of_nfs(&self.0.name, source)
    }
}

impl RemoteChain for FileChain {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn newest(&self) -> Result<Newest, OpenError> {
        self.run(look).map_err(|error| self.failed(error))
    }

    fn append(&self, record: &Record) -> Result<Option<Record>, OpenError> {
        let made = self.run(|port, plan| append(port, plan, record.clone()));
        let made = made.map_err(|error| self.failed(error))?;
        Ok(made.then(|| record.clone()))
    }
}

async fn look(port: Port, plan: Arc<Plan>) -> Result<Newest, Stop> {
    let client = bringup::arrive(&port, &plan).await?;
    let newest = match bringup::directory(&port, &plan).await {
        Ok(directory) => records::newest(&port, &plan, directory).await,
        Err(stop) => Err(stop),
    };
    fence::leave(&port, &client).await;
    newest
}

async fn append(port: Port, plan: Arc<Plan>, record: Record) -> Result<bool, Stop> {
    let client = bringup::arrive(&port, &plan).await?;
    let made = match bringup::find(&port, &plan).await {
        Ok(found) => {
            let file = found.of(client.clone(), Verifier::default());
            append_in_session(&port, &plan, &file, &record).await
        }
        Err(stop) => Err(stop),
    };
    fence::leave(&port, &client).await;
    made
}

async fn append_in_session(port: &Port, plan: &Plan, file: &File, record: &Record) -> Result<bool, Stop> {
    match records::append(port, plan, file, record).await {
        Ok(()) => return Ok(true),
        Err(Stop::Later(NfsError::Raced { .. })) => {}
        Err(stop) => return Err(stop),
    }
    match records::newest(port, plan, file.directory).await? {
        Newest::Record(newest) if newest == *record => {
            records::confirm(port, plan, file, record).await?;
            Ok(true)
        }
        _ => Ok(false),
    }
}
