//! `coraclectl disk flatten`: an overlay and its base as one image.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use clap::Args;
use coracle_storage::iscsi::IscsiUrl;
use coracle_storage::lease::Lock;
use coracle_storage::nfs::NfsUrl;
use coracle_storage::overlay::file::sync_directory_of;
use serde_json::json;

use super::copy::{Holds, len_of, pieces, runs};
use super::offline::{Image, Overlay};
use super::progress::Progress;
use super::{DiskError, output_refused as refused};
use crate::output::{Format, print, print_json};

/// Write an overlay and its base into a new raw image
#[derive(Debug, Args)]
pub(crate) struct FlattenArgs {
    /// The overlay
    overlay: String,
    /// The image to write; zeros become holes
    output: String,
    /// Where the base is, if it is not where it was
    #[arg(long, value_name = "IMAGE")]
    base: Option<String>,
}

/// Carries it out. The image has its name when it is complete and on the medium.
///
/// # Errors
///
/// Why it cannot; then nothing is left of it.
pub(crate) fn flatten(args: &FlattenArgs, format: Format) -> Result<(), DiskError> {
    if IscsiUrl::is_url(&args.output) {
        return Err(DiskError::OutputIsUnit(args.output.clone()));
    }
    if NfsUrl::is_url(&args.output) {
        return Err(DiskError::OutputIsExport(args.output.clone()));
    }
    let overlay = Overlay::open(&args.overlay, Lock::Exclusive)?;
    let base = overlay.base(args.base.as_deref())?;
    let draft = format!("{}.{}.draft", args.output, std::process::id());
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .map_err(|error| refused(&args.output, error))?;
    let written = write(&overlay, base, &file, args).and_then(|()| {
        // A rename would replace what came into being meanwhile; a link does not.
        fs::hard_link(&draft, &args.output).map_err(|error| refused(&args.output, error))
    });
    let removed = fs::remove_file(&draft).map_err(|error| refused(&draft, error));
    written?;
    removed?;
    sync_directory_of(&args.output).map_err(|error| refused(&args.output, error))?;
    let size_bytes = overlay.file.header().size_bytes;
    match format {
        Format::Json => print_json(&json!({ "output": args.output, "size_bytes": size_bytes }))?,
        Format::Text => print(format_args!(
            "{} holds {} and its base\n",
            args.output, args.overlay
        ))?,
    }
    Ok(())
}

fn write(overlay: &Overlay, mut base: Image, file: &File, args: &FlattenArgs) -> Result<(), DiskError> {
    let refused = |error| refused(&args.output, error);
    let header = overlay.file.header();
    file.set_len(header.size_bytes).map_err(refused)?;
    let progress = Progress::new("flatten", header.size_bytes);
    for (is_present, run) in overlay.runs() {
        for piece in pieces(run) {
            let mut buffer = vec![0; len_of(&piece)];
            if is_present {
                overlay.read(piece.start, &mut buffer)?;
            } else {
                base.read(piece.start, header.base_shown_bytes, &mut buffer)?;
            }
            for (at, _, part) in runs(&buffer).filter(|(_, holds, _)| *holds == Holds::Data) {
                file.write_all_at(part, piece.start + at as u64)
                    .map_err(refused)?;
            }
            progress.add(piece.end - piece.start);
        }
    }
    file.sync_all().map_err(refused)
}
