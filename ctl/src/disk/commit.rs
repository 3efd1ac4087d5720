//! `coraclectl disk commit`: what an overlay has goes into its base.

use std::ops::Range;

use clap::Args;
use coracle_storage::backend::Access;
use coracle_storage::lease::Lock;
use coracle_storage::overlay::format::{BaseIdentity, Header, State};
use coracle_storage::request::Failure;
use serde_json::json;

use super::DiskError;
use super::copy::{Holds, len_of, pieces, runs};
use super::offline::{Image, Overlay};
use super::progress::Progress;
use crate::output::{Format, print, print_json};

/// Write what an overlay has into its base, and empty it
///
/// No machine may use the overlay, the base, or another overlay of that base: what others show would
/// change under them, and they refuse the base afterwards. A commit that was interrupted is run once more.
#[derive(Debug, Args)]
pub(crate) struct CommitArgs {
    /// The overlay
    overlay: String,
    /// Where the base is, if it is not where it was
    #[arg(long, value_name = "IMAGE")]
    base: Option<String>,
}

/// Carries it out, in an order in which no byte is lost wherever it stops: the overlay says that it is being
/// committed, the base is written and flushed, the overlay is emptied, then it is an ordinary one again.
///
/// # Errors
///
/// Why it cannot.
pub(crate) fn commit(args: &CommitArgs, format: Format) -> Result<(), DiskError> {
    let mut overlay = Overlay::open(&args.overlay, Lock::Exclusive)?;
    let header = overlay.file.header().clone();
    let path = args.base.as_deref().unwrap_or(&header.base.path);
    let mut base = Image::open(path, Access::ReadWrite, Lock::Exclusive)?;
    check(&overlay, &base.identity()?)?;
    let committed_bytes = overlay.clusters.present_count() * header.cluster_bytes;
    let committing = Header {
        state: State::Committing,
        ..header.clone()
    };
    let begun = overlay.file.replace_header(committing);
    begun.map_err(|source| overlay.host(source))?;
    write(&overlay, &mut base)?;
    let emptied = overlay.file.empty();
    emptied.map_err(|source| overlay.host(source))?;
    let usable = Header {
        base_shown_bytes: header.size_bytes,
        base: base.identity()?,
        state: State::Usable,
        ..header
    };
    let ended = overlay.file.replace_header(usable);
    ended.map_err(|source| overlay.host(source))?;
    match format {
        Format::Json => print_json(&json!({ "base": base.path, "committed_bytes": committed_bytes }))?,
        Format::Text => print(format_args!(
            "{} is empty: its {committed_bytes} bytes are in {}\n",
            overlay.path, base.path
        ))?,
    }
    Ok(())
}

/// Whether `base` is the one, which an interrupted commit has changed itself.
fn check(overlay: &Overlay, base: &BaseIdentity) -> Result<(), DiskError> {
    let header = overlay.file.header();
    let is_size = base.size_bytes == header.base.size_bytes || base.size_bytes == header.size_bytes;
    if header.state == State::Committing && is_size {
        return Ok(());
    }
    Ok(header.check_base(&overlay.path, base)?)
}

/// Makes the base read as the overlay, and flushes it.
fn write(overlay: &Overlay, base: &mut Image) -> Result<(), DiskError> {
    let header = overlay.file.header();
    if base.size_bytes() < header.size_bytes {
        let grown = base.blocking.grow(header.size_bytes);
        grown.map_err(|source| DiskError::BaseTooSmall {
            path: base.path.clone(),
            size_bytes: header.size_bytes,
            source,
        })?;
    }
    let progress = Progress::new("commit", header.size_bytes);
    for (is_present, run) in overlay.runs() {
        if is_present {
            for piece in pieces(run) {
                let mut buffer = vec![0; len_of(&piece)];
                overlay.read(piece.start, &mut buffer)?;
                put(base, piece.start, &buffer)?;
                progress.add(piece.end - piece.start);
            }
        } else {
            // What the overlay does not show of its base reads as zeros.
            let hidden: Range<u64> = run.start.max(header.base_shown_bytes)..run.end;
            if !hidden.is_empty() {
                let zeroed = base.blocking.zero_at(hidden.start, hidden.end - hidden.start);
                zeroed.map_err(|source| unwritten(base, hidden.start, source))?;
            }
            progress.add(run.end - run.start);
        }
    }
    base.blocking.flush().map_err(|source| DiskError::Flush {
        path: base.path.clone(),
        source,
    })
}

fn put(base: &mut Image, offset_bytes: u64, buffer: &[u8]) -> Result<(), DiskError> {
    for (at, holds, part) in runs(buffer) {
        let offset_bytes = offset_bytes + at as u64;
        match holds {
            Holds::Zeros => base.blocking.zero_at(offset_bytes, part.len() as u64),
            Holds::Data => base.blocking.write_at(offset_bytes, part),
        }
        .map_err(|source| unwritten(base, offset_bytes, source))?;
    }
    Ok(())
}

fn unwritten(base: &Image, offset_bytes: u64, source: Failure) -> DiskError {
    DiskError::Write {
        path: base.path.clone(),
        offset_bytes,
        source,
    }
}
