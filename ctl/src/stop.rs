//! `coraclectl stop`: ends a machine, politely first.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use rustix::process::Pid;
use serde_json::{Value, json};
use thiserror::Error;

use crate::client::{Client, ClientError, REQUEST_WAIT, Request};
use crate::deadline::Deadline;
use crate::discovery::{FindError, resolve};
use crate::ladder::{Rung, RungError};
use crate::output::{Format, OutputError, note, print, print_json};
use crate::pause::Phase;
use crate::process::Process;

/// End a machine: ask its guest, then end its monitor
///
/// A running guest is sent Ctrl-Alt-Del; a paused one is resumed first, since it cannot shut down
/// while it stands still. A guest that has not shut down after the timeout loses its monitor:
/// SIGTERM, and SIGKILL five seconds later.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// A machine's name, or the path of its API socket
    vm: String,
    /// How long the guest may take to shut down
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=86400))]
    timeout: u64,
    /// Do not ask the guest; its monitor gets SIGTERM at once
    #[arg(long)]
    force: bool,
}

/// Why the machine may still run.
#[derive(Debug, Error)]
pub(crate) enum StopError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the monitor with process id {pid} cannot be watched")]
    Watch {
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Rung(#[from] RungError),
    #[error(
        "its guest runs at {to}, and {left_mib} MiB of the guest's memory are still here: this process ends by itself when \
         they are there; --force ends it now, and loses the guest"
    )]
    Needed { to: String, left_mib: u64 },
    #[error(
        "the monitor with process id {pid} has been killed and has not ended: \
         the kernel holds it in a system call, `cat /proc/{pid}/stack` shows in which"
    )]
    Survived { pid: i32 },
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Ends the machine and says how.
///
/// # Errors
///
/// When there is no such machine, this user may not end it, or it cannot be ended.
pub(crate) fn stop(args: &StopArgs, format: Format) -> Result<(), StopError> {
    let socket = resolve(&args.vm)?;
    let client = Client::new(&socket);
    let pid = client.peer(REQUEST_WAIT)?;
    let watch_error = |source| StopError::Watch {
        pid: number(pid),
        source,
    };
    let process = Process::open(pid).map_err(watch_error)?;
    // The process that listened is the one that is held only if it still listens now.
    if client.peer(REQUEST_WAIT)? != pid {
        return Err(watch_error(io::Error::other(
            "another monitor has taken over its socket",
        )));
    }
    let first = if args.force {
        Rung::Monitor
    } else {
        check_unneeded(&client)?;
        politest(&client)?
    };
    let rung = climb(first, Duration::from_secs(args.timeout), &client, &process)?;
    remove_socket(socket);
    match format {
        Format::Json => {
            print_json(&json!({ "vm": args.vm, "pid": number(pid), "ended_by": ended_by(rung) }))?;
        }
        Format::Text => print(format_args!("{}: stopped, {rung}\n", args.vm))?,
    }
    Ok(())
}

/// A machine that has gone elsewhere, and has left some of its memory, is not ended by the way.
fn check_unneeded(client: &Client<'_>) -> Result<(), StopError> {
    // One that does not answer is not that far.
    let status = client.read(Request::get("/migration")).unwrap_or_default();
    let is_fetched = status.get("state").and_then(Value::as_str) == Some("PostCopy");
    match status.get("to").and_then(Value::as_str) {
        Some(to) if is_fetched => Err(StopError::Needed {
            to: to.to_owned(),
            left_mib: (status.get("left_bytes").and_then(Value::as_u64).unwrap_or(0) >> 20).max(1),
        }),
        _ => Ok(()),
    }
}

/// The first step that this machine can answer to; resumes a paused one, so that it can.
fn politest(client: &Client<'_>) -> Result<Rung, StopError> {
    let instance = match client.read(Request::get("/")) {
        Ok(instance) => instance,
        Err(error) => {
            note(format_args!("{error}; its monitor gets SIGTERM"));
            return Ok(Rung::Monitor);
        }
    };
    match instance.get("state").and_then(Value::as_str) {
        Some("Not started") => Ok(Rung::Monitor),
        Some("Paused") => {
            note("the machine is paused: it is resumed so that its guest can shut down");
            let Err(error) = Phase::Resumed.bring(client) else {
                return Ok(Rung::Guest);
            };
            // One that has lost a disk does not go on.
            note(format_args!("{error}; its monitor gets SIGTERM"));
            Ok(Rung::Monitor)
        }
        _ => Ok(Rung::Guest),
    }
}

/// Takes step after step until the process has ended; returns the one that did it.
fn climb(
    first: Rung,
    guest_wait: Duration,
    client: &Client<'_>,
    process: &Process,
) -> Result<Rung, StopError> {
    let pid = number(process.pid());
    let mut rung = first;
    loop {
        let wait = match (rung.take(client, process), rung) {
            (Ok(()), _) => rung.wait(guest_wait),
            (Err(RungError::Guest(error)), _) => {
                note(format_args!("the guest cannot be asked to shut down: {error}"));
                Duration::ZERO
            }
            (Err(error), _) => return Err(error.into()),
        };
        let ended = process.wait(Deadline::after(wait));
        if ended.map_err(|source| StopError::Watch { pid, source })? {
            return Ok(rung);
        }
        if rung == Rung::Guest && !wait.is_zero() {
            note(format_args!(
                "the guest has not shut down within {} s: its monitor gets SIGTERM",
                wait.as_secs()
            ));
        }
        rung = rung.next().ok_or(StopError::Survived { pid })?;
    }
}

/// Firecracker leaves its socket behind, and so does whatever was killed.
fn remove_socket(socket: PathBuf) {
    if matches!(
        Client::new(&socket).peer(REQUEST_WAIT),
        Err(ClientError::NobodyListens { .. })
    ) {
        // Somebody else may have removed it, and a socket that nobody listens on harms nobody.
        let _ = fs::remove_file(socket);
    }
}

fn ended_by(rung: Rung) -> &'static str {
    match rung {
        Rung::Guest => "guest",
        Rung::Monitor => "SIGTERM",
        Rung::Kill => "SIGKILL",
    }
}

fn number(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
}
