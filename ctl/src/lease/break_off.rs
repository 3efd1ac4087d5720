//! `coraclectl lease break`: declares an image free whose owner is gone.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;
use coracle_storage::lease::{ChainError, Conflict, Owner, Phase, Record, Standing, break_lease, inspect};
use serde_json::json;
use thiserror::Error;

use super::show::record_json;
use super::{ImageArgs, LeaseVerbError};
use crate::output::{Format, note, print, print_json};

/// Declare the lease of an image broken whose owner is gone
///
/// Rarely needed: on this host the lock of a dead machine falls by itself, and the next start takes the image. It is for
/// records that cannot be read, and for a block device whose owner was on a host that is gone. An owner that is alive
/// here cannot be kept from writing by any other process: stop it instead.
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
    #[error(
        "breaking a lease needs a yes, and there is no terminal to ask for it: give --yes if it is certain"
    )]
    NoTerminal,
    #[error("nothing was broken")]
    Declined,
    #[error("cannot ask")]
    Ask(#[source] io::Error),
}

/// Says what will be fenced, asks, and does it.
///
/// # Errors
///
/// When the owner is alive, or somebody says no.
pub(super) fn break_off(args: &BreakArgs, format: Format) -> Result<(), LeaseVerbError> {
    let (image, at) = (args.image.image.as_str(), args.image.lease_at.as_deref());
    let standing = inspect(image, at)?;
    if let (Some(Conflict::Writer), Ok(Some(record))) = (standing.fence, &standing.newest)
        && record.phase == Phase::Held
    {
        return Err(BreakError::Alive {
            image: image.to_owned(),
            owner: Box::new(record.owner.clone()),
        }
        .into());
    }
    if let Some(consequence) = consequence(&standing)
        && !args.yes
    {
        ask(&format!("{image}: {consequence}"))?;
    }
    let broken = break_lease(image, at, &Owner::of_this_process("coraclectl"))?;
    match format {
        Format::Json => print_json(&json!({ "image": image, "record": record_json(&broken) }))?,
        Format::Text => print(format_args!("{image}: free for the next machine that asks\n"))?,
    }
    Ok(())
}

/// What breaking means, if there is something to break.
fn consequence(standing: &Standing) -> Option<String> {
    match &standing.newest {
        Ok(Some(record)) if record.phase == Phase::Held => Some(held(record)),
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

fn ask(what: &str) -> Result<(), BreakError> {
    if !io::stdin().is_terminal() {
        return Err(BreakError::NoTerminal);
    }
    note(what);
    let mut stderr = io::stderr();
    stderr
        .write_all(b"Break the lease? [y/N] ")
        .and_then(|()| stderr.flush())
        .map_err(BreakError::Ask)?;
    let mut answer = String::new();
    io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(BreakError::Ask)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(BreakError::Declined)
    }
}
