//! The lease of a file on a server: an open that denies others to write and a lock as its fence, and a record that decides
//! (LEASES in the design).
//!
//! ```text
//!   first session:  OPEN, deny WRITE ─► LOCK ─► newest record free or of somebody without a fence? ─► record `held`, durable
//!   each later one: nothing newer than our record? ─► OPEN as before the restart, or anew ─► LOCK ─► still nothing newer?
//! ```
//!
//! The open keeps others from opening the file to write. Every WRITE is sent by the right of the lock: if another has taken
//! that away, an open that was recovered since is worth nothing. Whoever has lost both, to a restart of the server or to a
//! silence that was longer than its lease, looks at the records first.

use crate::backend::Access;
use crate::lease::{LeaseError, Lock, Phase, Record, Succession};

use super::bringup::{self, Arrival, File, Stop, failed, has_lock, run, run_after_grace};
use super::error::NfsError;
use super::handover;
use super::plan::Plan;
use super::procedure::{CallError, Port};
use super::records::{self, Newest};
use super::v4::attributes::number;
use super::v4::status::{Verdict, verdict};
use super::v4::{
    Arguments, Attributes, Bitmap, ClientId, Close, Commit, CreateHow, FileHandle, Lock as LockArguments,
    LockType, Locker, Locku, Open, OpenClaim, OpenHow, Operations, ReplyError, ShareAccess, ShareDeny,
    Stateid, Stateids, Status, Verifier,
};

/// The right to write a file.
#[derive(Clone, Debug)]
pub(super) struct Tenure {
    /// The record that says so.
    pub(super) record: Record,
    /// The step by which its generation is raised, from when that has begun: it may have been made.
    pub(super) begun: Option<Record>,
}

impl Tenure {
    /// By this record, which was made.
    pub(super) fn of(record: Record) -> Self {
        Self { record, begun: None }
    }

    /// Begins to raise the generation, unless no number is left: from now on the step is made, or the lease is lost. It is the
    /// same however often it is tried.
    pub(super) fn begin(&mut self) -> bool {
        if self.begun.is_none() {
            let phase = match self.record.phase {
                Phase::Taken => Phase::Started,
                _ => Phase::Held,
            };
            self.begun = Record::after(Some(&self.record), phase, &self.record.owner);
        }
        self.begun.is_some()
    }
}

/// The byte that is locked: far behind the end of every file, where nobody reads or writes.
const LOCK_OFFSET: u64 = 1 << 62;
const LOCK_BYTES: u64 = 1;
/// How long an open is waited for that is the last of a process which is known to have ended: the server frees it with its lease.
const DEAD_WAIT: std::time::Duration = std::time::Duration::from_millis(250);
const DEAD_WAITS_MAX: u32 = 60;

/// Why a file is not opened.
pub(super) enum Refused {
    /// Another has it.
    Denied,
    Stop(Stop),
}

impl From<Stop> for Refused {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}

/// Opens the file that this process does not have yet, and takes its lease.
pub(super) async fn claim(port: &Port, plan: &Plan, file: File) -> Result<(File, Option<Tenure>), Stop> {
    let client = file.client();
    if let Succession::TakesOver(offer) = plan.succession {
        let taken = handover::take_over(port, plan, file, offer).await;
        if taken.is_err() {
            leave(port, &client).await;
        }
        return taken.map(|(file, tenure)| (file, Some(tenure)));
    }
    let mut file = match open_when_free(port, plan, file).await {
        Ok(file) => file,
        Err(stop) => {
            leave(port, &client).await;
            return Err(stop);
        }
    };
    match settle(port, plan, &mut file).await {
        Ok(tenure) => Ok((file, tenure)),
        Err(stop) => {
            close(port, &file).await;
            leave(port, &client).await;
            Err(stop)
        }
    }
}

/// Opens the file, also if the last to have it open has died a moment ago.
async fn open_when_free(port: &Port, plan: &Plan, file: File) -> Result<File, Stop> {
    for _ in 0..DEAD_WAITS_MAX {
        match open(port, plan, &file, &Claim::ByName).await {
            Ok(opened) => return Ok(opened),
            Err(Refused::Stop(stop)) => return Err(stop),
            Err(Refused::Denied) => {}
        }
        let newest = records::newest(port, plan, file.directory).await;
        let has_died = matches!(&newest, Ok(Newest::Record(record))
            if record.phase.is_owned() && record.owner.has_ended_here());
        if !has_died {
            return Err(in_use(plan, newest.ok()));
        }
        port.sleep(DEAD_WAIT).await;
    }
    let newest = records::newest(port, plan, file.directory).await;
    Err(in_use(plan, newest.ok()))
}

/// Says who is in the way, as far as that is known.
fn in_use(plan: &Plan, newest: Option<Newest>) -> Stop {
    let image = plan.name.clone();
    Stop::Never(match newest {
        Some(Newest::Record(record)) if record.phase.is_owned() => {
            if record.owner.incarnation == plan.owner.incarnation {
                LeaseError::HeldHere { path: image }.into()
            } else {
                NfsError::Held {
                    image,
                    record: Box::new(record),
                }
            }
        }
        _ => NfsError::InUse {
            image,
            is_writer: plan.access == Access::ReadOnly,
        },
    })
}

/// Locks the file, which is open, and has its lease recorded.
async fn settle(port: &Port, plan: &Plan, file: &mut File) -> Result<Option<Tenure>, Stop> {
    if !has_lock(plan) {
        check_unwritten(port, plan, file).await?;
        file.can_deallocate = plan.access == Access::ReadWrite && bringup::can_deallocate(port, file).await?;
        return Ok(None);
    }
    file.lock = Some(lock(port, plan, file, Restored::No).await?);
    file.can_deallocate = bringup::can_deallocate(port, file).await?;
    let last = match records::newest(port, plan, file.directory).await? {
        // An attempt of our own that broke off: nobody else can have made it, or the file would not be ours.
        Newest::Record(record)
            if record.phase.is_owned() && record.owner.incarnation == plan.owner.incarnation =>
        {
            let checked = plan.succession.check(Some(&record));
            checked.map_err(|why| plan.not_taken(why))?;
            return Ok(Some(Tenure::of(record)));
        }
        Newest::Record(record) => {
            if record.phase.is_owned() {
                log::info!("`{}` was not released by its last owner: {record}", plan.name);
            }
            Some(record)
        }
        Newest::Torn(number) => match plan.succession {
            Succession::Raises => Record::of_step(number, &plan.owner),
            Succession::Keeps(_) | Succession::TakesOver(_) => {
                records::of_torn(port, plan, file.directory, number).await?
            }
        },
        Newest::None => None,
    };
    let record = Record::taking(last.as_ref(), plan.succession, &plan.owner);
    let record = record.map_err(|why| plan.not_taken(why))?;
    // What the last owner wrote and nobody committed is there to be read: it is to stay, whatever happens to the server.
    file.life = Some(commit(port, file).await?);
    records::append(port, plan, file, &record).await?;
    Ok(Some(Tenure::of(record)))
}

/// Whether the file is still of the generation that a reader asks for, who makes no step: from now on nobody writes it.
async fn check_unwritten(port: &Port, plan: &Plan, file: &File) -> Result<(), Stop> {
    if plan.lock == Lock::None || plan.succession == Succession::Raises {
        return Ok(());
    }
    let last = match records::newest(port, plan, file.directory).await? {
        Newest::Record(record) => Some(record),
        Newest::Torn(number) => records::of_torn(port, plan, file.directory, number).await?,
        Newest::None => None,
    };
    let checked = plan.succession.check(last.as_ref());
    checked.map_err(|why| plan.not_taken(why))
}

/// Whether what is open and locked still is, in a session that goes on; what is not is opened and locked anew.
pub(super) async fn prove(
    port: &Port,
    plan: &Plan,
    file: &File,
    tenure: Option<&Tenure>,
) -> Result<(File, Option<Tenure>), Stop> {
    let states: Vec<Stateid> = std::iter::once(file.open)
        .chain(file.lock)
        .map(Stateid::latest)
        .collect();
    let reply = run(
        port,
        Operations::new().then(&Arguments::TestStateid(Stateids(states))),
    )
    .await?;
    let tested = reply
        .results()
        .and_then(|mut results| Ok(results.test_stateid()?));
    let tested = tested.map_err(|error| failed("ask whether the image is still open", error))?;
    let is_good = |status: &Status| *status == Status::OK;
    let count = 1 + usize::from(file.lock.is_some());
    let file = if tested.0.len() == count && tested.0.iter().all(is_good) {
        file.clone()
    } else {
        check_ours(port, plan, file, tenure).await?;
        if file.lock.is_some() && tested.0.first().is_some_and(is_good) {
            // What keeps others out is still there.
            renew(port, plan, file.clone()).await?
        } else {
            // A server may take what is left of it for another's.
            close(port, file).await;
            open_anew(port, plan, file).await?
        }
    };
    check_ours(port, plan, &file, tenure).await?;
    Ok((file, tenure.cloned()))
}

/// The file by another right, in a new session of a client that has kept the last one: whatever was sent by that and is still on
/// its way in the server is refused from now on. Where there is a lock nobody else can write meanwhile: the open stays.
pub(super) async fn renew(port: &Port, plan: &Plan, file: File) -> Result<File, Stop> {
    if file.lock.is_some() {
        unlock(port, &file).await;
        let lock = Some(lock(port, plan, &file, Restored::No).await?);
        return other_than(plan, &file, File { lock, ..file.clone() });
    }
    if plan.access == Access::ReadWrite {
        close(port, &file).await;
        let opened = open_anew(port, plan, &file).await?;
        return other_than(plan, &file, opened);
    }
    Ok(file)
}

/// The file as it is now, if what is written to it is told from what was written `before`.
fn other_than(plan: &Plan, before: &File, now: File) -> Result<File, Stop> {
    if now.has_right_of(before) {
        return Err(Stop::Later(NfsError::SameRight {
            image: plan.name.clone(),
        }));
    }
    Ok(now)
}

/// Opens and locks the file in a new session as it was in the last, if it is still ours.
pub(super) async fn recover(
    port: &Port,
    plan: &Plan,
    before: &File,
    tenure: Option<&Tenure>,
) -> Result<(File, Option<Tenure>), Stop> {
    check_ours(port, plan, before, tenure).await?;
    let reclaimed = reclaim(port, plan, before).await?;
    bringup::complete(port).await?;
    let file = match reclaimed {
        Some(file) => file,
        None => open_anew(port, plan, before).await?,
    };
    check_ours(port, plan, &file, tenure).await?;
    Ok((file, tenure.cloned()))
}

/// The file as it was open before the server restarted; `None` if there is nothing to reclaim.
async fn reclaim(port: &Port, plan: &Plan, before: &File) -> Result<Option<File>, Stop> {
    let mut file = match open(port, plan, before, &Claim::AsBefore).await {
        Ok(file) => file,
        Err(Refused::Denied) => return Ok(None),
        Err(Refused::Stop(stop)) => return unless_nothing_to_reclaim(stop),
    };
    if has_lock(plan) {
        file.lock = match lock(port, plan, &file, Restored::Yes).await {
            Ok(lock) => Some(lock),
            Err(stop) => return unless_nothing_to_reclaim(stop),
        };
    }
    Ok(Some(file))
}

fn unless_nothing_to_reclaim(stop: Stop) -> Result<Option<File>, Stop> {
    match &stop {
        Stop::Later(NfsError::Call { source, .. })
            if matches!(
                source.0.status().map(verdict),
                Some(Verdict::NoGrace | Verdict::StateLost)
            ) =>
        {
            Ok(None)
        }
        _ => Err(stop),
    }
}

async fn open_anew(port: &Port, plan: &Plan, before: &File) -> Result<File, Stop> {
    let mut file = match open(port, plan, before, &Claim::ByName).await {
        Ok(file) => file,
        Err(Refused::Stop(stop)) => return Err(stop),
        Err(Refused::Denied) => {
            return Err(Stop::Later(NfsError::InUse {
                image: plan.name.clone(),
                is_writer: plan.access == Access::ReadOnly,
            }));
        }
    };
    if has_lock(plan) {
        file.lock = Some(lock(port, plan, &file, Restored::No).await?);
    }
    Ok(file)
}

/// By which right a file is opened.
pub(super) enum Claim {
    /// That of everybody.
    ByName,
    /// It was open before the server restarted.
    AsBefore,
}

/// Whether a lock was held before the server restarted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Restored {
    Yes,
    No,
}

/// What an opener will do, and what others may not.
#[derive(Clone, Copy)]
struct Asks {
    access: ShareAccess,
    deny: ShareDeny,
}

pub(super) async fn open(port: &Port, plan: &Plan, file: &File, claim: &Claim) -> Result<File, Refused> {
    let asks = Asks {
        access: match plan.access {
            Access::ReadOnly => ShareAccess::READ,
            Access::ReadWrite => ShareAccess::BOTH,
        },
        deny: match plan.lock {
            Lock::None => ShareDeny::None,
            Lock::Shared | Lock::Exclusive => ShareDeny::Write,
        },
    };
    open_with(port, plan, file, claim, asks).await
}

async fn open_with(
    port: &Port,
    plan: &Plan,
    file: &File,
    claim: &Claim,
    asks: Asks,
) -> Result<File, Refused> {
    let (name, _) = plan.path.file_and_directories();
    let arguments = Open {
        seqid: 0,
        share_access: asks.access.without_delegation(),
        share_deny: asks.deny,
        owner: plan.state_owner(file.client_id),
        how: OpenHow::NoCreate,
        claim: match claim {
            Claim::ByName => OpenClaim::Null(name.clone()),
            Claim::AsBefore => OpenClaim::Previous(0),
        },
    };
    let at = match claim {
        Claim::ByName => file.directory,
        Claim::AsBefore => file.handle,
    };
    let ask = Operations::new()
        .then(&Arguments::Putfh(at))
        .then(&Arguments::Open(arguments))
        .then(&Arguments::Getfh)
        .then(&Arguments::Getattr(Bitmap::of(&[number::SIZE])));
    let reply = run_after_grace(port, ask).await?;
    let opened = reply.results().and_then(|mut results| {
        results.put_fh()?;
        let opened = results.open()?;
        Ok((
            opened.stateid,
            results.get_fh()?,
            results.getattr()?.size.unwrap_or(0),
        ))
    });
    let (stateid, handle, size_bytes) = match opened {
        Ok(opened) => opened,
        Err(error) => return Err(not_opened(plan, error)),
    };
    let opened = File {
        open: stateid,
        lock: None,
        ..file.clone()
    };
    let found = if handle != file.handle {
        Err(Stop::Later(NfsError::OtherFile {
            image: plan.name.clone(),
        }))
    } else if size_bytes < file.size_bytes {
        Err(Stop::Later(NfsError::Shrunk {
            before_bytes: file.size_bytes,
            now_bytes: size_bytes,
        }))
    } else {
        Ok(())
    };
    if let Err(stop) = found {
        close(port, &opened).await;
        return Err(stop.into());
    }
    Ok(opened)
}

fn not_opened(plan: &Plan, error: CallError) -> Refused {
    let Some(status) = error.status() else {
        return failed("open the image", error).into();
    };
    match (verdict(status), status) {
        (Verdict::Denied, _) => Refused::Denied,
        (_, Status::ACCESS | Status::PERM) => {
            let action = match plan.access {
                Access::ReadOnly => "to read",
                Access::ReadWrite => "to read and write",
            };
            plan.denied(action, plan.path.to_string()).into()
        }
        (_, Status::ROFS) => Stop::Never(NfsError::ReadOnlyExport {
            image: plan.name.clone(),
        })
        .into(),
        _ => failed("open the image", error).into(),
    }
}

pub(super) async fn lock(port: &Port, plan: &Plan, file: &File, restored: Restored) -> Result<Stateid, Stop> {
    let arguments = LockArguments {
        lock_type: LockType::Write,
        reclaim: restored == Restored::Yes,
        offset: LOCK_OFFSET,
        length: LOCK_BYTES,
        locker: Locker::New {
            open_seqid: 0,
            open_stateid: file.open.latest(),
            lock_seqid: 0,
            lock_owner: plan.state_owner(file.client_id),
        },
    };
    let ask = Operations::new()
        .then(&Arguments::Putfh(file.handle))
        .then(&Arguments::Lock(arguments));
    let reply = run_after_grace(port, ask).await?;
    let locked = reply.results().and_then(|mut results| {
        results.put_fh()?;
        Ok(results.lock()?)
    });
    locked.map_err(|error| match error {
        // An owner that writes has denied us the open; whoever locks without writing is none of ours.
        CallError::Reply(ReplyError::Denied(_)) => Stop::Later(NfsError::InUse {
            image: plan.name.clone(),
            is_writer: false,
        }),
        error => failed("lock the image", error),
    })
}

/// Makes the step that `tenure` has begun, if it has: from then on, whoever remembers the generation before knows that the
/// image may have been written since. Only under the fence.
pub(super) async fn raise(
    port: &Port,
    plan: &Plan,
    file: &File,
    tenure: Option<Tenure>,
) -> Result<Option<Tenure>, Stop> {
    let Some(raised) = tenure.as_ref().and_then(|tenure| tenure.begun.clone()) else {
        return Ok(tenure);
    };
    match records::append(port, plan, file, &raised).await {
        Err(Stop::Later(NfsError::Raced { .. })) => {}
        appended => return appended.map(|()| Some(Tenure::of(raised))),
    }
    // By ourselves, and the answer was lost; or by another.
    match records::newest(port, plan, file.directory).await? {
        Newest::Record(newest) if newest == raised && plan.chain.is_none() => {
            records::confirm(port, plan, file, &raised).await?;
            Ok(Some(Tenure::of(raised)))
        }
        newest => Err(lost(&newest)),
    }
}

/// Whether no step of the lease is newer than the one of `tenure`, or the one that it has begun.
async fn check_ours(port: &Port, plan: &Plan, file: &File, tenure: Option<&Tenure>) -> Result<(), Stop> {
    let Some(Tenure { record: ours, begun }) = tenure else {
        return Ok(());
    };
    if plan.chain.is_none() && records::newest_number(port, plan, file.directory).await? == Some(ours.epoch) {
        // Whoever makes a number first has it for good.
        return Ok(());
    }
    let newest = records::newest(port, plan, file.directory).await?;
    let is_ours = match (&newest, begun) {
        (Newest::Record(newest), begun) => newest == ours || begun.as_ref() == Some(newest),
        // If it is not ours, it cannot be made once more.
        (Newest::Torn(number), Some(begun)) => *number == begun.epoch,
        (Newest::Torn(_), None) | (Newest::None, _) => false,
    };
    if is_ours { Ok(()) } else { Err(lost(&newest)) }
}

/// That this step is not ours.
fn lost(newest: &Newest) -> Stop {
    Stop::Lost(match newest {
        Newest::Record(newest) => format!("the lease is lost: it is {} by {newest}", newest.phase),
        Newest::Torn(_) => "the lease is lost: another has begun to take it".to_owned(),
        Newest::None => {
            "the lease is lost: its record is gone, and with it the proof that nobody else writes".to_owned()
        }
    })
}

/// Has the file open and locked as an owner has it, but without a record, if nobody else has it.
pub(super) async fn hold(port: &Port, plan: &Plan, client: Arrival) -> Result<File, Stop> {
    let found = bringup::find(port, plan).await?;
    let file = found.of(client, Verifier::default());
    let mut file = open_when_free(port, plan, file).await?;
    match lock(port, plan, &file, Restored::No).await {
        Ok(lock) => {
            file.lock = Some(lock);
            Ok(file)
        }
        Err(stop) => {
            close(port, &file).await;
            Err(stop)
        }
    }
}

/// Has the file open so that nobody writes it, if nobody does.
pub(super) async fn share(port: &Port, plan: &Plan, client: Arrival) -> Result<File, Stop> {
    let file = bringup::find(port, plan).await?.of(client, Verifier::default());
    match open_with(port, plan, &file, &Claim::ByName, SHARED).await {
        Ok(opened) => Ok(opened),
        Err(Refused::Denied) => Err(Stop::Never(NfsError::InUse {
            image: plan.name.clone(),
            is_writer: true,
        })),
        Err(Refused::Stop(stop)) => Err(stop),
    }
}

/// What a reader asks for.
const SHARED: Asks = Asks {
    access: ShareAccess::READ,
    deny: ShareDeny::Write,
};

/// Whether the server keeps the file for somebody who writes.
pub(super) async fn is_kept(port: &Port, plan: &Plan, file: &File) -> Result<bool, Stop> {
    match open_with(port, plan, file, &Claim::ByName, SHARED).await {
        Ok(opened) => {
            close(port, &opened).await;
            Ok(false)
        }
        Err(Refused::Denied) => Ok(true),
        Err(Refused::Stop(stop)) => Err(stop),
    }
}

/// Makes the file, which must not be there.
pub(super) async fn create(
    port: &Port,
    plan: &Plan,
    directory: FileHandle,
    client_id: ClientId,
    size_bytes: u64,
) -> Result<(), Stop> {
    const MODE: u32 = 0o600;
    let (name, _) = plan.path.file_and_directories();
    let open = Open {
        seqid: 0,
        share_access: ShareAccess::BOTH.without_delegation(),
        share_deny: ShareDeny::Write,
        owner: plan.state_owner(client_id),
        how: OpenHow::Create(CreateHow::Guarded(Attributes {
            size: Some(size_bytes),
            mode: Some(MODE),
            ..Attributes::default()
        })),
        claim: OpenClaim::Null(name.clone()),
    };
    let close = Close {
        seqid: 0,
        open_stateid: Stateid::CURRENT,
    };
    let ask = Operations::new()
        .then(&Arguments::Putfh(directory))
        .then(&Arguments::Open(open))
        .then(&Arguments::Close(close));
    let reply = run_after_grace(port, ask).await?;
    let made = reply.results().and_then(|mut results| {
        results.put_fh()?;
        results.open()?;
        Ok(results.close()?)
    });
    match made {
        Ok(_) => Ok(()),
        Err(error) => Err(match error.status() {
            Some(Status::EXIST) => Stop::Never(NfsError::Exists {
                image: plan.name.clone(),
            }),
            Some(Status::ACCESS | Status::PERM) => plan.denied("to make", plan.path.to_string()),
            Some(Status::ROFS) => Stop::Never(NfsError::ReadOnlyExport {
                image: plan.name.clone(),
            }),
            _ => failed("make the image", error),
        }),
    }
}

/// Has everything on the medium, gives the lease back in good order, and ends the session. What cannot be done is said.
pub(super) async fn release(port: Port, plan: std::sync::Arc<Plan>, file: File, tenure: Option<Tenure>) {
    if let Err(stop) = try_release(&port, &plan, &file, tenure.as_ref()).await {
        log::warn!("{} is not given back in good order: {stop}", plan.name);
    }
    close(&port, &file).await;
    leave(&port, &file.client()).await;
}

async fn try_release(port: &Port, plan: &Plan, file: &File, tenure: Option<&Tenure>) -> Result<(), Stop> {
    if plan.access == Access::ReadWrite {
        commit(port, file).await?;
    }
    let Some(Tenure { record, .. }) = tenure else {
        return Ok(());
    };
    if record.phase == Phase::Taken {
        // Whoever gave it can have it back, and nobody else.
        return Ok(());
    }
    let released = Record::after(Some(record), Phase::Released, &plan.owner);
    let released = released.ok_or_else(|| plan.unrecorded(crate::lease::ChainError::Exhausted))?;
    records::append(port, plan, file, &released).await
}

/// Has everything on the medium that was written to the file in this life of the server.
pub(super) async fn commit(port: &Port, file: &File) -> Result<Verifier, Stop> {
    let ask = Operations::new()
        .then(&Arguments::Putfh(file.handle))
        .then(&Arguments::Commit(Commit { offset: 0, count: 0 }));
    let reply = run(port, ask).await?;
    let committed = reply.results().and_then(|mut results| {
        results.put_fh()?;
        Ok(results.commit()?)
    });
    committed.map_err(|error| failed("commit what was written", error))
}

/// Gives back what is locked; what is not there any more needs not be.
async fn unlock(port: &Port, file: &File) {
    if let Some(lock) = file.lock {
        let unlock = Locku {
            lock_type: LockType::Write,
            seqid: 0,
            lock_stateid: lock.latest(),
            offset: LOCK_OFFSET,
            length: LOCK_BYTES,
        };
        let ask = Operations::new()
            .then(&Arguments::Putfh(file.handle))
            .then(&Arguments::Locku(unlock));
        let _not_there_any_more = run(port, ask).await;
        let _not_there_any_more = run(
            port,
            Operations::new().then(&Arguments::FreeStateid(lock.latest())),
        )
        .await;
    }
}

/// Gives back what is locked and open; what is not there any more needs not be. Says whether the server has closed it now.
pub(super) async fn close(port: &Port, file: &File) -> bool {
    unlock(port, file).await;
    let close = Close {
        seqid: 0,
        open_stateid: file.open.latest(),
    };
    let ask = Operations::new()
        .then(&Arguments::Putfh(file.handle))
        .then(&Arguments::Close(close));
    let closed = run(port, ask).await;
    // What was revoked is not closed, but kept until it is freed.
    let _closed = run(
        port,
        Operations::new().then(&Arguments::FreeStateid(file.open.latest())),
    )
    .await;
    closed.is_ok_and(|reply| reply.status() == Some(Status::OK))
}

/// Opens and locks the file again that was handed over and not taken, or was had back: nothing of it is open by now.
pub(super) async fn come_back(
    port: &Port,
    plan: &Plan,
    before: &File,
    tenure: Option<&Tenure>,
) -> Result<(File, Option<Tenure>), Stop> {
    check_ours(port, plan, before, tenure).await?;
    let file = open_anew(port, plan, before).await?;
    check_ours(port, plan, &file, tenure).await?;
    Ok((file, tenure.cloned()))
}

/// Has the server forget everything that this client may still have there, by another life of it.
pub(super) async fn vanish(port: Port, plan: std::sync::Arc<Plan>) {
    port.destroy_session().await;
    match bringup::enter(&port, &plan, Verifier(bringup::random())).await {
        Ok(client) => leave(&port, &client).await,
        Err(stop) => log::warn!("{} is not left in good order: {stop}", plan.name),
    }
}

/// Has the server forget this client. If it does not, the lease does it.
pub(super) async fn leave(port: &Port, client: &Arrival) {
    port.destroy_session().await;
    let destroy = Operations::new().then(&Arguments::DestroyClientid(client.client_id));
    let _does_it_by_itself = port.call(&client.manner, destroy).await;
}
