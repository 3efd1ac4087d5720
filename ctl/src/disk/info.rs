//! `coraclectl disk info`: what an image is.

use std::os::unix::fs::MetadataExt;

use clap::Args;
use coracle_storage::backend::Access;
use coracle_storage::iscsi::{IscsiUrl, Operator};
use coracle_storage::lease::{Lock, Owner};
use coracle_storage::nfs::url::Version;
use coracle_storage::nfs::{self, NfsUrl};
use coracle_storage::open::OpenError;
use coracle_storage::overlay::file::FileError;
use coracle_storage::overlay::format::{HeaderError, State};
use serde_json::Value;

use super::DiskError;
use super::offline::{Image, OWNER, Overlay};
use crate::output::{Format, joined, print, print_json};
use crate::table::Table;

/// Show what an image or an overlay is, and how much of it there is
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// A raw image, an overlay, a unit of an iSCSI target (iscsi://HOST/TARGET/LUN), or a file on an NFS server
    /// (nfs://HOST/EXPORT/IMAGE)
    image: String,
}

/// Prints it.
///
/// # Errors
///
/// When it is neither.
pub(crate) fn info(args: &InfoArgs, format: Format) -> Result<(), DiskError> {
    if IscsiUrl::is_url(&args.image) {
        return tell(of_unit(&args.image)?, format);
    }
    if NfsUrl::is_url(&args.image) {
        return tell(of_export(&args.image)?, format);
    }
    // Only this verb looks into a file to learn its kind: a guest can write whatever it likes at the start
    // of a raw image, and nothing but a line of text comes of it here.
    let facts = match Overlay::open(&args.image, Lock::None) {
        Ok(overlay) => of_overlay(&overlay)?,
        Err(DiskError::File(
            FileError::NotAnOverlay {
                source: HeaderError::Magic,
                ..
            }
            | FileError::NotAFile { .. }
            | FileError::Missing { .. }
            | FileError::Host { .. },
        )) => of_raw(&args.image)?,
        Err(error) => return Err(error),
    };
    tell(facts, format)
}

fn tell(facts: Facts, format: Format) -> Result<(), DiskError> {
    match format {
        Format::Json => print_json(&facts.into_iter().collect())?,
        Format::Text => print(table(&facts))?,
    }
    Ok(())
}

/// What there is to say, in the order in which people want to know it.
type Facts = Vec<(&'static str, Value)>;

fn of_raw(path: &str) -> Result<Facts, DiskError> {
    let image = Image::open(path, Access::ReadOnly, Lock::None)?;
    Ok(vec![
        ("path", path.into()),
        ("kind", "raw".into()),
        ("size_bytes", image.size_bytes().into()),
        ("allocated_bytes", allocated_bytes(path)?.into()),
    ])
}

/// Nothing here takes the unit's lease: a machine may have it.
fn of_unit(url: &str) -> Result<Facts, DiskError> {
    let owner = Owner::of_this_process(OWNER);
    let standing = Operator::new(url, None, &owner).and_then(|operator| operator.inspect());
    let standing = standing.map_err(|error| OpenError::of_unit(url, error))?;
    let lease = match &standing.newest {
        Ok(Some(record)) => record.to_string(),
        Ok(None) if standing.holder.is_some() => "reserved by somebody who left no record".to_owned(),
        Ok(None) => "never leased, as far as is recorded".to_owned(),
        Err(error) => joined(error),
    };
    let nowhere = "nowhere: `coraclectl disk create` makes a place";
    Ok(vec![
        ("path", url.into()),
        ("kind", "unit of an iSCSI target".into()),
        ("identity", standing.identity.into()),
        ("size_bytes", standing.size_bytes.into()),
        ("capacity_bytes", standing.capacity_bytes.into()),
        ("is_write_protected", standing.is_write_protected.into()),
        (
            "lease_records",
            standing.records.as_deref().unwrap_or(nowhere).into(),
        ),
        ("lease", lease.into()),
    ])
}

/// Nothing here takes the file's lease: a machine may have it.
fn of_export(url: &str) -> Result<Facts, DiskError> {
    if is_stateless(url) {
        let image = Image::open(url, Access::ReadOnly, Lock::None)?;
        return Ok(vec![
            ("path", url.into()),
            ("kind", "file on an NFS server".into()),
            ("size_bytes", image.size_bytes().into()),
            ("lease", "none: NFSv3 has nothing that would keep it".into()),
        ]);
    }
    let owner = Owner::of_this_process(OWNER);
    let standing = nfs::Operator::new(url, None, &owner).and_then(|operator| operator.inspect());
    let standing = standing.map_err(|error| OpenError::of_nfs(url, error))?;
    let lease = match &standing.newest {
        Ok(Some(record)) => record.to_string(),
        Ok(None) if standing.is_kept => "kept for somebody who left no record".to_owned(),
        Ok(None) => "never leased, as far as is recorded".to_owned(),
        Err(error) => joined(error),
    };
    Ok(vec![
        ("path", url.into()),
        ("kind", "file on an NFS server".into()),
        ("size_bytes", standing.size_bytes.into()),
        ("lease_records", standing.records.into()),
        ("lease", lease.into()),
    ])
}

/// Whether a URL is of a file that is only read.
fn is_stateless(url: &str) -> bool {
    let url = url.parse::<NfsUrl>();
    url.is_ok_and(|url| url.options.version == Some(Version::V3))
}

fn of_overlay(overlay: &Overlay) -> Result<Facts, DiskError> {
    let header = overlay.file.header();
    let present = overlay.clusters.present_count();
    let state = match header.state {
        State::Usable => "usable",
        State::Committing => "a commit was interrupted",
    };
    Ok(vec![
        ("path", overlay.path.as_str().into()),
        ("kind", "overlay".into()),
        ("state", state.into()),
        ("size_bytes", header.size_bytes.into()),
        ("allocated_bytes", allocated_bytes(&overlay.path)?.into()),
        ("clusters", present.into()),
        ("cluster_bytes", header.cluster_bytes.into()),
        ("base", header.base.path.as_str().into()),
        ("base_state", base_state(overlay).into()),
        ("base_size_bytes", header.base.size_bytes.into()),
    ])
}

/// What is to be found where the base was, in words.
fn base_state(overlay: &Overlay) -> String {
    if overlay.file.header().state == State::Committing {
        return "being written by a commit".to_owned();
    }
    match overlay.base(None) {
        Ok(_) => "there".to_owned(),
        Err(DiskError::Overlay(_)) => "another image, or changed".to_owned(),
        Err(error) => joined(&error),
    }
}

/// What the image takes of its file system.
fn allocated_bytes(path: &str) -> Result<u64, DiskError> {
    const BLOCK_BYTES: u64 = 512;
    let metadata = std::fs::metadata(path).map_err(|source| DiskError::Host {
        path: path.to_owned(),
        source,
    })?;
    Ok(metadata.blocks() * BLOCK_BYTES)
}

fn table(facts: &Facts) -> Table<2> {
    let mut table = Table::new(["FACT", "VALUE"]);
    for (fact, value) in facts {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        table.push([fact.replace('_', " "), value]);
    }
    table
}
