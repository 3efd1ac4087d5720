//! Why a lease is refused, told to whoever can do something about it.

use std::io;

use super::chain::ChainError;
use super::fence::ofd::Conflict;
use super::record::{Overtaken, Record};

/// Why an image cannot be leased.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// By another machine.
    #[error(
        "cannot lease `{path}`: generation {} is held by {} since {}; stop that machine first, or use another image",
        record.generation, record.owner, record.since
    )]
    Held {
        /// The image.
        path: String,
        /// Who has it.
        record: Box<Record>,
    },
    /// Its records would be those of another image, which is in use.
    #[error(
        "cannot lease `{path}`: the records at `{at}` are those of an image that is held by {} since {}; a copy has records of \
         its own: give it another `lease_at` where it arrives (`overrides`)", record.owner, record.since
    )]
    RecordsInUse {
        /// The image.
        path: String,
        /// What its records are named after.
        at: String,
        /// The newest of them.
        record: Box<Record>,
    },
    /// By another disk of the machine that asks.
    #[error(
        "cannot lease `{path}`: this machine has it already as another disk, perhaps by another name; an image that is \
         written is one disk only"
    )]
    HeldHere {
        /// The image.
        path: String,
    },
    /// By a machine on another host, which no lock of this one reaches.
    #[error(
        "cannot lease `{path}`: generation {} is held by {} since {}, and locks on a block device do not reach that \
         host; stop that machine there, or, when it is certain that it has ended, `coraclectl lease break {path}`",
        record.generation, record.owner, record.since
    )]
    HeldElsewhere {
        /// The image.
        path: String,
        /// Who has it.
        record: Box<Record>,
    },
    /// By somebody of whom only the lock is known.
    #[error(
        "cannot lease `{path}`: {}; `fuser -v {path}` names the programs that have it open, and their locks stand in \
         /proc/locks under inode {inode}",
        described(*conflict)
    )]
    InUse {
        /// The image.
        path: String,
        /// What the other does with it.
        conflict: Conflict,
        /// What /proc/locks has it under.
        inode: u64,
    },
    /// By somebody who has the block device for itself.
    #[error(
        "cannot lease `{path}`: the block device is in use, mounted or opened exclusively, perhaps through another \
         device node; `lsblk` and `fuser -v {path}` show by whom"
    )]
    Device {
        /// The device.
        path: String,
    },
    /// No lock at all.
    #[error(
        "cannot lease `{path}`: its file system does not lock; `\"lock\": \"none\"` uses the image without, and then \
         nothing keeps a second writer out"
    )]
    Unlockable {
        /// The image.
        path: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// There is no thread to record it.
    #[error("cannot lease `{path}`")]
    Thread {
        /// The image.
        path: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// By nobody, but it has been written since.
    #[error("cannot go on with `{path}` as it was when the snapshot was made: {overtaken}")]
    Overtaken {
        /// The image.
        path: String,
        /// What is known.
        overtaken: Box<Overtaken>,
    },
    /// By nobody any more: its machine has been moved with a copy.
    #[error(
        "cannot lease `{path}`: its machine was moved elsewhere with a copy of it, by {} at {}, and writes that one: this one is \
         what was left behind; when it is certain that it is wanted all the same, `coraclectl lease break {path}`",
        record.owner, record.since
    )]
    Moved {
        /// The image.
        path: String,
        /// What was left behind.
        record: Box<Record>,
    },
    /// Nothing says whether it has been written.
    #[error(
        "cannot go on with `{path}` as it was when the snapshot was made: there is no place for lease records, so nothing says \
         whether it has been written since; name one by `lease_at` before the machine is started, or let the machine go on with \
         an overlay of its own over an image that nobody writes (`disks`: `Detached`)"
    )]
    Forgotten {
        /// The image.
        path: String,
    },
    /// Nobody offers it any more.
    #[error(
        "cannot take `{path}` over: it is not as its owner has offered it{}",
        .newest.as_ref().map(|record| format!(", but {} by {} since {}", record.phase, record.owner, record.since))
            .unwrap_or_else(|| OTHER_IMAGE.to_owned())
    )]
    Withdrawn {
        /// The image.
        path: String,
        /// The newest record of its lease.
        newest: Option<Box<Record>>,
    },
    /// A step that is made and not written.
    #[error(
        "a step of the lease of `{path}` was begun and says nothing, so it cannot be told whose it is; when it is certain that \
         nobody uses the image, `coraclectl lease break` ends it"
    )]
    Undecided {
        /// The image.
        path: String,
    },
    /// Nothing to break.
    #[error("the lease of `{path}` is free: there is nothing to break")]
    Free {
        /// The image.
        path: String,
    },
    /// Nowhere to say that it is broken.
    #[error("there is no place for lease records of `{path}`, so none says that somebody has it")]
    Unrecorded {
        /// The image.
        path: String,
    },
    /// The records beside it.
    #[error("cannot lease `{path}`: {}", remedy(source))]
    Chain {
        /// The image.
        path: String,
        /// Why.
        #[source]
        source: ChainError,
    },
}

impl LeaseError {
    /// That there is no thread to record the lease of the image at `path`.
    pub(super) fn no_thread(path: &str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Thread { path, source }
    }
}

const OTHER_IMAGE: &str = ": no lease of it is recorded here, so it is another image; both hosts have to reach one image by one \
                           absolute path, or by its URL";

fn described(conflict: Conflict) -> &'static str {
    match conflict {
        Conflict::Writer => {
            "another program, such as QEMU, has it open to write, or a machine whose drive has another `lease_at`"
        }
        Conflict::Reader => {
            "it is in use by readers who let nobody write: read-only disks of this or other machines, or another program \
             such as QEMU"
        }
        Conflict::Turn => "another program keeps it locked as a whole",
    }
}

fn remedy(error: &ChainError) -> &'static str {
    match error {
        ChainError::Unreadable { .. } => {
            "who has it cannot be told; when it is certain that nobody does, run `coraclectl lease break` on it"
        }
        ChainError::NoPlace { .. } => {
            "its records cannot be continued; let this user write to their directory, or name another by `lease_at`"
        }
        ChainError::Lost { .. } => "it was taken at the same moment; see `coraclectl lease show`",
        ChainError::Exhausted => "its records have no number left; remove them all if nobody uses the image",
        ChainError::Host { .. } => "it cannot be recorded who has it",
    }
}
