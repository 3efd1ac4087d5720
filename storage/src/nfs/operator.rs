//! What an operator does with an image on a server: look at its lease, declare that broken, and make the file.

use std::future::Future;
use std::sync::Arc;

use crate::backend::Access;
use crate::lease::{ChainError, LeaseError, Lock, Owner, Phase, Record, Terms};
use crate::reactor::Reactor;
use crate::remote::dialogue::{self, OPERATOR_LIMIT};

use super::bringup::{self, Arrival, File, Stop, failed, run_after_grace};
use super::error::NfsError;
use super::fence;
use super::open::{converse, plan};
use super::plan::Plan;
use super::procedure::{CallError, Port};
use super::records::{self, Newest};
use super::v4::status::{Verdict, verdict};
use super::v4::{Arguments, Attributes, CloneRange, FileHandle, Name, Operations, Rename, Status, Verifier};

/// How things stand with a file and its lease.
#[derive(Debug)]
pub struct FileStanding {
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// Where records are kept, in words.
    pub records: String,
    /// The newest record, if there is one that can be read.
    pub newest: Result<Option<Record>, NfsError>,
    /// The server keeps it for a writer.
    pub is_kept: bool,
}

/// Whoever looks after an image: each call has a session of its own, and none of them uses the file as an image.
#[derive(Debug)]
pub struct Operator(Arc<Plan>);

impl Operator {
    /// Whoever looks after the file that `url` names, as `owner`; its lease records are named after `at` if that is given.
    ///
    /// # Errors
    ///
    /// When the URL makes no sense, or the host's name has no address.
    pub fn new(url: &str, at: Option<&str>, owner: &Owner) -> Result<Self, NfsError> {
        let terms = Terms {
            at,
            ..Terms::new(Lock::Exclusive, owner)
        };
        plan(url, Access::ReadWrite, &terms).map(|(plan, _)| Self(Arc::new(plan)))
    }

    /// Looks at the file and its lease, and changes nothing.
    ///
    /// # Errors
    ///
    /// When the file cannot be reached or makes no sense.
    pub fn inspect(&self) -> Result<FileStanding, NfsError> {
        self.converse(dialogue::plain(), look)
    }

    /// Declares the lease of the file broken: the next who wants it gets it. An owner that is alive cannot be fenced: the server
    /// keeps the file for it.
    ///
    /// # Errors
    ///
    /// When there is nothing to break, or the server keeps the file for somebody.
    pub fn break_lease(&self) -> Result<Record, NfsError> {
        self.converse(dialogue::plain(), break_off)
    }

    /// Makes the file, of `size_bytes`, which take no space yet.
    ///
    /// # Errors
    ///
    /// When it is there already, or cannot be made.
    pub fn create(&self, size_bytes: u64) -> Result<(), NfsError> {
        self.converse(dialogue::plain(), move |port, plan| make(port, plan, size_bytes))
    }

    /// Whether `other` is reached in the same way: on the same server, as the same user, by the same version.
    pub fn is_with(&self, other: &Self) -> bool {
        let way = |plan: &Plan| (plan.servers.clone(), plan.version, Arc::clone(&plan.credential));
        way(&self.0) == way(&other.0)
    }

    /// Has the server make the file, which is as long and which nobody uses, share the content of that of `origin`, which is
    /// with it: then it is on the medium. `false`: it has changed nothing, because it does not do that, or because the file of
    /// `origin` has not `size_bytes`.
    ///
    /// # Errors
    ///
    /// When one of them cannot be reached, or is written by somebody.
    pub fn clone_of(&self, origin: &Self, size_bytes: u64) -> Result<bool, NfsError> {
        let origin = Arc::clone(&origin.0);
        self.converse(dialogue::plain(), move |port, plan| {
            clone_of(port, plan, Arc::clone(&origin), size_bytes)
        })
    }

    /// Takes the name for a file that nobody can use yet: it is empty, and no image is.
    ///
    /// # Errors
    ///
    /// When it is there already, or cannot be made.
    pub fn reserve(&self) -> Result<(), NfsError> {
        self.converse(dialogue::plain(), reserve)
    }

    /// Gives the name, which was reserved, to the file of `other`, in the same directory, at once: whoever looks finds the one or
    /// the other.
    ///
    /// # Errors
    ///
    /// When one of them is not there, the name is that of an image by now, or it cannot be given.
    pub fn replace_by(&self, other: &Self) -> Result<(), NfsError> {
        let (old_name, _) = other.0.path.file_and_directories();
        let old_name = old_name.clone();
        self.converse(dialogue::plain(), move |port, plan| {
            rename(port, plan, old_name.clone())
        })
    }

    /// Gives the name to the file of `other`, in the same directory, at once, whatever has it now: whoever looks finds the one
    /// or the other.
    ///
    /// # Errors
    ///
    /// When the other is not there, or the name cannot be given.
    pub fn give_way_to(&self, other: &Self) -> Result<(), NfsError> {
        let (old_name, _) = other.0.path.file_and_directories();
        let old_name = old_name.clone();
        self.converse(dialogue::plain(), move |port, plan| {
            rename_over(port, plan, old_name.clone())
        })
    }

    /// Gives the name back that was reserved.
    ///
    /// # Errors
    ///
    /// When it cannot be removed, or is that of an image by now.
    pub fn forgo(&self) -> Result<(), NfsError> {
        self.converse(dialogue::plain(), forgo)
    }

    /// Removes the file.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn remove(&self) -> Result<(), NfsError> {
        self.converse(dialogue::plain(), remove)
    }

    fn converse<T, F>(&self, io: impl Reactor, body: impl Fn(Port, Arc<Plan>) -> F) -> Result<T, NfsError>
    where
        F: Future<Output = Result<T, Stop>> + Send + 'static,
    {
        let mut dialogue = converse(io, &self.0, OPERATOR_LIMIT)?;
        dialogue.run(|port| body(port, Arc::clone(&self.0)))
    }
}

async fn look(port: Port, plan: Arc<Plan>) -> Result<FileStanding, Stop> {
    let client = bringup::arrive(&port, &plan).await?;
    let looked = look_at_file(&port, &plan, client.clone()).await;
    fence::leave(&port, &client).await;
    looked
}

async fn look_at_file(port: &Port, plan: &Plan, client: Arrival) -> Result<FileStanding, Stop> {
    let found = bringup::find(port, plan).await?;
    let file = found.of(client, Verifier::default());
    let newest = match records::newest(port, plan, file.directory).await {
        Ok(Newest::None) => Ok(None),
        Ok(Newest::Record(record)) => Ok(Some(record)),
        Ok(Newest::Torn(number)) => Err(torn(plan, number)),
        Err(Stop::Never(error @ NfsError::Records { .. })) => Err(error),
        Err(stop) => return Err(stop),
    };
    Ok(FileStanding {
        size_bytes: file.size_bytes,
        records: records::place(plan),
        newest,
        is_kept: fence::is_kept(port, plan, &file).await?,
    })
}

fn torn(plan: &Plan, number: u64) -> NfsError {
    NfsError::Records {
        image: plan.name.clone(),
        source: format!("the record {number} was begun, and nothing was written").into(),
    }
}

/// Has the file open as an owner has it, so that there is no other, and says in the records that the last one is none any more.
async fn break_off(port: Port, plan: Arc<Plan>) -> Result<Record, Stop> {
    let client = bringup::arrive(&port, &plan).await?;
    let broken = match fence::hold(&port, &plan, client.clone()).await {
        Ok(file) => {
            let broken = declare_broken(&port, &plan, &file).await;
            fence::close(&port, &file).await;
            broken
        }
        Err(stop) => Err(stop),
    };
    fence::leave(&port, &client).await;
    broken
}

async fn declare_broken(port: &Port, plan: &Plan, file: &File) -> Result<Record, Stop> {
    let broken = match records::newest(port, plan, file.directory).await {
        Ok(Newest::Record(last)) if last.phase.is_owned() => {
            Record::after(Some(&last), Phase::Broken, &plan.owner)
        }
        Ok(Newest::Torn(number)) => Record::over_unreadable(number, &plan.owner),
        // By ourselves, and the answer was lost.
        Ok(Newest::Record(last))
            if last.phase == Phase::Broken && last.owner.incarnation == plan.owner.incarnation =>
        {
            return Ok(last);
        }
        Ok(Newest::Record(_) | Newest::None) => {
            return Err(Stop::Never(
                LeaseError::Free {
                    path: plan.name.clone(),
                }
                .into(),
            ));
        }
        Err(stop @ Stop::Never(NfsError::Records { .. })) => {
            let Some(number) = records::newest_number(port, plan, file.directory).await? else {
                return Err(stop);
            };
            Record::over_unreadable(number, &plan.owner)
        }
        Err(stop) => return Err(stop),
    };
    let broken = broken.ok_or_else(|| plan.unrecorded(ChainError::Exhausted))?;
    records::append(port, plan, file, &broken).await?;
    Ok(broken)
}

async fn make(port: Port, plan: Arc<Plan>, size_bytes: u64) -> Result<(), Stop> {
    bringup::check_size(size_bytes)?;
    make_any(port, plan, size_bytes).await
}

async fn reserve(port: Port, plan: Arc<Plan>) -> Result<(), Stop> {
    make_any(port, plan, 0).await
}

async fn make_any(port: Port, plan: Arc<Plan>, size_bytes: u64) -> Result<(), Stop> {
    let client = bringup::arrive(&port, &plan).await?;
    let made = match bringup::directory(&port, &plan).await {
        Ok(directory) => fence::create(&port, &plan, directory, client.client_id, size_bytes).await,
        Err(stop) => Err(stop),
    };
    fence::leave(&port, &client).await;
    made
}

/// Has the file share the content of that of `origin`.
async fn clone_of(port: Port, plan: Arc<Plan>, origin: Arc<Plan>, size_bytes: u64) -> Result<bool, Stop> {
    let client = bringup::arrive(&port, &plan).await?;
    let cloned = match client.manner.minor_version {
        0..=1 => Ok(false),
        _ => clone_in_session(&port, (&plan, &origin), &client, size_bytes).await,
    };
    fence::leave(&port, &client).await;
    cloned
}

async fn clone_in_session(
    port: &Port,
    (plan, origin): (&Plan, &Plan),
    client: &Arrival,
    size_bytes: u64,
) -> Result<bool, Stop> {
    let source = fence::share(port, origin, client.clone()).await?;
    let cloned = match fence::hold(port, plan, client.clone()).await {
        Ok(file) if source.size_bytes == size_bytes => {
            let cloned = clone_file(port, &source, &file).await;
            fence::close(port, &file).await;
            cloned
        }
        Ok(file) => {
            fence::close(port, &file).await;
            Ok(false)
        }
        Err(stop) => Err(stop),
    };
    fence::close(port, &source).await;
    cloned
}

/// Clones all of a file that is open, and has that on the medium. Whether the server does such a thing.
async fn clone_file(port: &Port, source: &File, file: &File) -> Result<bool, Stop> {
    let range = CloneRange {
        source_stateid: source.target().stateid,
        destination_stateid: file.target().stateid,
        source_offset: 0,
        destination_offset: 0,
        // To the end.
        count: 0,
    };
    let ask = Operations::new()
        .then(&Arguments::Putfh(source.handle))
        .then(&Arguments::Savefh)
        .then(&Arguments::Putfh(file.handle))
        .then(&Arguments::Clone(range));
    let reply = run_after_grace(port, ask).await?;
    let cloned = reply.results().and_then(|mut results| {
        results.put_fh()?;
        results.save_fh()?;
        results.put_fh()?;
        Ok(results.clone_range()?)
    });
    match cloned {
        Ok(()) => {
            fence::commit(port, file).await?;
            Ok(true)
        }
        Err(error) => match error.status().map(verdict) {
            // All of it is done, or nothing (RFC 7862, 15.13.3).
            Some(Verdict::Failed(_)) => Ok(false),
            _ => Err(failed("clone an image", error)),
        },
    }
}

/// Has the file `old_name` called what the image is.
async fn rename(port: Port, plan: Arc<Plan>, old_name: Name) -> Result<(), Stop> {
    let (name, _) = plan.path.file_and_directories();
    let rename = Rename {
        old_name,
        new_name: name.clone(),
    };
    let renamed = |directory| {
        if_reserved(directory, name)
            .then(&Arguments::Savefh)
            .then(&Arguments::Rename(rename.clone()))
    };
    in_directory(&port, &plan, "give the image its name", renamed).await
}

/// Has the file `old_name` called what the image is, instead of what is called so.
async fn rename_over(port: Port, plan: Arc<Plan>, old_name: Name) -> Result<(), Stop> {
    let (name, _) = plan.path.file_and_directories();
    let rename = Rename {
        old_name,
        new_name: name.clone(),
    };
    let renamed = |directory| {
        Operations::new()
            .then(&Arguments::Putfh(directory))
            .then(&Arguments::Savefh)
            .then(&Arguments::Rename(rename.clone()))
    };
    in_directory(&port, &plan, "give the file its name", renamed).await
}

async fn remove(port: Port, plan: Arc<Plan>) -> Result<(), Stop> {
    let (name, _) = plan.path.file_and_directories();
    let removed = |directory| {
        Operations::new()
            .then(&Arguments::Putfh(directory))
            .then(&Arguments::Remove(name.clone()))
    };
    in_directory(&port, &plan, "remove the image", removed).await
}

async fn forgo(port: Port, plan: Arc<Plan>) -> Result<(), Stop> {
    let (name, _) = plan.path.file_and_directories();
    let removed = |directory| if_reserved(directory, name).then(&Arguments::Remove(name.clone()));
    in_directory(&port, &plan, "give the name of the image back", removed).await
}

/// Goes on in the directory only if the file of that name is an empty one, which is no image.
fn if_reserved(directory: FileHandle, name: &Name) -> Operations {
    let is_empty = Attributes {
        size: Some(0),
        ..Attributes::default()
    };
    Operations::new()
        .then(&Arguments::Putfh(directory))
        .then(&Arguments::Lookup(name.clone()))
        .then(&Arguments::Verify(is_empty))
        .then(&Arguments::Putfh(directory))
}

/// Has something done in the directory of the image, in a session of its own.
async fn in_directory(
    port: &Port,
    plan: &Plan,
    action: &'static str,
    operations: impl FnOnce(FileHandle) -> Operations,
) -> Result<(), Stop> {
    let client = bringup::arrive(port, plan).await?;
    let done = match bringup::directory(port, plan).await {
        Ok(directory) => run_after_grace(port, operations(directory)).await,
        Err(stop) => Err(stop),
    };
    fence::leave(port, &client).await;
    match done?.status() {
        Some(Status::OK) => Ok(()),
        // It was empty when it was made here.
        Some(Status::NOT_SAME) => Err(Stop::Never(NfsError::OtherFile {
            image: plan.name.clone(),
        })),
        status => Err(failed(action, CallError::of_status(status.unwrap_or(Status::IO)))),
    }
}
