//! `coraclectl snapshot`: machines in files.

mod create;
mod info;
pub(crate) mod keys;
pub(crate) mod load;
mod merge;
pub(crate) mod progress;
mod verify;

use clap::{Args, Subcommand};
use coracle_vmm::keys::KeyError;
use coracle_vmm::snapshot::disks;
use coracle_vmm::snapshot::files::FilesError;
use coracle_vmm::snapshot::load::LoadError;
use thiserror::Error;

use crate::client::ClientError;
use crate::discovery::FindError;
use crate::output::{Format, OutputError};
use crate::run::RunError;
use crate::signals::SignalsError;

/// Save a machine, and go on from what was saved; look at snapshots, check and merge them
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    verb: SnapshotVerb,
}

#[derive(Debug, Subcommand)]
enum SnapshotVerb {
    Create(create::CreateArgs),
    Load(Box<load::LoadArgs>),
    Info(info::InfoArgs),
    Verify(verify::VerifyArgs),
    Merge(merge::MergeArgs),
}

/// Why it was not done.
#[derive(Debug, Error)]
pub(crate) enum SnapshotError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the snapshot was made, but the machine does not run on")]
    NotResumed(#[source] ClientError),
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Signals(#[from] SignalsError),
    #[error("cannot watch the snapshot being made")]
    Watch(#[from] std::io::Error),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Carries it out; returns the exit status.
///
/// # Errors
///
/// Why it cannot.
pub(crate) fn snapshot(args: &SnapshotArgs, format: Format) -> Result<u8, SnapshotError> {
    match &args.verb {
        SnapshotVerb::Load(args) => return Ok(load::load(args, format)?),
        SnapshotVerb::Create(args) => create::create(args, format)?,
        SnapshotVerb::Info(args) => info::info(args, format)?,
        SnapshotVerb::Verify(args) => verify::verify(args, format)?,
        SnapshotVerb::Merge(args) => merge::merge(args, format)?,
    }
    Ok(0)
}

/// Where the memory of a snapshot is: in it, if it was not said and the snapshot is a directory.
pub(crate) fn memory_path(snapshot: &str, said: Option<&String>) -> String {
    said.cloned().unwrap_or_else(|| disks::memory_file(snapshot))
}

/// In whose name files are opened.
const OWNER: &str = "coraclectl";
