//! `coraclectl snapshot verify`: whether a snapshot is what was written.

use clap::Args;
use coracle_storage::lease::Owner;
use coracle_vmm::snapshot::files::Files;
use coracle_vmm::snapshot::memory::Progress;
use serde_json::json;

use super::memory_path;
use super::progress::shown;
use super::{OWNER, SnapshotError};
use crate::output::{Format, print, print_json};

/// Read all of a snapshot, and check that it is what was written
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The state file: a path, or nfs://HOST/EXPORT/FILE; or the directory of a snapshot that includes its disks
    state: String,
    /// The memory file: a path, or nfs://HOST/EXPORT/FILE; that in the directory if absent
    memory: Option<String>,
}

/// Carries it out.
///
/// # Errors
///
/// The first that is not what was written.
pub(super) fn verify(args: &VerifyArgs, format: Format) -> Result<(), SnapshotError> {
    let owner = Owner::of_this_process(OWNER);
    let memory = memory_path(&args.state, args.memory.as_ref());
    let files = Files {
        state: &args.state,
        memory: &memory,
    };
    let progress = Progress::new();
    shown("verify", &progress, || files.verify(&owner, &progress))?;
    match format {
        Format::Json => print_json(&json!({
            "snapshot_path": args.state, "mem_file_path": memory, "is_whole": true
        }))?,
        Format::Text => print(format_args!("{} and {} are whole\n", args.state, memory))?,
    }
    Ok(())
}
