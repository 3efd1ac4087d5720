//! `coraclectl info`: all that a machine says about itself.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};
use thiserror::Error;

use crate::client::{Client, ClientError, REQUEST_WAIT, Request};
use crate::discovery::{FindError, resolve};
use crate::output::{Format, OutputError, print, print_json};
use crate::summary::Summary;
use crate::table::{Table, memory, printable, span};

/// What Coracle drives a disk with when it is not told; Firecracker's answers always name the engine.
const DEFAULT_ENGINE: &str = "Async";

/// Show a machine's state, configuration and disks
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// A machine's name, or the path of its API socket
    vm: String,
}

/// Why nothing can be shown.
#[derive(Debug, Error)]
pub(crate) enum InfoError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Prints what the machine says about itself.
///
/// # Errors
///
/// When there is no such machine, or it does not answer.
pub(crate) fn info(args: &InfoArgs, format: Format) -> Result<(), InfoError> {
    let socket: PathBuf = resolve(&args.vm)?;
    let client = Client::new(&socket);
    let summary = Summary::ask(&socket, REQUEST_WAIT)?;
    let instance = client.read(Request::get("/"))?;
    let config = client.read(Request::get("/vm/config"))?;
    match format {
        Format::Json => {
            print_json(&json!({ "summary": summary, "instance": instance, "config": config }))?;
        }
        Format::Text => print(text(&summary, &instance, &config))?,
    }
    Ok(())
}

fn text(summary: &Summary, instance: &Value, config: &Value) -> String {
    let boot = |field| field_text(config.get("boot-source"), field);
    let monitor = [
        field_text(Some(instance), "app_name"),
        field_text(Some(instance), "vmm_version"),
    ];
    let lines = [
        ("id", summary.id.clone()),
        ("state", summary.state.clone()),
        ("reason", field_text(Some(instance), "reason")),
        ("monitor", monitor.join(" ").trim().to_owned()),
        ("pid", summary.pid.to_string()),
        ("uptime", summary.uptime_seconds.map(span).unwrap_or_default()),
        (
            "vcpus",
            summary.vcpus.map(|count| count.to_string()).unwrap_or_default(),
        ),
        ("memory", summary.memory_mib.map(memory).unwrap_or_default()),
        ("kernel", boot("kernel_image_path")),
        ("initrd", boot("initrd_path")),
        ("cmdline", boot("boot_args")),
        ("socket", summary.socket.display().to_string()),
    ];
    let mut text = String::new();
    for (label, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
        writeln!(text, "{label:<8}  {}", printable(value).replace('\n', " "))
            .expect("a String takes what it is given");
    }
    match config.get("drives").and_then(Value::as_array) {
        Some(drives) if !drives.is_empty() => text + "\n" + &drives_table(drives).to_string(),
        _ => text,
    }
}

fn drives_table(drives: &[Value]) -> Table<5> {
    let mut table = Table::new(["DISK", "ROOT", "ACCESS", "ENGINE", "PATH"]);
    for drive in drives {
        let is = |field| drive.get(field).and_then(Value::as_bool).unwrap_or_default();
        let text = |field| field_text(Some(drive), field);
        table.push([
            text("drive_id"),
            if is("is_root_device") { "yes" } else { "no" }.to_owned(),
            if is("is_read_only") { "ro" } else { "rw" }.to_owned(),
            engine(drive),
            image(drive),
        ]);
    }
    table
}

/// The engine of a disk: a monitor that was given none says none, and takes its default.
fn engine(drive: &Value) -> String {
    let given = field_text(Some(drive), "io_engine");
    // A disk of another process's has no file, and no engine.
    let has_file = !image(drive).is_empty();
    if given.is_empty() && has_file {
        DEFAULT_ENGINE.to_owned()
    } else {
        given
    }
}

/// Where the bytes of a disk are: an overlay has two places.
fn image(drive: &Value) -> String {
    let overlay = drive.get("overlay");
    match (field_text(overlay, "path"), field_text(overlay, "base")) {
        (path, base) if !path.is_empty() => format!("{path} over {base}"),
        _ => field_text(Some(drive), "path_on_host"),
    }
}

fn field_text(object: Option<&Value>, field: &str) -> String {
    object
        .and_then(|object| object.get(field)?.as_str())
        .unwrap_or_default()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_what_is_there_and_nothing_else() {
        let summary = Summary {
            id: "web".to_owned(),
            state: "Running".to_owned(),
            pid: 7,
            vcpus: Some(2),
            memory_mib: Some(1024),
            uptime_seconds: None,
            socket: PathBuf::from("/x/api.sock"),
        };
        let config = json!({
            "boot-source": { "kernel_image_path": "/k", "initrd_path": null, "boot_args": "a\u{7}b" },
            "drives": [{ "drive_id": "root", "is_root_device": true, "path_on_host": "/d" },
                { "drive_id": "other", "io_engine": "Sync", "path_on_host": "/e" },
                { "drive_id": "top", "overlay": { "base": "/d", "path": "memory", "keep": false } }],
        });
        let instance = json!({ "app_name": "Coracle", "vmm_version": "1" });
        let expected = "id        web\nstate     Running\nmonitor   Coracle 1\npid       7\nvcpus     2\n\
                        memory    1G\nkernel    /k\ncmdline   a\u{fffd}b\nsocket    /x/api.sock\n\n\
                        DISK    ROOT   ACCESS   ENGINE   PATH\nroot    yes    rw       Async    /d\n\
                        other   no     rw       Sync     /e\n\
                        top     no     rw       Async    memory over /d\n";
        assert_eq!(text(&summary, &instance, &config), expected);
    }
}
