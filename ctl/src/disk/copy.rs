//! `coraclectl disk copy`: an image as another one, wherever each of them is.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use clap::Args;
use coracle_storage::backend::Access;
use coracle_storage::iscsi::IscsiUrl;
use coracle_storage::lease::{Lock, Owner};
use coracle_storage::nfs::{self, NfsError, NfsUrl};
use coracle_storage::open::OpenError;
use coracle_storage::overlay::file::sync_directory_of;
use serde_json::json;

use super::offline::{Image, OWNER, Overlay};
use super::pieces::{GRAIN_BYTES, Holds, len_of, pieces, runs};
use super::progress::Progress;
use super::{DiskError, output_refused as refused};
use crate::confirm::{Question, confirm};
use crate::output::{Format, print, print_json};

/// So much of a unit is written last: boot sectors, partition tables and superblocks begin there.
const HEAD_BYTES: u64 = 1 << 20;

/// Copy an image: to a new file here or on an NFS server, or onto a unit of an iSCSI target
///
/// Ranges of zeros take no space in a new file. It has its name when it is complete and on the medium, so a copy that breaks off
/// leaves no image that looks like one. The source must be used by nobody who writes; the copy is nobody's afterwards.
#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// The image to read: a path, iscsi://HOST/TARGET/LUN or nfs://HOST/EXPORT/IMAGE; an overlay is copied by `disk flatten`
    source: String,
    /// What to write: a new file, by its path or nfs://HOST/EXPORT/IMAGE, or a unit that `disk create` has made ready
    target: String,
    /// Do not ask whether what is on a unit may be replaced
    #[arg(long, short)]
    yes: bool,
}

/// Carries it out.
///
/// # Errors
///
/// Why it cannot; then nothing is left of a new file.
pub(crate) fn copy(args: &CopyArgs, format: Format) -> Result<(), DiskError> {
    if Overlay::open(&args.source, Lock::None).is_ok() {
        return Err(DiskError::SourceIsOverlay(args.source.clone()));
    }
    let mut source = Image::open(&args.source, Access::ReadOnly, Lock::Shared)?;
    let size_bytes = source.size_bytes();
    if IscsiUrl::is_url(&args.target) {
        to_unit(&mut source, args)?;
    } else if NfsUrl::is_url(&args.target) {
        to_export(&mut source, &args.target)?;
    } else {
        to_file(&mut source, &args.target)?;
    }
    match format {
        Format::Json => print_json(&json!({ "output": args.target, "size_bytes": size_bytes }))?,
        Format::Text => print(format_args!("{} is a copy of {}\n", args.target, args.source))?,
    }
    Ok(())
}

fn to_unit(source: &mut Image, args: &CopyArgs) -> Result<(), DiskError> {
    if !args.yes {
        confirm(&Question {
            action: "replacing what is on a unit",
            consequence: &format!("{}: whatever is on it is lost.", args.target),
            question: "Replace it?",
        })?;
    }
    let mut unit = Image::open(&args.target, Access::ReadWrite, Lock::Exclusive)?;
    if unit.size_bytes() < source.size_bytes() {
        return Err(DiskError::TargetTooSmall {
            path: args.target.clone(),
            size_bytes: unit.size_bytes(),
            needed_bytes: source.size_bytes(),
        });
    }
    let block_bytes = u64::from(unit.blocking.geometry().logical_block_bytes);
    if !source.size_bytes().is_multiple_of(block_bytes) {
        return Err(DiskError::PartialBlock {
            path: args.target.clone(),
            block_bytes,
            size_bytes: source.size_bytes(),
        });
    }
    // What it begins with is written last: a copy that breaks off is nothing that a machine could start from.
    let (size_bytes, head_bytes) = (source.size_bytes(), HEAD_BYTES.min(source.size_bytes()));
    unit.zero(0, head_bytes)?;
    if unit.size_bytes() > size_bytes {
        unit.zero(size_bytes, unit.size_bytes() - size_bytes)?;
    }
    unit.flush()?;
    let progress = Progress::new("copy", size_bytes);
    for range in [head_bytes..size_bytes, 0..head_bytes] {
        // What is there already is no hole.
        transfer(source, range, &progress, |at_bytes, part| match part {
            Part::Zeros { len_bytes } => unit.zero(at_bytes, len_bytes),
            Part::Data(bytes) => unit.write(at_bytes, bytes),
        })?;
        unit.flush()?;
    }
    Ok(())
}

/// The name is taken first, by a file that no machine can use; the copy gets it at once when it is complete.
fn to_export(source: &mut Image, url: &str) -> Result<(), DiskError> {
    let owner = Owner::of_this_process(OWNER);
    let failed = |error: NfsError| DiskError::Image(OpenError::of_nfs(url, error));
    let draft_url = draft_of(url);
    let target = nfs::Operator::new(url, None, &owner).map_err(failed)?;
    let draft = nfs::Operator::new(&draft_url, None, &owner).map_err(failed)?;
    target.reserve().map_err(failed)?;
    let copied = draft
        .create(source.size_bytes())
        .map_err(failed)
        .and_then(|()| {
            if cloned(source, &draft, &owner).map_err(failed)? {
                return Ok(());
            }
            // Nobody else knows its name, so there is nobody to tell of a lease.
            let mut image = Image::open(&draft_url, Access::ReadWrite, Lock::None)?;
            fill(source, &mut image)
        })
        .and_then(|()| target.replace_by(&draft).map_err(failed));
    copied.inspect_err(|_| {
        // If these fail, too, the first error is still the one to tell.
        let _ = draft.remove();
        let _ = target.forgo();
    })
}

/// Has the server of `draft` clone `source` if that is there as well. It stays open meanwhile, so that nobody writes it. `false`:
/// nothing was done.
fn cloned(source: &Image, draft: &nfs::Operator, owner: &Owner) -> Result<bool, NfsError> {
    if !NfsUrl::is_url(&source.path) {
        return Ok(false);
    }
    match nfs::Operator::new(&source.path, None, owner) {
        Ok(origin) if draft.is_with(&origin) => draft.clone_of(&origin, source.size_bytes()),
        // By NFSv3 nothing is cloned.
        Ok(_) | Err(NfsError::Unfenced) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes what is no zeros into a new image.
fn fill(source: &mut Image, image: &mut Image) -> Result<(), DiskError> {
    transfer_all(source, |at_bytes, part| match part {
        Part::Zeros { .. } => Ok(()),
        Part::Data(bytes) => image.write(at_bytes, bytes),
    })?;
    image.flush()
}

/// The URL of a file beside that of `url`.
fn draft_of(url: &str) -> String {
    let (path, options) = url.split_at(url.find('?').unwrap_or(url.len()));
    format!("{}{options}", draft_beside(path))
}

/// A name beside `path` that nobody else takes.
fn draft_beside(path: &str) -> String {
    let number = RandomState::new().build_hasher().finish();
    format!("{path}.{number:016x}.draft")
}

fn to_file(source: &mut Image, path: &str) -> Result<(), DiskError> {
    write_new(path, |file| {
        file.set_len(source.size_bytes())
            .map_err(|error| refused(path, error))?;
        transfer_all(source, |at_bytes, part| match part {
            Part::Zeros { .. } => Ok(()),
            Part::Data(bytes) => file
                .write_all_at(bytes, at_bytes)
                .map_err(|error| refused(path, error)),
        })?;
        file.sync_all().map_err(|error| refused(path, error))
    })
}

/// Makes the file `path` of what `write` does. It has its name when it is complete and on the medium.
///
/// # Errors
///
/// Why it cannot; then nothing is left of it.
pub(crate) fn write_new(
    path: &str,
    write: impl FnOnce(&File) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    if Path::new(path).exists() {
        return Err(DiskError::OutputExists(path.to_owned()));
    }
    let draft = draft_beside(path);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .map_err(|error| refused(path, error))?;
    let written = write(&file).and_then(|()| {
        // A rename would replace what came into being meanwhile; a link does not.
        fs::hard_link(&draft, path).map_err(|error| refused(path, error))
    });
    let removed = fs::remove_file(&draft).map_err(|error| refused(&draft, error));
    written?;
    removed?;
    sync_directory_of(path).map_err(|error| refused(path, error))
}

/// A part of an image.
enum Part<'a> {
    Zeros { len_bytes: u64 },
    Data(&'a [u8]),
}

fn transfer_all(
    source: &mut Image,
    put: impl FnMut(u64, Part<'_>) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let size_bytes = source.size_bytes();
    transfer(source, 0..size_bytes, &Progress::new("copy", size_bytes), put)
}

/// Hands a range of `source`, which begins with a whole grain, to `put`, in parts that are zeros or not, each with where it
/// starts. Holes are not read, where the image tells of them.
fn transfer(
    source: &mut Image,
    range: Range<u64>,
    progress: &Progress,
    mut put: impl FnMut(u64, Part<'_>) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let size_bytes = source.size_bytes();
    let mut at_bytes = range.start;
    while at_bytes < range.end {
        let rest = at_bytes..range.end;
        let data = worth_reading(&source.find_data(rest.clone())?, &rest);
        let len_bytes = data.start - at_bytes;
        if len_bytes > 0 {
            put(at_bytes, Part::Zeros { len_bytes })?;
            progress.add(len_bytes);
        }
        at_bytes = data.end;
        for piece in pieces(data) {
            let mut buffer = vec![0; len_of(&piece)];
            source.read(piece.start, size_bytes, &mut buffer)?;
            for (at, holds, bytes) in runs(&buffer) {
                let part = match holds {
                    Holds::Zeros => Part::Zeros {
                        len_bytes: bytes.len() as u64,
                    },
                    Holds::Data => Part::Data(bytes),
                };
                put(piece.start + at as u64, part)?;
            }
            progress.add(piece.end - piece.start);
        }
    }
    Ok(())
}

/// To read so much takes no longer than to ask where less of it ends.
const READ_BYTES_MIN: u64 = 256 << 10;

/// What is read of the `rest` of an image because there are data: whole grains, and not too few of them.
fn worth_reading(data: &Range<u64>, rest: &Range<u64>) -> Range<u64> {
    if data.is_empty() {
        return rest.end..rest.end;
    }
    let grain_bytes = GRAIN_BYTES as u64;
    let start = (data.start / grain_bytes * grain_bytes).max(rest.start);
    let end = data.end.next_multiple_of(grain_bytes);
    start..end.max(start + READ_BYTES_MIN).min(rest.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_are_read_in_whole_grains_and_no_few_of_them() {
        let rest = 8192..1 << 20;
        let read = |data: Range<u64>| worth_reading(&data, &rest);
        assert_eq!(read(1 << 20..1 << 20), 1 << 20..1 << 20, "nothing is left");
        assert_eq!(read(8192..8193), 8192..8192 + READ_BYTES_MIN);
        assert_eq!(read(20_000..500_001), 16_384..503_808);
        assert_eq!(read(1_040_000..1_040_001), 1_036_288..1 << 20);
        assert_eq!(read(rest.clone()), rest);
    }

    #[test]
    fn a_draft_is_beside_its_image_and_reached_in_the_same_way() {
        let drafts = [(); 2].map(|()| draft_of("nfs://h/e/a.raw?uid=1&gid=2"));
        for draft in &drafts {
            assert!(draft.starts_with("nfs://h/e/a.raw."), "{draft}");
            assert!(draft.ends_with(".draft?uid=1&gid=2"), "{draft}");
        }
        assert!(drafts[0] != drafts[1], "{drafts:?}");
        assert!(draft_of("nfs://h/e/a.raw").ends_with(".draft"));
    }
}
