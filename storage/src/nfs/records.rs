//! The records of a lease beside an image on a server, in files that are numbered: `<image>.lease.<n>`.
//!
//! Whoever makes number n + 1 first has won that step. A record is made by an exclusive create and written in the same compound:
//!
//! ```text
//!   OPEN, EXCLUSIVE4_1, <image>.lease.<n+1> ── WRITE, FILE_SYNC ── CLOSE      EXIST: somebody else was first
//!                       <image>.lease.<n>      kept: who had it before
//!                       <image>.lease.<n-1>    removed
//! ```
//!
//! A server that dies between the two leaves an empty file: a step that was won by nobody who could use it.

use crate::lease::{ChainError, Phase, RECORD_BYTES_MAX, Record};
pub(super) use crate::remote::lease::Newest;

use super::bringup::{File, Stop, failed, run, run_after_grace};
use super::error::NfsError;
use super::plan::Plan;
use super::procedure::{CallError, Port};
use super::v4::{
    Arguments, Attributes, Bitmap, Close, Commit, CreateHow, FileHandle, Name, Open, OpenClaim, OpenHow,
    Operations, Read, Readdir, ShareAccess, ShareDeny, Stability, Stateid, Status, Verifier, Write,
};

/// What a look at the directory has found.
#[derive(Debug, Default)]
struct Survey {
    newest: Option<u64>,
    /// Numbers that are not the newest, as many as one step clears away.
    older: Vec<u64>,
}

/// How much one step clears away at most.
const SWEPT_MAX: usize = 64;
/// How often the newest record may be replaced while it is being looked for.
const LOOKS_MAX: usize = 16;
/// A page of a directory, in bytes.
const PAGE_BYTES: u32 = 32 << 10;
/// How many pages are looked at: tens of millions of files.
const PAGES_MAX: usize = 1 << 16;
const MODE: u32 = 0o644;

/// The newest record.
pub(super) async fn newest(port: &Port, plan: &Plan, directory: FileHandle) -> Result<Newest, Stop> {
    if let Some(chain) = &plan.chain {
        // A directory of this host, or one that the user has mounted: as quick as that is.
        let newest = chain.newest().map_err(|error| plan.unrecorded(error))?;
        return Ok(newest.map_or(Newest::None, Newest::Record));
    }
    for _ in 0..LOOKS_MAX {
        let Some(number) = newest_number(port, plan, directory).await? else {
            return Ok(Newest::None);
        };
        if let Some(bytes) = read(port, plan, directory, number).await? {
            return newest_of(plan, number, &bytes);
        }
        // Removed since it was listed: there is a newer one by now.
    }
    Err(plan.unrecorded("its newest record does not stay"))
}

/// The step that was torn under this number, as who goes on below it has it: nothing happened but that the number is taken.
/// `None` if what lies below is not known.
pub(super) async fn of_torn(
    port: &Port,
    plan: &Plan,
    directory: FileHandle,
    torn: u64,
) -> Result<Option<Record>, Stop> {
    for number in (1..torn).rev().take(LOOKS_MAX) {
        match read(port, plan, directory, number).await? {
            Some(bytes) if bytes.is_empty() => {}
            Some(bytes) => {
                return Ok(match newest_of(plan, number, &bytes)? {
                    Newest::Record(below) => Some(Record { epoch: torn, ..below }),
                    Newest::Torn(_) | Newest::None => None,
                });
            }
            None => break,
        }
    }
    Ok(None)
}

fn newest_of(plan: &Plan, number: u64, bytes: &[u8]) -> Result<Newest, Stop> {
    if bytes.is_empty() {
        return Ok(Newest::Torn(number));
    }
    let record = Record::parse(bytes).map_err(|error| plan.unrecorded(error))?;
    if record.epoch != number {
        return Err(plan.unrecorded(format!(
            "the record {number} says of itself that it is number {}: it was renamed or copied",
            record.epoch
        )));
    }
    Ok(Newest::Record(record))
}

/// The number of the newest record beside the image.
pub(super) async fn newest_number(
    port: &Port,
    plan: &Plan,
    directory: FileHandle,
) -> Result<Option<u64>, Stop> {
    Ok(survey(port, plan, directory).await?.newest)
}

/// Where the records are, for people: the pattern of their names.
pub(super) fn place(plan: &Plan) -> String {
    match &plan.chain {
        Some(chain) => chain.place().display().to_string(),
        None => format!("{}.lease.<n> on the server", plan.path),
    }
}

/// Makes the step that `record` describes: afterwards it is durable, and it is the newest.
pub(super) async fn append(port: &Port, plan: &Plan, file: &File, record: &Record) -> Result<(), Stop> {
    if let Some(chain) = &plan.chain {
        return chain.complete(record).map_err(|error| match error {
            ChainError::Lost { .. } => raced(plan),
            error => plan.unrecorded(error),
        });
    }
    create(port, plan, file, record).await?;
    let survey = survey(port, plan, file.directory).await?;
    if survey.newest.is_some_and(|newest| newest > record.epoch) {
        // So late that the number was free again: it had been taken and cleared away.
        remove(port, file, plan.record_name(record.epoch)?).await?;
        return Err(raced(plan));
    }
    let kept = record.epoch - 1;
    for older in survey.older.into_iter().filter(|older| *older < kept) {
        remove(port, file, plan.record_name(older)?).await?;
    }
    Ok(())
}

/// Has this record, which was found there, on the medium.
pub(super) async fn confirm(port: &Port, plan: &Plan, file: &File, record: &Record) -> Result<(), Stop> {
    if let Some(chain) = &plan.chain {
        return chain.complete(record).map_err(|error| plan.unrecorded(error));
    }
    let number = record.epoch;
    let ask = Operations::new()
        .then(&Arguments::Putfh(file.directory))
        .then(&Arguments::Lookup(plan.record_name(number)?))
        .then(&Arguments::Commit(Commit { offset: 0, count: 0 }));
    let reply = run(port, ask).await?;
    let committed = reply.results().and_then(|mut results| {
        results.put_fh()?;
        results.lookup()?;
        Ok(results.commit()?)
    });
    committed
        .map(drop)
        .map_err(|error| failed("commit a lease record", error))
}

fn raced(plan: &Plan) -> Stop {
    Stop::Later(NfsError::Raced {
        image: plan.name.clone(),
    })
}

async fn create(port: &Port, plan: &Plan, file: &File, record: &Record) -> Result<(), Stop> {
    let open = Open {
        seqid: 0,
        share_access: ShareAccess::WRITE.without_delegation(),
        share_deny: ShareDeny::None,
        owner: plan.state_owner(file.client_id),
        how: OpenHow::Create(CreateHow::Exclusive41(
            plan.verifier_of(record),
            Attributes {
                mode: Some(MODE),
                ..Attributes::default()
            },
        )),
        claim: OpenClaim::Null(plan.record_name(record.epoch)?),
    };
    let text = record.text();
    let write = Write {
        stateid: Stateid::CURRENT,
        offset: 0,
        stability: Stability::FileSync,
        data: text.as_bytes(),
    };
    let close = Close {
        seqid: 0,
        open_stateid: Stateid::CURRENT,
    };
    let ask = Operations::new()
        .then(&Arguments::Putfh(file.directory))
        .then(&Arguments::Open(open))
        .then(&Arguments::Write(write))
        .then(&Arguments::Close(close));
    let reply = run_after_grace(port, ask).await?;
    let made = reply.results().and_then(|mut results| {
        results.put_fh()?;
        results.open()?;
        let written = results.write_copied()?;
        results.close()?;
        Ok(written)
    });
    let written = match made {
        Ok(written) => written,
        Err(error) => return Err(not_made(plan, record.phase, error)),
    };
    let is_whole =
        usize::try_from(written.count) == Ok(text.len()) && written.committed != Stability::Unstable;
    if is_whole {
        Ok(())
    } else {
        Err(plan.unrecorded("the server has not written all of a record"))
    }
}

fn not_made(plan: &Plan, phase: Phase, error: CallError) -> Stop {
    match error.status() {
        Some(Status::EXIST) => raced(plan),
        Some(status @ (Status::ACCESS | Status::PERM | Status::ROFS)) if phase.is_owned() => {
            let (_, directories) = plan.path.file_and_directories();
            let names: String = directories.iter().map(|name| format!("/{name}")).collect();
            Stop::Never(NfsError::NoPlace {
                directory: if names.is_empty() { "/".to_owned() } else { names },
                status,
                uid: plan.user.uid,
                gid: plan.user.gid,
            })
        }
        _ => failed("make a lease record", error),
    }
}

/// What the record with this number says; `None` if there is none.
async fn read(port: &Port, plan: &Plan, directory: FileHandle, number: u64) -> Result<Option<Vec<u8>>, Stop> {
    let read = Read {
        stateid: Stateid::ANONYMOUS,
        offset: 0,
        count: u32::try_from(RECORD_BYTES_MAX).expect("it is small") + 1,
    };
    let ask = Operations::new()
        .then(&Arguments::Putfh(directory))
        .then(&Arguments::Lookup(plan.record_name(number)?))
        .then(&Arguments::Read(read));
    let reply = run_after_grace(port, ask).await?;
    let read = reply.results().and_then(|mut results| {
        results.put_fh()?;
        results.lookup()?;
        Ok(results.read()?.data.to_vec())
    });
    match read {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.status() == Some(Status::NOENT) => Ok(None),
        Err(error) => Err(failed("read a lease record", error)),
    }
}

/// What cannot be removed is in nobody's way, and the next step tries again.
async fn remove(port: &Port, file: &File, name: Name) -> Result<(), Stop> {
    let ask = Operations::new()
        .then(&Arguments::Putfh(file.directory))
        .then(&Arguments::Remove(name));
    run(port, ask).await.map(drop)
}

async fn survey(port: &Port, plan: &Plan, directory: FileHandle) -> Result<Survey, Stop> {
    let prefix = plan.record_prefix();
    let mut survey = Survey::default();
    let (mut cookie, mut cookie_verifier) = (0, Verifier::default());
    for _ in 0..PAGES_MAX {
        let readdir = Readdir {
            cookie,
            cookie_verifier,
            dir_count: PAGE_BYTES,
            max_count: PAGE_BYTES,
            attributes: Bitmap::EMPTY,
        };
        let ask = Operations::new()
            .then(&Arguments::Putfh(directory))
            .then(&Arguments::Readdir(readdir));
        let reply = run(port, ask).await?;
        let page = reply.results().and_then(|mut results| {
            results.put_fh()?;
            Ok(results.readdir()?)
        });
        let page = page.map_err(|error| match error.status() {
            Some(Status::ACCESS | Status::PERM) => {
                plan.denied("to list the directory of", plan.path.to_string())
            }
            _ => failed("list the lease records", error),
        })?;
        for entry in &page.entries {
            let name = entry.name.0.as_ref().map(Name::bytes).unwrap_or_default();
            if let Some(number) = name.strip_prefix(prefix.as_slice()).and_then(number) {
                survey.add(number);
            }
        }
        let Some(last) = page.entries.last().filter(|_| !page.eof) else {
            return Ok(survey);
        };
        (cookie, cookie_verifier) = (last.cookie, page.cookie_verifier);
    }
    Err(plan.unrecorded("its directory has no end"))
}

/// The number that a name ends with, if it is written as we write it.
fn number(text: &[u8]) -> Option<u64> {
    let text = str::from_utf8(text).ok()?;
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

impl Survey {
    fn add(&mut self, number: u64) {
        let (newest, older) = match self.newest {
            None => (number, None),
            Some(newest) => (newest.max(number), Some(newest.min(number))),
        };
        self.newest = Some(newest);
        self.older.extend(older.filter(|_| self.older.len() < SWEPT_MAX));
    }
}
