//! `coraclectl receive`: a machine in the foreground, from another process to its exit status.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::CertsDirectory;
use crate::output::Format;
use crate::run::{ForegroundArgs, RunError, Step, foreground};

/// Wait for a machine that is sent here, and go on with it in the foreground: show its console, end with its status
///
/// Console, signals and exit status are as with `run`.
#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Where to listen: ADDRESS:PORT; with port 0 `coraclectl api --vm NAME GET /migration` tells which it became
    listen: String,
    /// The directory with host.crt, host.key and ca.crt of this host, as `coraclectl certs init` makes them
    #[arg(long, value_name = "DIR")]
    certs: CertsDirectory,
    /// The name in the sender's certificate; without it any host of the authority may send
    #[arg(long, value_name = "NAME")]
    from_name: Option<String>,
    /// The only machine that is taken, by the name that it was started with
    #[arg(long, value_name = "ID")]
    vm: Option<String>,
    /// The same image by another path or URL on this host, of the drive ID, or the new file that one becomes that goes along
    /// (`migrate --copy-disk`); may be given for each
    #[arg(long = "disk", value_name = "ID=PATH", value_parser = named_path)]
    disks: Vec<(String, String)>,
    /// Another tap on this host, of the network interface ID; may be given for each
    #[arg(long = "net", value_name = "ID=TAP", value_parser = named_path)]
    nets: Vec<(String, String)>,
    /// Another path on this host for the socket of the vsock device
    #[arg(long, value_name = "PATH")]
    vsock: Option<String>,
    /// How long a sender may not be reached that still has a part of the guest's memory (`migrate --allow-postcopy`); then the
    /// guest is stopped for good
    #[arg(long, value_name = "SECONDS")]
    postcopy_wait: Option<u64>,
    #[command(flatten)]
    foreground: ForegroundArgs,
}

/// The id of a drive or a network interface, and where it is here.
fn named_path(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((id, path)) if !id.is_empty() && !path.is_empty() => Ok((id.to_owned(), path.to_owned())),
        _ => Err("say it as ID=PATH or ID=TAP, with the id that the sender's machine has for it"),
    }
}

/// How long a source is waited for.
const SOURCE_WAIT: Duration = Duration::from_hours(24 * 365);

/// Runs it.
///
/// # Errors
///
/// As `coraclectl run`.
pub(crate) fn receive(args: &ReceiveArgs, format: Format) -> Result<u8, Box<dyn std::error::Error>> {
    let start = start(args)?;
    let received: Result<u8, RunError> = foreground(&args.foreground, &[], &start, format);
    Ok(received?)
}

fn start(args: &ReceiveArgs) -> std::io::Result<Step> {
    let mut body = json!({ "listen": args.listen, "tls": args.certs.tls()? });
    if let Some(object) = body.as_object_mut() {
        let names = [("from_name", &args.from_name), ("vm", &args.vm)];
        let given = names
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value.clone()?)));
        object.extend(given.map(|(name, value)| (name, Value::from(value))));
        if !args.disks.is_empty() || !args.nets.is_empty() || args.vsock.is_some() {
            let list = |given: &[(String, String)], [id, place]: [&str; 2]| -> Vec<Value> {
                let given = given.iter();
                given
                    .map(|(name, path)| json!({ id: name, place: path }))
                    .collect()
            };
            let drives = list(&args.disks, ["drive_id", "path_on_host"]);
            let networks = list(&args.nets, ["iface_id", "host_dev_name"]);
            let mut overrides = json!({ "drives": drives, "networks": networks });
            if let (Some(overrides), Some(path)) = (overrides.as_object_mut(), &args.vsock) {
                overrides.insert("vsock".to_owned(), json!({ "uds_path": path }));
            }
            object.insert("overrides".to_owned(), overrides);
        }
        let wait = args.postcopy_wait.map(Value::from);
        object.extend(wait.map(|wait| ("postcopy_wait_s".to_owned(), wait)));
    }
    Ok(Step {
        part: "receive a machine".to_owned(),
        path: "/migration/receive".to_owned(),
        body,
        wait: SOURCE_WAIT,
    })
}
