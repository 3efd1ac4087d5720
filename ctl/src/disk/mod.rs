//! `coraclectl disk`: images and overlays while no machine uses them.

mod commit;
mod copy;
mod create;
mod flatten;
mod info;
mod offline;
mod pieces;
mod progress;
mod rebase;
mod size;

use std::io::{self, ErrorKind};

use clap::{Args, Subcommand};
use coracle_storage::open::OpenError;
use coracle_storage::overlay::OverlayError;
use coracle_storage::overlay::file::FileError;
use coracle_storage::request::Failure;
use thiserror::Error;

use crate::confirm::ConfirmError;
use crate::output::{Format, OutputError};

pub(crate) use self::progress::Progress;

/// Make images, look at them and at overlays, and change overlays, while no machine uses them
#[derive(Debug, Args)]
pub(crate) struct DiskArgs {
    #[command(subcommand)]
    verb: DiskVerb,
}

#[derive(Debug, Subcommand)]
enum DiskVerb {
    Create(create::CreateArgs),
    Info(info::InfoArgs),
    Copy(copy::CopyArgs),
    Commit(commit::CommitArgs),
    Rebase(rebase::RebaseArgs),
    Flatten(flatten::FlattenArgs),
}

/// Why a disk was not done with as asked.
#[derive(Debug, Error)]
pub(crate) enum DiskError {
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Image(#[from] OpenError),
    #[error("{0} exists already: remove it or name another file")]
    OutputExists(String),
    #[error(
        "{0} is a unit of a target, and what is written here is a new file: name one, and copy that to the unit by `disk copy`"
    )]
    OutputIsUnit(String),
    #[error(
        "{0} is on an NFS server, and what is written here is a new file of this host: name one, and copy that to the server \
         by `disk copy`"
    )]
    OutputIsExport(String),
    #[error(
        "a new file needs a size: give --size, such as 512M (a unit of a target, which has one, is iscsi://HOST/TARGET/LUN)"
    )]
    NoSize,
    #[error("a unit has the size that its target gives it: leave --size out")]
    SizedUnit,
    #[error(
        "--force is for the end of a unit: a file that exists already is never replaced, so remove it or name another"
    )]
    ForcedFile,
    #[error(transparent)]
    Confirm(#[from] ConfirmError),
    #[error(
        "the base {path} cannot grow to the {size_bytes} bytes of the overlay: grow it first, or flatten the overlay"
    )]
    BaseTooSmall {
        path: String,
        size_bytes: u64,
        #[source]
        source: Failure,
    },
    #[error("cannot read {path} at byte {offset_bytes}")]
    Read {
        path: String,
        offset_bytes: u64,
        #[source]
        source: Failure,
    },
    #[error("cannot write {path} at byte {offset_bytes}")]
    Write {
        path: String,
        offset_bytes: u64,
        #[source]
        source: Failure,
    },
    #[error("{path} has {size_bytes} bytes, and the image {needed_bytes}: enlarge it, or name another")]
    TargetTooSmall {
        path: String,
        size_bytes: u64,
        needed_bytes: u64,
    },
    #[error(
        "{0} is an overlay, which is nothing without its base: write both into one image by `disk flatten`"
    )]
    SourceIsOverlay(String),
    #[error(
        "{path} has blocks of {block_bytes} bytes, and the image ends within one: it has {size_bytes} bytes"
    )]
    PartialBlock {
        path: String,
        block_bytes: u64,
        size_bytes: u64,
    },
    #[error("cannot flush {path}")]
    Flush {
        path: String,
        #[source]
        source: Failure,
    },
    #[error("cannot use {path}")]
    Host {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Carries the verb out.
///
/// # Errors
///
/// Why it cannot.
pub(crate) fn disk(args: &DiskArgs, format: Format) -> Result<(), DiskError> {
    match &args.verb {
        DiskVerb::Create(args) => create::create(args, format),
        DiskVerb::Info(args) => info::info(args, format),
        DiskVerb::Copy(args) => copy::copy(args, format),
        DiskVerb::Commit(args) => commit::commit(args, format),
        DiskVerb::Rebase(args) => rebase::rebase(args, format),
        DiskVerb::Flatten(args) => flatten::flatten(args, format),
    }
}

/// Why there is no new file `path`.
fn output_refused(path: &str, error: io::Error) -> DiskError {
    match error.kind() {
        ErrorKind::AlreadyExists => DiskError::OutputExists(path.to_owned()),
        _ => DiskError::Host {
            path: path.to_owned(),
            source: error,
        },
    }
}
