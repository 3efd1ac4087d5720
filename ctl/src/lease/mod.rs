//! `coraclectl lease`: who may write an image, and taking that away from the dead.

mod break_off;
mod export;
mod show;
mod unit;

use clap::{Args, Subcommand};
use coracle_storage::open::OpenError;
use thiserror::Error;

use crate::confirm::ConfirmError;
use crate::output::{Format, OutputError};

/// Who breaks a lease, in the record that says so.
const OWNER: &str = "coraclectl";

/// Show who may write a disk image, or end the lease of an owner that is gone
#[derive(Debug, Args)]
pub(crate) struct LeaseArgs {
    #[command(subcommand)]
    verb: LeaseVerb,
}

#[derive(Debug, Subcommand)]
enum LeaseVerb {
    /// Show who has an image: which machine, where, since when, and what the host locks or the server keeps now
    Show(ImageArgs),
    Break(break_off::BreakArgs),
}

/// Which image.
#[derive(Debug, Args)]
struct ImageArgs {
    /// The image: a file, a block device, a unit of an iSCSI target (iscsi://HOST/TARGET/LUN), or a file on an NFS server
    /// (nfs://HOST/EXPORT/IMAGE)
    image: String,
    /// What the lease's records are named after, if not after the image: the drive's `lease_at`
    #[arg(long, value_name = "PREFIX")]
    lease_at: Option<String>,
}

/// Why a lease cannot be shown or broken.
#[derive(Debug, Error)]
pub(crate) enum LeaseVerbError {
    #[error(transparent)]
    Image(#[from] OpenError),
    #[error(transparent)]
    Break(#[from] break_off::BreakError),
    #[error(transparent)]
    Confirm(#[from] ConfirmError),
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Does what the verb says.
///
/// # Errors
///
/// When the image or its records cannot be read, or the lease is not to be broken.
pub(crate) fn lease(args: &LeaseArgs, format: Format) -> Result<(), LeaseVerbError> {
    match &args.verb {
        LeaseVerb::Show(image) => show::show(image, format),
        LeaseVerb::Break(args) => break_off::break_off(args, format),
    }
}
