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
use super::v4::{Arguments, Attributes, FileHandle, Name, Operations, Rename, Status, Verifier};

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
        Ok(Newest::Record(last)) if last.phase == Phase::Held => {
            Record::after(Some(&last), Phase::Broken, &plan.owner)
        }
        Ok(Newest::Torn(number)) => Record::over_unreadable(number, &plan.owner),
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
