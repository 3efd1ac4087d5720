//! `coraclectl snapshot create`: a machine's state and memory in two files, or its disks with them in a directory.

use std::path::absolute;
use std::thread;

use clap::Args;
use coracle_storage::open::is_remote;
use coracle_vmm::config::KeyPlace;
use serde_json::{Value, json};

use super::SnapshotError;
use super::memory_path;
use super::progress::{SNAPSHOT_WAIT, Watched, watch};
use crate::client::{Client, ClientError, Request};
use crate::discovery::resolve;
use crate::output::{Format, print, print_json};
use crate::pause::Phase;
use crate::signals::Signals;

/// Save a machine into two files; one that runs is paused for it, and runs on afterwards
///
/// With `--include-disks` it is saved into a directory, with the overlays of its drives: every drive that it writes needs one.
/// Such a snapshot can be gone on from any number of times.
///
/// What is under the files' names is replaced when the snapshot is whole. SIGINT and the like give it up, and nothing is left
/// of it.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// A machine's name, or the path of its API socket
    vm: String,
    /// The state file to write: a path, or nfs://HOST/EXPORT/FILE; with `--include-disks` the directory
    state: String,
    /// The memory file to write: a path, or nfs://HOST/EXPORT/FILE
    #[arg(required_unless_present = "include_disks", conflicts_with = "include_disks")]
    memory: Option<String>,
    /// Save the overlays of drives as well, and all of it into a directory on this host, which replaces the last one when it is
    /// whole
    #[arg(long, conflicts_with = "diff")]
    include_disks: bool,
    /// Only the pages that were written since the last snapshot, to be merged with that; needs `track_dirty_pages`
    #[arg(long)]
    diff: bool,
    /// Who signs it: an Ed25519 private key in PEM (PKCS#8), in a file, or behind the monitor's descriptor fd:NUMBER
    #[arg(long, value_name = "KEY")]
    signing_key: Option<KeyPlace>,
    /// What it is encrypted with: 32 bytes or 64 hexadecimal digits, in a file, or behind the monitor's descriptor fd:NUMBER
    #[arg(long, value_name = "KEY")]
    encryption_key: Option<KeyPlace>,
    /// Leave the machine paused: only so its disks stay what they are in the snapshot, and that can be gone on from
    #[arg(long)]
    stay_paused: bool,
}

/// Carries it out.
///
/// # Errors
///
/// When there is no such machine, or it refuses; then it runs if it ran before.
pub(super) fn create(args: &CreateArgs, format: Format) -> Result<(), SnapshotError> {
    let socket = resolve(&args.vm)?;
    let signals = Signals::watch()?;
    let client = Client::new(&socket);
    let before = client.read(Request::get("/"))?;
    let has_run = before.get("state").and_then(Value::as_str) == Some("Running");
    if has_run {
        Phase::Paused.bring(&client)?;
    }
    let made = make(args, &client, &signals);
    let goes_on = has_run && !args.stay_paused;
    let memory = memory_path(&args.state, args.memory.as_ref());
    let resumed = match (&made, goes_on) {
        // Whoever wanted it paused for the snapshot has none.
        (Err(_), _) if has_run => Phase::Resumed.bring(&client),
        (_, true) => Phase::Resumed.bring(&client),
        _ => Ok(()),
    };
    made?;
    resumed.map_err(SnapshotError::NotResumed)?;
    match format {
        Format::Json => print_json(&json!({
            "vm": args.vm,
            "snapshot_path": args.state,
            "mem_file_path": memory,
            "state": if goes_on { "Running" } else { "Paused" },
        }))?,
        Format::Text => print(format_args!(
            "{} is saved in {} and {}, and {}\n",
            args.vm,
            args.state,
            memory,
            if goes_on { "runs on" } else { "is paused" }
        ))?,
    }
    Ok(())
}

fn make(args: &CreateArgs, client: &Client<'_>, signals: &Signals) -> Result<(), SnapshotError> {
    // The monitor may have another working directory.
    let state = whole_path(&args.state)?;
    let memory = match &args.memory {
        Some(memory) => whole_path(memory)?,
        None => memory_path(&state, None),
    };
    let mut body = json!({
        "snapshot_path": state,
        "mem_file_path": memory,
        "snapshot_type": if args.diff { "Diff" } else { "Full" },
    });
    let keys = [
        ("signing_key", &args.signing_key),
        ("encryption_key", &args.encryption_key),
    ];
    if let Some(body) = body.as_object_mut() {
        for (field, place) in keys {
            if let Some(place) = place {
                body.insert(field.to_owned(), json!(place.clone().made_absolute()?));
            }
        }
        if args.include_disks {
            body.insert("include_disks".to_owned(), true.into());
        }
    }
    let body = body.to_string();
    thread::scope(|scope| {
        let asked = scope.spawn(|| {
            client.call(Request {
                method: "PUT",
                path: "/snapshot/create",
                body: Some(&body),
                wait: SNAPSHOT_WAIT,
            })
        });
        if let Watched::Interrupted = watch(client, signals, || asked.is_finished())? {
            client.send("PATCH", "/snapshot", &json!({ "state": "Cancelled" }))?;
        }
        match asked.join().expect("a request does not panic") {
            Err(ClientError::Refused { fault, .. }) => Err(SnapshotError::Refused(fault)),
            answered => Ok(answered.map(drop)?),
        }
    })
}

fn whole_path(path: &str) -> Result<String, SnapshotError> {
    if is_remote(path) {
        return Ok(path.to_owned());
    }
    Ok(absolute(path)?.to_string_lossy().into_owned())
}
