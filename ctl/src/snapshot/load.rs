//! `coraclectl snapshot load`: a machine in the foreground, from a snapshot to its exit status.

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use super::keys::ReadingArgs;
use crate::output::Format;
use crate::run::{ForegroundArgs, RunError, Step, foreground};

/// Go on from a snapshot in the foreground: show the machine's console, end with its status
///
/// Its disks have to be as they were when the snapshot was made, so a snapshot with writable disks is gone on from once. Console,
/// signals and exit status are as with `run`.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// The state file: a path, or nfs://HOST/EXPORT/FILE
    state: String,
    /// The memory file: a path, or nfs://HOST/EXPORT/FILE
    memory: String,
    /// What is checked of the memory
    #[arg(long, value_enum, value_name = "WHAT", default_value = "lazy")]
    verify: VerifyMode,
    /// Record the pages that the guest writes, for diff snapshots
    #[arg(long)]
    track_dirty_pages: bool,
    /// Load it, and leave the guest paused until `coraclectl resume`
    #[arg(long)]
    paused: bool,
    #[command(flatten)]
    keys: ReadingArgs,
    #[command(flatten)]
    foreground: ForegroundArgs,
}

/// What is checked of a memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum VerifyMode {
    /// Each part as it is loaded, before the guest sees it
    Lazy,
    /// Nothing: the file is mapped as it is. Only for one that nobody else can change
    Off,
}

/// Runs it.
///
/// # Errors
///
/// As `coraclectl run`.
pub(super) fn load(args: &LoadArgs, format: Format) -> Result<u8, RunError> {
    foreground(&args.foreground, &[], &start(args), format)
}

fn start(args: &LoadArgs) -> Step {
    let mut body = Map::new();
    let mut put = |name: &str, value: Value| drop(body.insert(name.to_owned(), value));
    put("snapshot_path", args.state.as_str().into());
    put(
        "mem_backend",
        json!({ "backend_type": "File", "backend_path": args.memory }),
    );
    put("resume_vm", (!args.paused).into());
    if args.track_dirty_pages {
        put("track_dirty_pages", true.into());
    }
    if args.verify == VerifyMode::Off {
        put("verify", "off".into());
    }
    if let Some(path) = &args.keys.trusted_keys {
        put("trusted_keys", json!(path));
    }
    if let Some(place) = &args.keys.encryption_key {
        put("encryption_key", json!(place));
    }
    Step {
        part: "load the snapshot".to_owned(),
        path: "/snapshot/load".to_owned(),
        body: Value::Object(body),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use clap::Parser;
    use coracle_vmm::config::{KeyPlace, SnapshotLoad};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        load: LoadArgs,
    }

    #[test]
    fn the_body_is_one_that_the_monitor_takes() {
        for flags in [
            "",
            " --verify off --track-dirty-pages --paused --name a --trusted-keys t --encryption-key fd:7",
        ] {
            let line = format!("load /s /m{flags}");
            let load = Line::parse_from(line.split(' ')).load;
            let body: SnapshotLoad = serde_json::from_value(start(&load).body).unwrap();
            assert_eq!(body.memory().unwrap().0, "/m");
            let is_plain = flags.is_empty();
            assert_eq!((body.resume_vm, body.track_dirty_pages), (is_plain, !is_plain));
            assert_eq!(body.trusted_keys, (!is_plain).then(|| "t".into()));
            assert_eq!(body.encryption_key, (!is_plain).then_some(KeyPlace::Fd(7)));
        }
    }
}
