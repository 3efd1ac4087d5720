//! Why an image on a target cannot be used, told to whoever can do something about it.

use std::error::Error;
use std::io;
use std::net::SocketAddr;

use crate::lease::{LeaseError, Record};

use super::chap::AuthenticationError;
use super::initiator::Break;
use super::login::LoginError;
use super::scsi::parameter::ParameterError;
use super::scsi::reservation::ReservationKey;
use super::scsi::sense::{Sense, Status};
use super::tail::HeaderError;
use super::url::UrlError;
use crate::secret::SecretError;

/// Why an image on a target cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IscsiError {
    /// The URL.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// A secret that it names.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Secrets that make no sense together.
    #[error(transparent)]
    Authentication(#[from] AuthenticationError),
    /// A host's name.
    #[error("the name of the iSCSI portal `{host}` cannot be resolved: correct it, or write an IP address")]
    Resolve {
        /// The name.
        host: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// Nobody there.
    #[error(
        "the iSCSI portal {portal} does not answer: is the address right, does the target run, is there a way to it?"
    )]
    Portal {
        /// The last that was tried.
        portal: SocketAddr,
        /// How it ended.
        #[source]
        source: Unanswered,
    },
    /// The login.
    #[error("cannot log in")]
    Login(#[from] LoginError),
    /// To a host of which only the name is known.
    #[error("the target redirects to `{portal}`, which is a name: write that portal into the URL")]
    NamedElsewhere {
        /// Where to.
        portal: String,
    },
    /// Back and forth.
    #[error("the target redirects to {portal}, and from there to another one, and so on")]
    Redirected {
        /// The last.
        portal: SocketAddr,
    },
    /// No such unit.
    #[error("the target has no LUN {lun}{}", listed(luns))]
    NoUnit {
        /// The unit.
        lun: u16,
        /// What it has, as far as it says so.
        luns: Vec<u16>,
    },
    /// Something else than a disk.
    #[error("LUN {lun} is {what}: an image needs a disk")]
    NotADisk {
        /// The unit.
        lun: u16,
        /// What it is.
        what: String,
    },
    /// A writable image on a unit that is not.
    #[error("the unit is write-protected: set `is_read_only`, or have the target let `{initiator}` write")]
    WriteProtected {
        /// Our name.
        initiator: String,
    },
    /// A shared image that somebody may write.
    #[error(
        "the unit is not write-protected, so nothing keeps others from changing it under its readers: have the target protect \
         it, or, if it is certain that nobody writes it, add `base_immutable=true` to the URL"
    )]
    NotProtected,
    /// Not even one block.
    #[error("the unit has {size_bytes} bytes, which is too small for a disk")]
    TooSmall {
        /// What it has.
        size_bytes: u64,
    },
    /// Behind the same name there is something else by now.
    #[error("the unit is another one than it was: it called itself {before}, and now {now}")]
    OtherUnit {
        /// What it called itself.
        before: String,
        /// What it calls itself.
        now: String,
    },
    /// The unit has become smaller.
    #[error("the unit has shrunk from {before_bytes} to {now_bytes} bytes")]
    Shrunk {
        /// What it had.
        before_bytes: u64,
        /// What it has.
        now_bytes: u64,
    },
    /// The reserved tail.
    #[error(
        "the unit ends with something that looks like a reserved tail and cannot be used; \
         `coraclectl disk create --force` makes a new one, and leaves what a guest has written"
    )]
    Tail(#[from] HeaderError),
    /// There is one already.
    #[error(
        "`{image}` has a reserved tail already; `--force` makes it anew, and whoever has the lease by its records loses it"
    )]
    Formatted {
        /// The image.
        image: String,
    },
    /// Something where the tail would be.
    #[error(
        "the last {tail_bytes} bytes of `{image}` are not blank, and a reserved tail would take them from its guest: a file \
         system or a partition table may reach there; `--force` takes them all the same"
    )]
    NotBlank {
        /// The image.
        image: String,
        /// What the tail takes.
        tail_bytes: u64,
    },
    /// Nothing to know the unit by.
    #[error(
        "the unit has no name of its own (page 0x83 of its vital product data), by which a tail could be known to be its own"
    )]
    Nameless,
    /// The reserved tail was made anew, or the unit was.
    #[error("the reserved tail of the unit is not the one that it had")]
    OtherTail,
    /// A command that a disk has to know.
    #[error("{command} failed with the status {status}{}", said(sense.as_ref()))]
    Command {
        /// The command.
        command: &'static str,
        /// How it ended.
        status: Status,
        /// What the unit said to it.
        sense: Option<Sense>,
    },
    /// An answer to it that makes no sense.
    #[error("the answer to {command} makes no sense")]
    Data {
        /// The command.
        command: &'static str,
        /// Why.
        #[source]
        source: ParameterError,
    },
    /// The unit refuses to be reset.
    #[error("the target refuses to reset the unit (response {0})")]
    Reset(u8),
    /// By another machine, by its record.
    #[error(
        "cannot lease `{image}`: generation {} is held by {} since {}{}; stop that machine first, or, when it is certain that it \
         has ended, run `coraclectl lease break` on it",
        record.generation, record.owner, record.since,
        if *reserved { "" } else { ", though the target, perhaps restarted since, has no reservation of it" }
    )]
    Held {
        /// The image.
        image: String,
        /// Who has it.
        record: Box<Record>,
        /// Whether the target has a reservation, too.
        reserved: bool,
    },
    /// By somebody of whom the key is known.
    #[error(
        "cannot lease `{image}`: it is reserved{}; `coraclectl lease show` says for whom, if that is recorded. Stop that machine \
         first; when it is certain that nobody uses it, run `coraclectl lease break` on it. After that it is reserved until a \
         machine has written it", with_key(*key)
    )]
    Reserved {
        /// The image.
        image: String,
        /// The key, if it still had the reservation when that was asked.
        key: Option<ReservationKey>,
    },
    /// By somebody who has no right to it.
    #[error("`{image}` is reserved{} by somebody whose record is not the newest", with_key(*key))]
    Usurped {
        /// The image.
        image: String,
        /// The key, if it still had the reservation when that was asked.
        key: Option<ReservationKey>,
    },
    /// The key to take over from is not that of the holder.
    #[error(
        "cannot take `{image}` over from the key {key}: generation {} is held by {} since {}, which is another process",
        record.generation, record.owner, record.since
    )]
    NotTheHeir {
        /// The image.
        image: String,
        /// The key.
        key: ReservationKey,
        /// Who has it.
        record: Box<Record>,
    },
    /// Somebody was quicker.
    #[error("the lease of `{image}` was taken at the same moment; see `coraclectl lease show`")]
    Raced {
        /// The image.
        image: String,
    },
    /// The records.
    #[error(
        "who has `{image}` cannot be told, or not be written down; when it is certain that nobody does, run \
         `coraclectl lease break` on it"
    )]
    Records {
        /// The image.
        image: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Records of which none is left.
    #[error(
        "whoever had `{image}` is fenced, and no record is left that says so or could be continued: \
         `coraclectl disk create --force` makes a new reserved tail, and leaves what a guest has written"
    )]
    RecordsGone {
        /// The image.
        image: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Anything else about a lease.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The host.
    #[error("the host has no socket for it")]
    Host(#[from] io::Error),
}

/// How the last attempt at a portal ended.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Unanswered(pub(super) Break);

fn listed(luns: &[u16]) -> String {
    match luns {
        [] => String::new(),
        luns => {
            let luns: Vec<String> = luns.iter().map(u16::to_string).collect();
            format!("; it has {}", luns.join(", "))
        }
    }
}

fn said(sense: Option<&Sense>) -> String {
    sense.map_or_else(String::new, |sense| format!(": {sense}"))
}

fn with_key(key: Option<ReservationKey>) -> String {
    key.map_or_else(String::new, |key| format!(" under the key {key}"))
}
