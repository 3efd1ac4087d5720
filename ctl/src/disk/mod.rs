//! `coraclectl disk`: images and overlays while no machine uses them.

mod commit;
mod copy;
mod flatten;
mod info;
mod offline;
mod progress;
mod rebase;

use std::io;

use clap::{Args, Subcommand};
use coracle_storage::open::OpenError;
use coracle_storage::overlay::OverlayError;
use coracle_storage::overlay::file::FileError;
use coracle_storage::request::Failure;
use thiserror::Error;

use crate::output::{Format, OutputError};

/// Look at images and overlays, and change overlays, while no machine uses them
#[derive(Debug, Args)]
pub(crate) struct DiskArgs {
    #[command(subcommand)]
    verb: DiskVerb,
}

#[derive(Debug, Subcommand)]
enum DiskVerb {
    Info(info::InfoArgs),
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
        DiskVerb::Info(args) => info::info(args, format),
        DiskVerb::Commit(args) => commit::commit(args, format),
        DiskVerb::Rebase(args) => rebase::rebase(args, format),
        DiskVerb::Flatten(args) => flatten::flatten(args, format),
    }
}
