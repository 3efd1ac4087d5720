//! The beginning of each connection: which file it is, and whether it is still that one.

use std::sync::Arc;
use std::time::Duration;

use crate::nfs::bringup::{Stop, check_size};
use crate::nfs::error::{NfsError, Refusal};
use crate::nfs::rpc::RpcError;
use crate::nfs::v3::{
    Attributes, FileHandle, FileType, FsinfoResult, Lookup, LookupResult, Read, ReadResult, Status, procedure,
};
use crate::nfs::v4::Name;

use super::locate::Mounted;
use super::plan::Plan;
use super::procedure::{Call, CallError, Port, Reply};

/// The file of an image.
#[derive(Clone, Copy, Debug)]
pub(super) struct File {
    handle: FileHandle,
    /// Which file it is: a server may give a handle a second time.
    fsid: u64,
    fileid: u64,
    pub(super) size_bytes: u64,
    /// Most data of a READ.
    pub(super) read_bytes_max: u32,
}

/// Data of a READ at most.
const DATA_BYTES_MAX: u32 = 1 << 20;
/// The same of a server that does not say.
const DATA_BYTES_UNSAID: u32 = 32 << 10;
/// How long a server is waited for that has something else to do.
const DELAY: Duration = Duration::from_millis(100);
const DELAYS_MAX: u32 = 100;

/// Looks for the image in an export, and at it.
pub(super) async fn find(port: Port, plan: Arc<Plan>, mounted: Mounted) -> Result<File, Stop> {
    let (file, directories) = plan.path.file_and_directories();
    let mut at = Place::of(&plan, mounted);
    for directory in directories.iter().skip(mounted.depth) {
        at = at.enter(&port, &plan, directory).await?;
    }
    let (handle, attributes) = at.look(&port, &plan, file).await?;
    check_kind(&plan.path.to_string(), attributes.file_type)?;
    check_size(attributes.size)?;
    check_readable(&port, &plan, handle).await?;
    let file = File {
        handle,
        fsid: attributes.fsid,
        fileid: attributes.fileid,
        size_bytes: attributes.size,
        read_bytes_max: read_bytes_max(&port, handle).await?,
    };
    port.aim(handle).await;
    Ok(file)
}

/// Looks whether the file is still the one that it was.
pub(super) async fn find_again(port: Port, plan: Arc<Plan>, before: File) -> Result<(), Stop> {
    let attributes = match attributes(&port, before.handle).await? {
        Ok(attributes) => attributes,
        Err(CallError::Nfs(Status::STALE | Status::BADHANDLE)) => return Err(other_file(&plan)),
        Err(error) => return Err(failed("look at the image", error)),
    };
    if (attributes.fsid, attributes.fileid) != (before.fsid, before.fileid) {
        return Err(other_file(&plan));
    }
    if attributes.size < before.size_bytes {
        return Err(Stop::Later(NfsError::Shrunk {
            before_bytes: before.size_bytes,
            now_bytes: attributes.size,
        }));
    }
    port.aim(before.handle).await;
    Ok(())
}

fn other_file(plan: &Plan) -> Stop {
    Stop::Later(NfsError::OtherFile {
        image: plan.name.clone(),
    })
}

/// Whether the user may read it, which the server says only when somebody does.
async fn check_readable(port: &Port, plan: &Plan, handle: FileHandle) -> Result<(), Stop> {
    let read = Read {
        handle,
        offset: 0,
        count: 1,
    };
    let reply = run(port, Call::nfs(procedure::READ, &read)).await?;
    match reply.answer::<ReadResult<'_>>() {
        Ok(_) => Ok(()),
        Err(CallError::Nfs(Status::ACCES | Status::PERM)) => {
            Err(denied(plan, "to read", plan.path.to_string()))
        }
        Err(error) => Err(failed("read the image", error)),
    }
}

async fn read_bytes_max(port: &Port, handle: FileHandle) -> Result<u32, Stop> {
    let reply = run(port, Call::nfs(procedure::FSINFO, &handle)).await?;
    let told = match reply.answer::<FsinfoResult>() {
        Ok(told) => told.rtmax,
        Err(CallError::Nfs(_)) => DATA_BYTES_UNSAID,
        Err(error) => return Err(failed("ask what the server can do", error)),
    };
    // Whole blocks; a server that says less than one means something else.
    Ok((told.min(DATA_BYTES_MAX) & !4095).max(4096))
}

async fn attributes(port: &Port, handle: FileHandle) -> Result<Result<Attributes, CallError>, Stop> {
    let reply = run(port, Call::nfs(procedure::GETATTR, &handle)).await?;
    Ok(reply.answer::<Attributes>())
}

/// A directory on the way to the image.
struct Place {
    handle: FileHandle,
    /// For messages.
    path: String,
}

impl Place {
    fn of(plan: &Plan, mounted: Mounted) -> Self {
        let names = plan.path.components().iter().take(mounted.depth);
        let path: String = names.map(|name| format!("/{name}")).collect();
        Self {
            handle: mounted.handle,
            path,
        }
    }

    async fn enter(self, port: &Port, plan: &Plan, name: &Name) -> Result<Self, Stop> {
        let (handle, attributes) = match self.lookup(port, name).await? {
            Err(CallError::Nfs(Status::NOENT)) => {
                return Err(Stop::Never(NfsError::NoDirectory {
                    name: name.to_string(),
                    parent: self.shown(),
                }));
            }
            found => found.map_err(|error| self.refused(plan, name, error))?,
        };
        let path = format!("{}/{name}", self.path);
        match attributes.file_type {
            FileType::Directory => Ok(Self { handle, path }),
            kind => Err(not_a_file(
                &path,
                kind,
                "what stands before the last part of the path is a directory",
            )),
        }
    }

    async fn look(&self, port: &Port, plan: &Plan, name: &Name) -> Result<(FileHandle, Attributes), Stop> {
        match self.lookup(port, name).await? {
            Err(CallError::Nfs(Status::NOENT)) => Err(Stop::Never(NfsError::Missing {
                name: name.to_string(),
                parent: self.shown(),
            })),
            found => found.map_err(|error| self.refused(plan, name, error)),
        }
    }

    async fn lookup(
        &self,
        port: &Port,
        name: &Name,
    ) -> Result<Result<(FileHandle, Attributes), CallError>, Stop> {
        let lookup = Lookup {
            directory: self.handle,
            name: name.clone(),
        };
        let reply = run(port, Call::nfs(procedure::LOOKUP, &lookup)).await?;
        match reply.answer::<LookupResult>() {
            Ok(found) => {
                let told = match found.attributes {
                    Some(told) => Ok(told),
                    None => attributes(port, found.handle).await?,
                };
                Ok(told.map(|told| (found.handle, told)))
            }
            Err(error) => Ok(Err(error)),
        }
    }

    fn refused(&self, plan: &Plan, name: &Name, error: CallError) -> Stop {
        match error {
            CallError::Nfs(Status::ACCES | Status::PERM) => {
                denied(plan, "to look for", format!("{}/{name}", self.path))
            }
            error => failed("look for the image", error),
        }
    }

    fn shown(&self) -> String {
        if self.path.is_empty() {
            "/".to_owned()
        } else {
            self.path.clone()
        }
    }
}

fn check_kind(path: &str, kind: FileType) -> Result<(), Stop> {
    match kind {
        FileType::Regular => Ok(()),
        FileType::Link => Err(not_a_file(path, kind, "write the path that it leads to")),
        _ => Err(not_a_file(path, kind, "an image is a regular file")),
    }
}

fn not_a_file(path: &str, kind: FileType, advice: &'static str) -> Stop {
    Stop::Never(NfsError::NotAFile {
        name: path.to_owned(),
        kind: match kind {
            FileType::Regular => "a file",
            FileType::Directory => "a directory",
            FileType::Link => "a symbolic link",
            _ => "neither a file nor a directory",
        },
        advice,
    })
}

fn denied(plan: &Plan, action: &'static str, name: String) -> Stop {
    Stop::Never(NfsError::Denied {
        action,
        name,
        uid: plan.user.uid,
        gid: plan.user.gid,
    })
}

/// Asks for a call, until the server has time for it.
async fn run(port: &Port, call: Call) -> Result<Reply, Stop> {
    for _ in 0..DELAYS_MAX {
        let reply = port.call(call.clone()).await;
        if !reply.is_put_off() {
            return Ok(reply);
        }
        port.sleep(DELAY).await;
    }
    Err(failed(
        "have something done by the server",
        Status::JUKEBOX.into(),
    ))
}

/// That a call did not end well. It may next time, unless the server does not take it at all.
fn failed(action: &'static str, error: CallError) -> Stop {
    let is_final = matches!(&error, CallError::Rpc(error) if *error != RpcError::System);
    let error = NfsError::Call {
        action,
        source: Refusal(error.into()),
    };
    if is_final {
        Stop::Never(error)
    } else {
        Stop::Later(error)
    }
}
