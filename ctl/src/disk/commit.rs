//! `coraclectl disk commit`: what an overlay has goes into its base.

use std::ops::Range;

use clap::Args;
use coracle_storage::backend::Access;
use coracle_storage::lease::Lock;
use coracle_storage::overlay::format::{BaseIdentity, Header, State};
use serde_json::json;

use super::DiskError;
use super::offline::{Image, Overlay};
use super::pieces::{Holds, len_of, pieces, runs};
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

/// Carries it out, in an order in which no byte is lost wherever it stops.
///
/// # Errors
///
/// Why it cannot.
pub(crate) fn commit(args: &CommitArgs, format: Format) -> Result<(), DiskError> {
    let mut commit = Commit::new(args)?;
    let header = commit.overlay.file.header();
    let committed_bytes = commit.overlay.clusters.present_count() * header.cluster_bytes;
    STEPS.iter().try_for_each(|step| step(&mut commit))?;
    let Commit { overlay, base } = commit;
    match format {
        Format::Json => print_json(&json!({ "base": base.path, "committed_bytes": committed_bytes }))?,
        Format::Text => print(format_args!(
            "{} is empty: its {committed_bytes} bytes are in {}\n",
            overlay.path, base.path
        ))?,
    }
    Ok(())
}

/// A commit and both of its disks.
struct Commit {
    overlay: Overlay,
    base: Image,
}

type Step = fn(&mut Commit) -> Result<(), DiskError>;

/// What is done, in this order. Until the third step a commit that was interrupted starts anew, and needs all that the
/// overlay has for that: what it no longer had of a grown image would read as zeros. From then on the base shows the same
/// as the overlay, so that it can be forgotten cluster by cluster.
const STEPS: [Step; 4] = [Commit::begin, Commit::write, Commit::adopt, Commit::empty];

impl Commit {
    fn new(args: &CommitArgs) -> Result<Self, DiskError> {
        let overlay = Overlay::open(&args.overlay, Lock::Exclusive)?;
        let path = args.base.as_deref().unwrap_or(&overlay.file.header().base.path);
        let mut base = Image::open(path, Access::ReadWrite, Lock::Exclusive)?;
        check(&overlay, &base.identity()?)?;
        Ok(Self { overlay, base })
    }

    /// Notes in the overlay that the base is about to change.
    fn begin(&mut self) -> Result<(), DiskError> {
        self.describe(Header {
            state: State::Committing,
            ..self.overlay.file.header().clone()
        })
    }

    fn write(&mut self) -> Result<(), DiskError> {
        write(&self.overlay, &mut self.base)
    }

    /// Makes the overlay one of the base as it is now, all of which it shows.
    fn adopt(&mut self) -> Result<(), DiskError> {
        let header = self.overlay.file.header().clone();
        let base = self.base.identity()?;
        self.describe(Header {
            base_shown_bytes: header.size_bytes,
            base,
            state: State::Usable,
            ..header
        })
    }

    fn empty(&mut self) -> Result<(), DiskError> {
        let emptied = self.overlay.file.empty();
        emptied.map_err(|source| self.overlay.host(source))
    }

    fn describe(&mut self, header: Header) -> Result<(), DiskError> {
        let described = self.overlay.file.replace_header(header);
        described.map_err(|source| self.overlay.host(source))
    }
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
                base.zero(hidden.start, hidden.end - hidden.start)?;
            }
            progress.add(run.end - run.start);
        }
    }
    base.flush()
}

fn put(base: &mut Image, offset_bytes: u64, buffer: &[u8]) -> Result<(), DiskError> {
    for (at, holds, part) in runs(buffer) {
        let offset_bytes = offset_bytes + at as u64;
        match holds {
            Holds::Zeros => base.zero(offset_bytes, part.len() as u64)?,
            Holds::Data => base.write(offset_bytes, part)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use coracle_storage::blocking::Blocking;
    use coracle_storage::lease::{Owner, Terms};
    use coracle_storage::overlay::OverlayConfig;

    use super::*;

    const BASE_BYTES: usize = 64 << 10;
    const SIZE_BYTES: usize = 128 << 10;

    /// The overlay as a machine has it.
    fn opened(config: &OverlayConfig) -> Blocking {
        let owner = Owner::of_this_process("vm1");
        let image = config
            .open(&Terms::new(Lock::Exclusive, &owner))
            .expect("the overlay can be used");
        Blocking::new(image.backend).expect("an overlay has two files")
    }

    #[test]
    fn a_commit_that_stops_after_any_step_and_is_run_once_more_loses_nothing_of_a_grown_overlay() {
        for stops_after in 0..=STEPS.len() {
            let place = tempfile::tempdir().expect("a scratch directory");
            let path = |name| place.path().join(name).to_string_lossy().into_owned();
            let config = OverlayConfig {
                base: path("base"),
                path: path("overlay"),
                keep: true,
            };
            std::fs::write(&config.base, vec![1; BASE_BYTES]).expect("room for a base");
            let mut image = opened(&config);
            image.grow(SIZE_BYTES as u64).expect("an overlay grows");
            for offset in [4096, BASE_BYTES, SIZE_BYTES - 4096] {
                let written = image.write_at(offset as u64, &[2; 4096]);
                written.expect("an overlay takes writes");
            }
            image.flush().expect("an overlay is flushed");
            let mut shown = vec![0; SIZE_BYTES];
            image.read_at(0, &mut shown).expect("the overlay can be read");
            drop(image);
            let args = CommitArgs {
                overlay: config.path.clone(),
                base: None,
            };
            let mut first = Commit::new(&args).expect("nobody uses them");
            for step in STEPS.iter().take(stops_after) {
                step(&mut first).expect("each step can be done");
            }
            drop(first);
            commit(&args, Format::Json).expect("it is run once more");
            let base = std::fs::read(&config.base).expect("the base is there");
            assert!(base == shown, "the base is another after {stops_after} steps");
            let mut after = vec![9; SIZE_BYTES];
            let read = opened(&config).read_at(0, &mut after);
            read.expect("the overlay can be read");
            assert!(after == shown, "the overlay is another after {stops_after} steps");
        }
    }
}
