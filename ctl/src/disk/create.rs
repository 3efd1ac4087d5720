//! `coraclectl disk create`: a new image, or a unit that is made ready to be one.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use clap::Args;
use coracle_storage::iscsi::{IscsiError, IscsiUrl, Operator, Replace, UnitStanding};
use coracle_storage::lease::Owner;
use coracle_storage::nfs::{self, NfsUrl};
use coracle_storage::open::OpenError;
use coracle_storage::overlay::file::sync_directory_of;
use serde_json::json;

use super::offline::OWNER;
use super::size::SizeBytes;
use super::{DiskError, output_refused};
use crate::confirm::{Question, confirm};
use crate::output::{Format, joined, print, print_json};

/// Make a new raw image, or make room for lease records on a unit of an iSCSI target
///
/// A path becomes a file of --size bytes that reads as zeros; what is there already is left alone. A unit keeps its size and
/// what is on it but for its last mebibyte, which its guests are not shown: that is where it says who may write it.
/// If something is there already nothing is done without --force.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The image: a path, a unit of an iSCSI target (iscsi://HOST/TARGET/LUN), or a file on an NFS server
    /// (nfs://HOST/EXPORT/IMAGE)
    image: String,
    /// How large a new file is, such as 512M or 2G
    #[arg(long, value_name = "SIZE")]
    size: Option<SizeBytes>,
    /// Take the end of a unit whatever is there, be it the lease records that it has
    #[arg(long)]
    force: bool,
    /// Do not ask whether --force is meant
    #[arg(long, short)]
    yes: bool,
}

/// Carries it out.
///
/// # Errors
///
/// Why it cannot, or what would be lost.
pub(crate) fn create(args: &CreateArgs, format: Format) -> Result<(), DiskError> {
    let image = args.image.as_str();
    let size_bytes = if IscsiUrl::is_url(image) {
        of_unit(args)?
    } else if NfsUrl::is_url(image) {
        of_export(args)?
    } else {
        of_file(args)?
    };
    match format {
        Format::Json => print_json(&json!({ "image": image, "size_bytes": size_bytes }))?,
        Format::Text => print(format_args!(
            "{image}: a guest sees {size_bytes} bytes. Give it to a machine as a drive's `path_on_host`, or by\n  \
             coraclectl run --disk '{}'\n",
            image.replace(',', ",,")
        ))?,
    }
    Ok(())
}

fn of_file(args: &CreateArgs) -> Result<u64, DiskError> {
    if args.force {
        return Err(DiskError::ForcedFile);
    }
    let (path, SizeBytes(size_bytes)) = (args.image.as_str(), args.size.ok_or(DiskError::NoSize)?);
    let refused = |error| output_refused(path, error);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(refused)?;
    fill(&file, path, size_bytes).map_err(|error| {
        // If this fails too, the first error is still the one to tell.
        let _ = fs::remove_file(path);
        refused(error)
    })?;
    Ok(size_bytes)
}

/// A new file on a server, which takes no space there until it is written.
fn of_export(args: &CreateArgs) -> Result<u64, DiskError> {
    if args.force {
        return Err(DiskError::ForcedFile);
    }
    let SizeBytes(size_bytes) = args.size.ok_or(DiskError::NoSize)?;
    let failed = |error| DiskError::Image(OpenError::of_nfs(&args.image, error));
    let operator = nfs::Operator::new(&args.image, None, &Owner::of_this_process(OWNER)).map_err(failed)?;
    operator.create(size_bytes).map_err(failed)?;
    Ok(size_bytes)
}

/// Gives a new file its size, durably.
fn fill(file: &File, path: &str, size_bytes: u64) -> io::Result<()> {
    file.set_len(size_bytes)?;
    file.sync_all()?;
    sync_directory_of(path)
}

fn of_unit(args: &CreateArgs) -> Result<u64, DiskError> {
    if args.size.is_some() {
        return Err(DiskError::SizedUnit);
    }
    let failed = |error| DiskError::Image(OpenError::of_unit(&args.image, error));
    let operator = Operator::new(&args.image, None, &Owner::of_this_process(OWNER)).map_err(failed)?;
    let replace = if args.force {
        if !args.yes {
            let lost = lost(operator.inspect()).map_err(failed)?;
            confirm(&Question {
                action: "taking the end of a unit",
                consequence: &format!("{}: {lost}", args.image),
                question: "Take it?",
            })?;
        }
        Replace::Always
    } else {
        Replace::Never
    };
    operator.create(replace).map_err(failed)
}

/// What a new tail costs.
fn lost(found: Result<UnitStanding, IscsiError>) -> Result<String, IscsiError> {
    let standing = match found {
        Err(error @ IscsiError::Tail(_)) => return Ok(format!("{}. It is lost.", joined(&error))),
        found => found?,
    };
    if standing.records.is_none() {
        return Ok("whatever stands in the last mebibyte of the unit is lost, and its guest is not shown that part any \
                   more."
            .to_owned());
    }
    let owner = match &standing.newest {
        Ok(Some(record)) if record.phase.is_owned() => format!(
            " By them it is in use: generation {} was taken by {} at {} and not released. It must have ended.",
            record.generation, record.owner, record.since
        ),
        Ok(_) => String::new(),
        Err(error) => format!(" ({})", joined(error)),
    };
    Ok(format!(
        "the lease records of the unit are lost, and what remembers them: snapshots of its machines cannot be used any \
         more.{owner}"
    ))
}
