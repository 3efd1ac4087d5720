//! `coraclectl snapshot info`: what a snapshot is of.

use clap::Args;
use coracle_storage::lease::Owner;
use coracle_storage::utc::UtcSecond;
use coracle_vmm::snapshot::load::{Snapshot, StateFile};
use coracle_vmm::snapshot::memory::{Kind, PAGE_BYTES};
use serde_json::{Value, json};

use super::keys::ReadingArgs;
use super::{OWNER, SnapshotError};
use crate::output::{Format, print, print_json};
use crate::table::Table;

/// Show what a snapshot is of, and what it has
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// The state file: a path, or nfs://HOST/EXPORT/FILE; or the directory of a snapshot that includes its disks
    state: String,
    #[command(flatten)]
    keys: ReadingArgs,
}

/// Prints it.
///
/// # Errors
///
/// When it is no state, or damaged.
pub(super) fn info(args: &InfoArgs, format: Format) -> Result<(), SnapshotError> {
    let file = StateFile::read(&args.state, &Owner::of_this_process(OWNER))?;
    let facts = facts(&file.parse(&args.keys.read()?)?, file.written_by());
    match format {
        Format::Json => print_json(&facts.into_iter().collect())?,
        Format::Text => print(table(&facts))?,
    }
    Ok(())
}

/// What there is to say, in the order in which people want to know it.
type Facts = Vec<(&'static str, Value)>;

fn facts(snapshot: &Snapshot, written_by: String) -> Facts {
    let (machine, memory) = (snapshot.config.machine(), &snapshot.table);
    let (kind, goes_on_from) = match memory.kind() {
        Kind::Full => ("full", Value::Null),
        Kind::Diff { parent } => ("diff", parent.to_string().into()),
    };
    let drives = snapshot.config.drives().iter().map(|drive| {
        let saved = snapshot.state.drive(&drive.drive_id);
        json!({
            "drive_id": drive.drive_id,
            "image": drive.overlay.as_ref().map_or(drive.path_on_host.as_deref(), |overlay| Some(&overlay.path)),
            "size_bytes": saved.map(|saved| saved.size_bytes),
            "generation": saved.and_then(|saved| saved.generation),
            "is_included": snapshot.overlays.of(&drive.drive_id).is_some(),
        })
    });
    vec![
        ("vm", snapshot.origin.vm.as_str().into()),
        (
            "taken",
            UtcSecond(snapshot.origin.taken_unix_s).to_string().into(),
        ),
        ("written_by", written_by.into()),
        ("kind", kind.into()),
        ("memory", memory.id().to_string().into()),
        ("goes_on_from", goes_on_from),
        ("vcpus", machine.vcpu_count.into()),
        ("mem_size_mib", machine.mem_size_mib.into()),
        ("saved_bytes", (memory.pages().count() * PAGE_BYTES as u64).into()),
        ("protected_by", memory.seal().kind().to_string().into()),
        (
            "signer",
            snapshot
                .signer
                .map_or(Value::Null, |signer| signer.to_string().into()),
        ),
        ("drives", drives.collect()),
    ]
}

fn table(facts: &Facts) -> Table<2> {
    let mut table = Table::new(["FACT", "VALUE"]);
    for (fact, value) in facts {
        let value = match value {
            Value::Null => continue,
            Value::String(text) => text.clone(),
            Value::Array(entries) => entries
                .iter()
                .map(Value::to_string)
                .collect::<Vec<_>>()
                .join(", "),
            other => other.to_string(),
        };
        table.push([fact.replace('_', " "), value]);
    }
    table
}
