//! `coraclectl lease break`: declares an image free whose owner is gone.

use clap::Args;
use coracle_storage::iscsi::IscsiUrl;
use coracle_storage::lease::{ChainError, Conflict, Owner, Phase, Record, Standing, break_lease, inspect};
use coracle_storage::nfs::NfsUrl;
use coracle_storage::open::OpenError;
use serde_json::json;
use thiserror::Error;

use super::show::record_json;
use super::{ImageArgs, LeaseVerbError, export, unit};
use crate::confirm::{Question, confirm};
use crate::output::{Format, print, print_json};

/// Declare the lease of an image broken whose owner is gone
///
/// Rarely needed for what is on this host: the lock of a dead machine falls by itself, and the next start takes the image.
/// There it is for records that cannot be read, and for a block device whose owner was on a host that is gone. An owner that
/// is alive here cannot be kept from writing by any other process: stop it instead.
///
/// On an iSCSI target a lease outlives its owner, so a machine that was killed leaves it behind. There an owner that is alive
/// is fenced: the target takes nothing more of what it writes.
///
/// An NFS server keeps a file for its owner, and frees it by itself when it has heard nothing of it for its lease time.
#[derive(Debug, Args)]
pub(crate) struct BreakArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

/// Why a lease is not broken.
#[derive(Debug, Error)]
pub(crate) enum BreakError {
    #[error(
        "{image} is in use by {owner}, and no other process can keep that one from writing: \
         end it first (on {}: `kill {}`)",
        owner.host,
        owner.pid
    )]
    Alive { image: String, owner: Box<Owner> },
}

/// Says what will be fenced, asks, and does it.
///
/// # Errors
///
/// When the owner is alive and cannot be fenced, or somebody says no.
pub(super) fn break_off(args: &BreakArgs, format: Format) -> Result<(), LeaseVerbError> {
    let image = args.image.image.as_str();
    let broken = if IscsiUrl::is_url(image) {
        of_unit(args)?
    } else if NfsUrl::is_url(image) {
        Some(of_export(args)?)
    } else {
        Some(of_file(args)?)
    };
    match format {
        Format::Json => {
            print_json(&json!({ "image": image, "record": broken.as_ref().map(record_json) }))?;
        }
        Format::Text => print(format_args!("{image}: free for the next machine that asks\n"))?,
    }
    Ok(())
}

fn of_file(args: &BreakArgs) -> Result<Record, LeaseVerbError> {
    let (image, at) = (args.image.image.as_str(), args.image.lease_at.as_deref());
    let standing = inspect(image, at)?;
    if let (Some(Conflict::Writer), Ok(Some(record))) = (standing.fence, &standing.newest)
        && record.phase.is_owned()
    {
        return Err(BreakError::Alive {
            image: image.to_owned(),
            owner: Box::new(record.owner.clone()),
        }
        .into());
    }
    agreed(args, consequence(&standing))?;
    Ok(break_lease(image, at, &Owner::of_this_process(super::OWNER))?)
}

/// The record that says so, if there is a place for one.
fn of_unit(args: &BreakArgs) -> Result<Option<Record>, LeaseVerbError> {
    let operator = unit::operator(&args.image)?;
    let failed = |error| OpenError::of_unit(&args.image.image, error);
    let standing = operator.inspect().map_err(failed)?;
    agreed(args, unit::consequence(&standing))?;
    Ok(operator.break_lease().map_err(failed)?)
}

/// An owner that is alive cannot be fenced there: the server keeps the file for it, and says so.
fn of_export(args: &BreakArgs) -> Result<Record, LeaseVerbError> {
    let operator = export::operator(&args.image)?;
    let failed = |error| OpenError::of_nfs(&args.image.image, error);
    let standing = operator.inspect().map_err(failed)?;
    if !standing.is_kept {
        agreed(args, export::consequence(&standing))?;
    }
    Ok(operator.break_lease().map_err(failed)?)
}

/// Asks, unless there is nothing to break, which the attempt will say.
fn agreed(args: &BreakArgs, consequence: Option<String>) -> Result<(), LeaseVerbError> {
    let Some(consequence) = consequence.filter(|_| !args.yes) else {
        return Ok(());
    };
    Ok(confirm(&Question {
        action: "breaking a lease",
        consequence: &format!("{}: {consequence}", args.image.image),
        question: "Break the lease?",
    })?)
}

/// What breaking means, if there is something to break.
fn consequence(standing: &Standing) -> Option<String> {
    match &standing.newest {
        Ok(Some(record)) if record.phase.is_owned() => Some(held(record)),
        Ok(Some(record)) if record.phase == Phase::Moved => Some(format!(
            "the machine of {} was moved elsewhere with a copy of it at {}. Whoever starts with this one starts with the disk \
             as it was then: what the guest has written since is in the copy, and only there.",
            record.owner, record.since
        )),
        Err(ChainError::Unreadable { file, .. }) => Some(format!(
            "{} cannot be read, so nobody knows who has the image. Whoever it is loses it; \
             a snapshot that remembers an earlier generation cannot be used any more.",
            file.display()
        )),
        Ok(_) | Err(_) => None,
    }
}

fn held(record: &Record) -> String {
    format!(
        "generation {} was taken by {} at {} and not released. No lock on this host is in the way, so a process \
         here is fenced. Another host's process is not, if the image is a block device: it must have ended.",
        record.generation, record.owner, record.since
    )
}
