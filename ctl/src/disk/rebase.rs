//! `coraclectl disk rebase`: an overlay on another base shows what it showed on the old one.

use std::os::unix::fs::FileExt;

use clap::Args;
use coracle_storage::backend::Access;
use coracle_storage::lease::Lock;
use coracle_storage::overlay::format::{DATA_OFFSET_BYTES, Header};
use serde_json::json;

use super::DiskError;
use super::offline::{Image, Overlay};
use super::pieces::{len_of, pieces};
use super::progress::Progress;
use crate::output::{Format, print, print_json};

/// Move an overlay to another base: what differs between the two is copied into the overlay first
#[derive(Debug, Args)]
pub(crate) struct RebaseArgs {
    /// The overlay
    overlay: String,
    /// The new base
    #[arg(long, value_name = "IMAGE")]
    base: String,
    /// Where the old base is, if it is not where it was
    #[arg(long, value_name = "IMAGE")]
    old_base: Option<String>,
}

/// Carries it out. Until the last step the overlay is one of the old base, which shows the same whatever was
/// copied; after it, it is one of the new base.
///
/// # Errors
///
/// Why it cannot.
pub(crate) fn rebase(args: &RebaseArgs, format: Format) -> Result<(), DiskError> {
    let mut overlay = Overlay::open(&args.overlay, Lock::Exclusive)?;
    let old = overlay.base(args.old_base.as_deref())?;
    let mut new = Image::open(&args.base, Access::ReadOnly, Lock::Shared)?;
    let identity = new.identity()?;
    let header = Header {
        base_shown_bytes: new.size_bytes().min(overlay.file.header().size_bytes),
        base: identity,
        ..overlay.file.header().clone()
    };
    let copied_bytes = copy_differences(&mut overlay, old, &mut new, header.base_shown_bytes)?;
    let persisted = overlay.clusters.persist(&overlay.file);
    persisted.map_err(|source| overlay.host(source))?;
    let replaced = overlay.file.replace_header(header);
    replaced.map_err(|source| overlay.host(source))?;
    match format {
        Format::Json => print_json(&json!({ "base": new.path, "copied_bytes": copied_bytes }))?,
        Format::Text => print(format_args!(
            "{} is on {} now; {copied_bytes} bytes were copied from its old base\n",
            overlay.path, new.path
        ))?,
    }
    Ok(())
}

fn copy_differences(
    overlay: &mut Overlay,
    mut old: Image,
    new: &mut Image,
    new_shown_bytes: u64,
) -> Result<u64, DiskError> {
    let header = overlay.file.header().clone();
    let cluster = usize::try_from(header.cluster_bytes).expect("a cluster has at most a mebibyte");
    let progress = Progress::new("compare", header.size_bytes);
    let mut copied_bytes = 0;
    for (is_present, run) in overlay.runs() {
        if is_present {
            progress.add(run.end - run.start);
            continue;
        }
        for piece in pieces(run) {
            let (mut before, mut after) = (vec![0; len_of(&piece)], vec![0; len_of(&piece)]);
            old.read(piece.start, header.base_shown_bytes, &mut before)?;
            new.read(piece.start, new_shown_bytes, &mut after)?;
            // Pieces start at clusters: the latter are powers of two of at most a mebibyte.
            let clusters = before.chunks(cluster).zip(after.chunks(cluster));
            for (number, (before, _)) in clusters
                .enumerate()
                .filter(|(_, (before, after))| before != after)
            {
                let start = piece.start + (number * cluster) as u64;
                let end = start + before.len() as u64;
                let written = overlay
                    .file
                    .file()
                    .write_all_at(before, DATA_OFFSET_BYTES + start);
                written.map_err(|source| overlay.host(source))?;
                overlay.clusters.add(&(start..end));
                copied_bytes += end - start;
            }
            progress.add(piece.end - piece.start);
        }
    }
    Ok(copied_bytes)
}
