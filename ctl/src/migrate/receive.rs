//! `coraclectl receive`: a machine in the foreground, from another process to its exit status.

use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value, json};

use super::CertsDirectory;
use crate::here::HereArgs;
use crate::output::Format;
use crate::run::{ForegroundArgs, RunError, Step, foreground};

/// Wait for a machine that is sent here, and go on with it in the foreground: show its console, end with its status
///
/// What is on this host by another path, address or tap, `--disk`, `--net` and `--vsock` say. It has to be the very same image,
/// or, where one goes along (`migrate --copy-disk`), the new file that it becomes.
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
    #[command(flatten)]
    here: HereArgs,
    /// How long a sender may not be reached that still has a part of the guest's memory (`migrate --allow-postcopy`); then the
    /// guest is stopped for good [default: 300]
    #[arg(long, value_name = "SECONDS")]
    postcopy_wait: Option<u64>,
    #[command(flatten)]
    foreground: ForegroundArgs,
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
        let overrides = args.here.overrides();
        let overrides: Map<String, Value> = overrides
            .map(|(part, value)| (part.of_migration().to_owned(), value))
            .collect();
        if !overrides.is_empty() {
            object.insert("overrides".to_owned(), overrides.into());
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
