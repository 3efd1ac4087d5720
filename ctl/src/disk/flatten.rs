//! `coraclectl disk flatten`: an overlay and its base as one image.

use std::fs::File;
use std::os::unix::fs::FileExt;

use clap::Args;
use coracle_storage::iscsi::IscsiUrl;
use coracle_storage::lease::Lock;
use coracle_storage::nfs::NfsUrl;
use serde_json::json;

use super::copy::write_new;
use super::offline::{Image, Overlay};
use super::pieces::{Holds, len_of, pieces, runs};
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
    write_new(&args.output, |file| write(&overlay, base, file, args))?;
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
