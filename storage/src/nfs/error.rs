//! Why an image on an NFS server cannot be used, told to whoever can do something about it.

use std::error::Error;
use std::io;
use std::net::SocketAddr;

use crate::lease::{LeaseError, Record};

use super::client::Break;
use super::procedure::CallError;
use super::rpc::RpcError;
use super::stateless;
use super::url::UrlError;
use super::v3::MountStatus;
use super::v4::Status;

/// Why an image on a server cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NfsError {
    /// The URL.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// A host's name.
    #[error("the name of the NFS server `{host}` cannot be resolved: correct it, or write an IP address")]
    Resolve {
        /// The name.
        host: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// Nobody there.
    #[error(
        "the NFS server {server} does not answer: is the address right, does it run, is there a way to it?"
    )]
    Server {
        /// The last that was tried.
        server: SocketAddr,
        /// How it ended.
        #[source]
        source: Unanswered,
    },
    /// To another server.
    #[error("the file system is at another server, {server}: write that into the URL")]
    Moved {
        /// Where to.
        server: SocketAddr,
    },
    /// It does not do what it was called for.
    #[error("the NFS server refuses to be called")]
    Rpc(#[from] RpcError),
    /// Only older versions.
    #[error(
        "the server has no NFSv{wanted}{}: an image that is written needs version 4.1 or 4.2 there, \
         for there is no lease without it", versions(.range.as_ref())
    )]
    Version {
        /// What was asked for.
        wanted: &'static str,
        /// What it has, if it says so.
        range: Option<(u32, u32)>,
    },
    /// To be written, by a version without leases.
    #[error(
        "an image cannot be written by NFSv3: nothing would keep a second writer away. Leave `version=3` out of the URL, or \
         make the drive read-only"
    )]
    Unfenced,
    /// A shared image that somebody may write.
    #[error(
        "NFSv3 has nothing that keeps others from changing an image under its readers: if it is certain that nobody writes \
         it, add `base_immutable=true` to the URL; or leave `version=3` out of it"
    )]
    NotProtected,
    /// Nobody who knows the ports.
    #[error(
        "the portmapper of the NFS server, {server}, does not answer, and NFSv3 needs it to find its ports: is the address \
         right? If the server has none, name the ports in the URL: nfs://HOST:2049/PATH?version=3&mountport=PORT"
    )]
    NoPortmapper {
        /// Where it should be.
        server: SocketAddr,
        /// How it ended.
        #[source]
        source: Unanswered,
    },
    /// It does not have it.
    #[error(
        "the server's portmapper knows no {program} over TCP: have NFSv3 switched on there, or leave `version=3` out of the \
         URL. If it is there nevertheless, name the ports in the URL: nfs://HOST:2049/PATH?version=3&mountport=PORT"
    )]
    NotRegistered {
        /// What is missing.
        program: &'static str,
    },
    /// An export, but not for us.
    #[error(
        "the server does not let this host mount `{export}` ({status}): have it exported to this host, and to ports above 1023 \
         as well (`insecure` in /etc/exports): no other are there for a process without privileges"
    )]
    ExportRefused {
        /// Its path, as the server has it.
        export: String,
        /// What the server says.
        status: MountStatus,
    },
    /// In no export.
    #[error(
        "no export of the server has `{path}` in it: {}. By NFSv3 the path is the one that the server itself has, and no \
         pseudo path", exported(.exports)
    )]
    NotExported {
        /// Where the image should be.
        path: String,
        /// What the server exports, as far as it says.
        exports: Vec<String>,
    },
    /// A directory of the path, or its export.
    #[error(
        "there is no `{name}` in {parent} on the server, as this client sees it: is it exported, to this host, and is the \
         path the one that the server shows (for NFSv4 its pseudo path)?"
    )]
    NoDirectory {
        /// What is missing.
        name: String,
        /// Where.
        parent: String,
    },
    /// The image.
    #[error("there is no image `{name}` in {parent} on the server: create it first, or correct the path")]
    Missing {
        /// What is missing.
        name: String,
        /// Where.
        parent: String,
    },
    /// It is there, and was to be made.
    #[error("`{image}` exists: nothing was changed; remove it first, or choose another name")]
    Exists {
        /// The image.
        image: String,
    },
    /// Not for this user.
    #[error(
        "no permission {action} `{name}` as uid {uid}, gid {gid}: give that user the access on the server, or name another \
         by `uid=` and `gid=` in the URL (a server may take root for nobody)"
    )]
    Denied {
        /// What was tried, in words.
        action: &'static str,
        /// Of what.
        name: String,
        /// As whom.
        uid: u32,
        /// And in which group.
        gid: u32,
    },
    /// Writable image on a read-only export.
    #[error(
        "`{image}` is exported read-only: make the drive read-only, or have it exported to be written by this host"
    )]
    ReadOnlyExport {
        /// The image.
        image: String,
    },
    /// No file.
    #[error("`{name}` on the server is {kind}: {advice}")]
    NotAFile {
        /// Its name.
        name: String,
        /// What it is, in words.
        kind: &'static str,
        /// And what to do.
        advice: &'static str,
    },
    /// Not even one sector.
    #[error(
        "the image is too small: it has {size_bytes} bytes, and a disk has at least one sector of 512; grow it, for example with \
         `truncate -s 64M`"
    )]
    TooSmall {
        /// Its size.
        size_bytes: u64,
    },
    /// Part of a sector at the end.
    #[error(
        "the size of the image, {size_bytes} bytes, is not a multiple of 512: round it up with `truncate -s %512`"
    )]
    PartialSector {
        /// Its size.
        size_bytes: u64,
    },
    /// Another file under the name.
    #[error("`{image}` is another file than it was: it was replaced on the server")]
    OtherFile {
        /// The image.
        image: String,
    },
    /// What the server gave back was not taken back.
    #[error("the server does not let go of what `{image}` was opened and locked with in the last session")]
    SameRight {
        /// The image.
        image: String,
    },
    /// It may still be open.
    #[error("the server does not say that it has closed `{image}`, which is to be handed over")]
    NotClosed {
        /// The image.
        image: String,
    },
    /// Less of it.
    #[error("the image was made smaller on the server: it had {before_bytes} bytes, and has {now_bytes}")]
    Shrunk {
        /// What the guest was told.
        before_bytes: u64,
        /// What there is.
        now_bytes: u64,
    },
    /// Somebody else, by the record.
    #[error(
        "cannot lease `{image}`: generation {} is held by {} since {}, and the server keeps it for it; stop that \
         machine first. If it has died, the server frees the image by itself within its lease time",
        record.generation, record.owner, record.since
    )]
    Held {
        /// The image.
        image: String,
        /// Who has it.
        record: Box<Record>,
    },
    /// Somebody else, unknown.
    #[error(
        "cannot lease `{image}`: another client has it open{}; stop whoever uses it. If it has died, the server frees the image \
         by itself within its lease time", if *is_writer { " to write" } else { ", and lets nobody write" }
    )]
    InUse {
        /// The image.
        image: String,
        /// What is known of the other.
        is_writer: bool,
    },
    /// A session that is of no use.
    #[error(
        "the server takes {requests} requests at a time, of {request_bytes} bytes each: an image needs 2 of 36 KiB. It may be \
         short of memory, or set up so"
    )]
    Narrow {
        /// How many at a time.
        requests: u32,
        /// How long each may be, and each answer.
        request_bytes: u32,
    },
    /// It keeps nothing.
    #[error(
        "the server keeps what a client has open for no time at all: set its lease time to a second or more"
    )]
    NoLease,
    /// The server has restarted a moment ago.
    #[error("the server has restarted and waits for those who had something open; try again in a minute")]
    Grace,
    /// Somebody was quicker.
    #[error("the lease of `{image}` was taken at the same moment; see `coraclectl lease show`")]
    Raced {
        /// The image.
        image: String,
    },
    /// No place for records.
    #[error(
        "no lease record can be made in {directory} on the server ({status}): let uid {uid}, gid {gid} create files there, or \
         name another place by `lease_at`"
    )]
    NoPlace {
        /// Where.
        directory: String,
        /// What the server says.
        status: Status,
        /// As whom.
        uid: u32,
        /// And in which group.
        gid: u32,
    },
    /// The records.
    #[error("who has `{image}` cannot be told, or not be written down")]
    Records {
        /// The image.
        image: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Anything else about a lease.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// Anything else the server says.
    #[error("cannot {action}")]
    Call {
        /// What was tried.
        action: &'static str,
        /// How it ended.
        #[source]
        source: Refusal,
    },
    /// The host.
    #[error("the host has no socket for it")]
    Host(#[from] io::Error),
}

/// How the last attempt at a server ended.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Unanswered(pub(super) Break);

/// How a call ended.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Refusal(pub(super) Refused);

/// The same, by the version that was spoken.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// A compound.
    #[error(transparent)]
    V4(#[from] CallError),
    /// A procedure.
    #[error(transparent)]
    V3(#[from] stateless::CallError),
}

impl Refused {
    /// What NFSv4 says, if that is what was spoken, and says something.
    pub(super) fn status(&self) -> Option<Status> {
        match self {
            Self::V4(error) => error.status(),
            Self::V3(_) => None,
        }
    }
}

/// The first of them, in words.
fn exported(exports: &[String]) -> String {
    const SHOWN_MAX: usize = 8;
    let shown: Vec<&str> = exports.iter().take(SHOWN_MAX).map(String::as_str).collect();
    match exports.len() {
        0 => "it does not say what it exports".to_owned(),
        1..=SHOWN_MAX => format!("it exports {}", shown.join(", ")),
        more => format!("it exports {} and {} more", shown.join(", "), more - SHOWN_MAX),
    }
}

fn versions(range: Option<&(u32, u32)>) -> String {
    match range {
        Some((low, high)) if low == high => format!(" (it has version {low})"),
        Some((low, high)) => format!(" (it has versions {low} to {high})"),
        None => String::new(),
    }
}
