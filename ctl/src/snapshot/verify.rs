//! `coraclectl snapshot verify`: whether a snapshot is what was written.

use clap::Args;
use coracle_storage::lease::Owner;
use coracle_vmm::snapshot::files::{Files, Reader};
use coracle_vmm::snapshot::memory::Progress;
use serde_json::json;

use super::keys::ReadingArgs;
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
    #[command(flatten)]
    keys: ReadingArgs,
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
    let keys = args.keys.read()?;
    let reader = Reader {
        owner: &owner,
        keys: &keys,
    };
    let progress = Progress::new();
    let snapshot = shown("verify", &progress, || files.verify(&reader, &progress))?;
    let signer = snapshot.signer.map(|signer| signer.to_string());
    match format {
        Format::Json => print_json(&json!({
            "snapshot_path": args.state, "mem_file_path": memory, "is_whole": true, "signer": signer
        }))?,
        Format::Text => print(format_args!(
            "{} and {} are whole{}\n",
            args.state,
            memory,
            signer.map_or_else(String::new, |signer| format!(", as {signer} has signed them"))
        ))?,
    }
    Ok(())
}
