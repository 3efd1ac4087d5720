//! `coraclectl snapshot merge`: a snapshot and a diff that goes on from it, as one.

use clap::Args;
use coracle_storage::lease::Owner;
use coracle_vmm::config::KeyPlace;
use coracle_vmm::keys::SigningKey;
use coracle_vmm::snapshot::files::{Files, Reader};
use coracle_vmm::snapshot::memory::Progress;
use serde_json::json;

use super::keys::ReadingArgs;
use super::progress::shown;
use super::{OWNER, SnapshotError};
use crate::output::{Format, print, print_json};

/// Make one snapshot of a full one and of a diff that goes on from it
///
/// Both stay as they are. With --encryption-key both are encrypted with that key, and so is what comes of them. Of a chain of
/// diffs one after the other is merged: what comes out takes the place of the diff.
#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// The state file of the full snapshot
    base_state: String,
    /// Its memory file
    base_memory: String,
    /// The state file of the diff
    diff_state: String,
    /// Its memory file
    diff_memory: String,
    /// The state file to write
    state: String,
    /// The memory file to write
    memory: String,
    #[command(flatten)]
    keys: ReadingArgs,
    /// Who signs what comes of it, which has to be where one of the two is signed: a file, or fd:NUMBER
    #[arg(long, value_name = "KEY")]
    signing_key: Option<KeyPlace>,
}

/// Carries it out.
///
/// # Errors
///
/// When one is damaged, or they do not follow each other; then nothing is left of the new files.
pub(super) fn merge(args: &MergeArgs, format: Format) -> Result<(), SnapshotError> {
    let owner = Owner::of_this_process(OWNER);
    let base = Files {
        state: &args.base_state,
        memory: &args.base_memory,
    };
    let diff = Files {
        state: &args.diff_state,
        memory: &args.diff_memory,
    };
    let merged = Files {
        state: &args.state,
        memory: &args.memory,
    };
    let keys = args.keys.read()?;
    let signing = args
        .signing_key
        .as_ref()
        .map(|place| SigningKey::read(&place.into()));
    let signing = signing.transpose()?;
    let reader = Reader {
        owner: &owner,
        keys: &keys,
    };
    let progress = Progress::new();
    shown("merge", &progress, || {
        base.merge(&diff, &merged, &reader, signing, &progress)
    })?;
    match format {
        Format::Json => print_json(&json!({ "snapshot_path": args.state, "mem_file_path": args.memory }))?,
        Format::Text => print(format_args!(
            "{} and {} are the merged snapshot\n",
            args.state, args.memory
        ))?,
    }
    Ok(())
}
