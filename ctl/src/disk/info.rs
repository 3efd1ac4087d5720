//! `coraclectl disk info`: what an image is.

use std::os::unix::fs::MetadataExt;

use clap::Args;
use coracle_storage::backend::Access;
use coracle_storage::lease::Lock;
use coracle_storage::overlay::file::FileError;
use coracle_storage::overlay::format::{HeaderError, State};
use serde_json::Value;

use super::DiskError;
use super::offline::{Image, Overlay};
use crate::output::{Format, print, print_json};
use crate::table::Table;

/// Show what an image or an overlay is, and how much of it there is
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// A raw image or an overlay
    image: String,
}

/// Prints it.
///
/// # Errors
///
/// When it is neither.
pub(crate) fn info(args: &InfoArgs, format: Format) -> Result<(), DiskError> {
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
        Err(error) => error.to_string(),
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
