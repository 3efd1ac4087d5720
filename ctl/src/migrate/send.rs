//! `coraclectl migrate`: sends a machine to a receiver.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use coracle_vmm::config::STREAMS_MAX;
use rustix::event::{PollFd, PollFlags};
use serde_json::{Value, json};

use super::receiver::Receiver;
use super::{CertsDirectory, MigrateError};
use crate::client::{Client, ClientError, LONG_REQUEST_WAIT, Request};
use crate::deadline::{Deadline, wait_ready};
use crate::discovery::resolve;
use crate::disk::Progress;
use crate::here::HereArgs;
use crate::name::Name;
use crate::output::{Format, print, print_json};
use crate::signals::Signals;

/// Send a running machine to a receiver on this or another host, while its guest runs
///
/// The guest stands still for its last pages only. Its disks have to be where both hosts reach them, and who may write them is
/// handed over with it; or they go along (--copy-disk). SIGINT and the like give it up, and the guest runs on here.
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// A machine's name, or the path of its API socket
    vm: String,
    /// Where `coraclectl receive` listens: HOST:PORT, or tls://HOST:PORT
    #[arg(required_unless_present_any = ["cancel", "here", "listen"])]
    to: Option<String>,
    /// The directory with host.crt, host.key and ca.crt of this host, as `coraclectl certs init` makes them
    #[arg(long, value_name = "DIR", required_unless_present_any = ["cancel", "recover"])]
    certs: Option<CertsDirectory>,
    /// Give up the migration that is under way, whoever began it; the guest runs on here
    #[arg(long, conflicts_with_all = ["to", "certs"])]
    cancel: bool,
    /// Start the receiver on this host, as the machine NAME in the background. A tap and the socket of a vsock device are one
    /// machine's: --net and --vsock say which the receiver has
    #[arg(long, value_name = "NAME", conflicts_with_all = ["to", "cancel"])]
    here: Option<Name>,
    #[command(flatten)]
    elsewhere: HereArgs,
    /// Start the receiver by this command of the shell, such as `ssh host-b coraclectl receive :7000 --certs /etc/coracle`; it
    /// goes on in the background when it has the machine, and is ended if it does not get it
    #[arg(long, value_name = "COMMAND", requires = "to", conflicts_with = "cancel")]
    receiver: Option<String>,
    /// What a receiver that is started here says, and its guest, is added to this file [default: VM.receiver.log]
    #[arg(long, value_name = "FILE")]
    receiver_log: Option<PathBuf>,
    /// Let the guest go on at the receiver before all of its memory is there, where it writes too fast for anything else: from
    /// then on it is lost if either host dies, and boots from its disks
    #[arg(long)]
    allow_postcopy: bool,
    /// How long the receiver may not be reached from then on [default: 300]
    #[arg(long, value_name = "SECONDS")]
    postcopy_wait: Option<u64>,
    /// The two sides have lost each other while memory was being fetched: have them find each other by another way. At the sender
    /// TO is where the receiver listens now
    #[arg(long, conflicts_with_all = ["cancel", "allow_postcopy"])]
    recover: bool,
    /// With --recover, at the receiver: listen there instead, at ADDRESS:PORT
    #[arg(long, value_name = "ADDRESS", requires = "recover", conflicts_with = "to")]
    listen: Option<String>,
    /// The name in the receiver's certificate, if it is not HOST
    #[arg(long, value_name = "NAME")]
    to_name: Option<String>,
    /// How long the guest may stand still for its last pages [default: 50]
    #[arg(long, value_name = "MS")]
    downtime_ms: Option<u64>,
    /// After how long it is given up if the guest writes memory faster than it is sent [default: 300]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Then stop the guest for as long as the rest takes, instead of giving up
    #[arg(long)]
    stop_at_timeout: bool,
    /// Never slow the guest down, however fast it writes memory
    #[arg(long)]
    full_speed: bool,
    /// The drive ID goes along: its image, a file, block device or kept overlay of this host, becomes a new file at the
    /// receiver, under the same path or that of `receive --disk`; may be given for each
    #[arg(long = "copy-disk", value_name = "ID")]
    copy_disks: Vec<String>,
    /// How many bytes are sent per second at most
    #[arg(long, value_name = "BYTES")]
    bandwidth_limit: Option<NonZeroU64>,
    /// How many connections memory goes by; each takes about a core on either host [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(STREAMS_MAX)))]
    streams: Option<u8>,
    /// Pack memory by LZ4: always, or as long as that is faster, which is measured again and again
    #[arg(long, value_enum)]
    compression: Option<Packing>,
}

/// Whether memory is packed.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Packing {
    None,
    Lz4,
    Auto,
}

impl Packing {
    /// As the API has it.
    fn name(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Lz4 => "Lz4",
            Self::Auto => "Auto",
        }
    }
}

/// What was seen of a migration: bytes of memory, of disks that go along, and on the wire.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    memory_bytes: u64,
    disk_bytes: u64,
    wire_bytes: u64,
}

/// How long a migration may take: memory of a TiB on a slow link.
const WAIT: Duration = Duration::from_hours(24);
/// How often it is asked how far it is.
const PERIOD: Duration = Duration::from_millis(50);

/// The request that gives a migration up.
const GIVE_UP: Request<'_> = Request {
    method: "DELETE",
    path: "/migration",
    body: None,
    wait: LONG_REQUEST_WAIT,
};

/// Carries it out.
///
/// # Errors
///
/// When there is no such machine, or it was not sent; then it runs on where it was, unless the error says otherwise.
pub(crate) fn migrate(args: &MigrateArgs, format: Format) -> Result<(), MigrateError> {
    if args.here.is_none() && !args.elsewhere.is_empty() {
        return Err(MigrateError::NotHere);
    }
    match &args.certs {
        _ if args.recover => recover(args, format),
        None => cancel(&args.vm, format),
        Some(certs) => carry(args, certs, format),
    }
}

fn carry(args: &MigrateArgs, certs: &CertsDirectory, format: Format) -> Result<(), MigrateError> {
    let asked = args.to.as_deref().map(place).transpose()?;
    let socket = resolve(&args.vm)?;
    let signals = Signals::watch()?;
    let client = Client::new(&socket);
    let mut receiver = start(args, certs, asked)?;
    let listens = receiver
        .as_mut()
        .map(|receiver| receiver.wait(&signals))
        .transpose()?;
    let Some(to) = listens.as_deref().or(asked) else {
        unreachable!("without an address the receiver is started here");
    };
    let mut body = json!({ "to": to, "tls": certs.tls()? });
    let mut put = |name: &str, value: Option<Value>| {
        if let (Some(object), Some(value)) = (body.as_object_mut(), value) {
            object.insert(name.to_owned(), value);
        }
    };
    put("to_name", args.to_name.clone().map(Value::from));
    put("downtime_ms", args.downtime_ms.map(Value::from));
    put("timeout_s", args.timeout.map(Value::from));
    put("on_timeout", args.stop_at_timeout.then(|| "Stop".into()));
    put("mode", args.full_speed.then(|| "Precopy".into()));
    put(
        "bandwidth_limit",
        args.bandwidth_limit.map(|limit| limit.get().into()),
    );
    put("streams", args.streams.map(Value::from));
    put(
        "compression",
        args.compression.map(|packing| packing.name().into()),
    );
    put("allow_postcopy", args.allow_postcopy.then(|| true.into()));
    put("postcopy_wait_s", args.postcopy_wait.map(Value::from));
    let copy_disks = args.copy_disks.as_slice();
    put("copy_disks", (!copy_disks.is_empty()).then(|| copy_disks.into()));
    let begun = Instant::now();
    let seen = send(&client, &signals, &body.to_string())?;
    let seconds = begun.elapsed().as_secs_f64();
    let log = receiver.map(Receiver::leave);
    match format {
        Format::Json => print_json(&json!({
            "vm": args.vm,
            "to": to,
            "seconds": seconds,
            "memory_bytes": seen.memory_bytes,
            "disk_bytes": seen.disk_bytes,
            "wire_bytes": seen.wire_bytes,
            "receiver_log": log,
        }))?,
        Format::Text => {
            print(format_args!(
                "{} runs on at {to}: {seconds:.1} s (seen last: {:.1} MiB of memory, {}{:.1} MiB on the wire)\n",
                args.vm,
                mib(seen.memory_bytes),
                of_disks(&seen),
                mib(seen.wire_bytes)
            ))?;
            if let Some(log) = log {
                print(format_args!("what it says is added to {}\n", log.display()))?;
            }
        }
    }
    Ok(())
}

/// HOST:PORT, however it was written.
fn place(asked: &str) -> Result<&str, MigrateError> {
    let to = asked.strip_prefix("tls://").unwrap_or(asked);
    if to.contains("://") || !to.contains(':') {
        return Err(MigrateError::To(asked.to_owned()));
    }
    Ok(to)
}

/// Starts the receiver, if that is asked for.
fn start(
    args: &MigrateArgs,
    certs: &CertsDirectory,
    to: Option<&str>,
) -> Result<Option<Receiver>, MigrateError> {
    let log = args.receiver_log.clone().unwrap_or_else(|| {
        let vm = Path::new(&args.vm).file_name().unwrap_or_default();
        PathBuf::from(format!("{}.receiver.log", vm.to_string_lossy()))
    });
    Ok(match (&args.here, &args.receiver, to) {
        (Some(name), _, _) => Some(Receiver::here(name, certs, &args.elsewhere, &log)?),
        (None, Some(line), Some(to)) => Some(Receiver::by(line, to, &log)?),
        _ => None,
    })
}

/// Has the two sides of a migration find each other again. Whether they do `GET /migration` tells.
fn recover(args: &MigrateArgs, format: Format) -> Result<(), MigrateError> {
    let mut body = serde_json::Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        body.extend(value.map(|value| (name.to_owned(), value)));
    };
    let to = args.to.as_deref().map(place).transpose()?;
    put("to", to.map(Value::from));
    put("to_name", args.to_name.clone().map(Value::from));
    put("tls", args.certs.as_ref().map(CertsDirectory::tls).transpose()?);
    put("listen", args.listen.clone().map(Value::from));
    let way = to.or(args.listen.as_deref()).unwrap_or_default().to_owned();
    let socket = resolve(&args.vm)?;
    Client::new(&socket).call(Request {
        method: "PUT",
        path: "/migration/recover",
        body: Some(&Value::from(body).to_string()),
        wait: LONG_REQUEST_WAIT,
    })?;
    match format {
        Format::Json => Ok(print_json(&json!({ "vm": args.vm, "at": way }))?),
        Format::Text => Ok(print(format_args!(
            "the other side of the migration of {} is looked for at {way}\n",
            args.vm
        ))?),
    }
}

/// Gives up what somebody else has begun. What becomes of the machine is told there.
fn cancel(vm: &str, format: Format) -> Result<(), MigrateError> {
    let socket = resolve(vm)?;
    let client = Client::new(&socket);
    let status = client.read(Request::get("/migration"))?;
    if status.get("state").and_then(Value::as_str) == Some("Idle") {
        return Err(MigrateError::None(vm.to_owned()));
    }
    client.call(GIVE_UP)?;
    match format {
        Format::Json => Ok(print_json(&json!({ "vm": vm, "cancelled": true }))?),
        Format::Text => Ok(print(format_args!(
            "the migration of {vm} is given up, unless the target has been told to start: whoever began it is told\n"
        ))?),
    }
}

/// Sends it, and shows how far it is.
fn send(client: &Client<'_>, signals: &Signals, body: &str) -> Result<Seen, MigrateError> {
    thread::scope(|scope| {
        let asked = scope.spawn(|| {
            client.call(Request {
                method: "PUT",
                path: "/migration/send",
                body: Some(body),
                wait: WAIT,
            })
        });
        let mut bar: Option<(Progress, u64)> = None;
        let mut seen = Seen::default();
        while !asked.is_finished() {
            let mut signal = [PollFd::new(signals, PollFlags::IN)];
            if wait_ready(&mut signal, Some(Deadline::after(PERIOD)))? {
                client.call(GIVE_UP)?;
                break;
            }
            // A monitor that does not answer just now is asked again; what becomes of the machine is told elsewhere.
            if let Ok(status) = client.read(Request::get("/migration")) {
                show(&mut bar, &status);
                seen.see(&status);
            }
        }
        drop(bar);
        match asked.join().expect("a request does not panic") {
            Err(ClientError::Refused { fault, .. }) => Err(MigrateError::Refused(fault)),
            answered => Ok(answered.map(|_| seen)?),
        }
    })
}

impl Seen {
    /// Once it is over there is nothing left to be seen.
    fn see(&mut self, status: &Value) {
        let bytes = |name| status.get(name).and_then(Value::as_u64).unwrap_or(0);
        self.memory_bytes = self.memory_bytes.max(bytes("sent_bytes"));
        self.disk_bytes = self.disk_bytes.max(bytes("disk_sent_bytes"));
        self.wire_bytes = self.wire_bytes.max(bytes("wire_bytes"));
    }
}

/// What was seen of disks, if any have gone along.
fn of_disks(seen: &Seen) -> String {
    match seen.disk_bytes {
        0 => String::new(),
        bytes => format!("{:.1} MiB of disks, ", mib(bytes)),
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1_048_576.0
}

/// A bar of all that is sent, which grows with each round.
fn show(bar: &mut Option<(Progress, u64)>, status: &Value) {
    let bytes = |name| status.get(name).and_then(Value::as_u64).unwrap_or(0);
    let done = bytes("sent_bytes") + bytes("disk_sent_bytes");
    let left = bytes("left_bytes") + bytes("disk_left_bytes");
    if done + left == 0 {
        return;
    }
    let (bar, shown) = bar.get_or_insert_with(|| (Progress::new("migration", done + left), 0));
    bar.is_of(done + left);
    bar.add(done.saturating_sub(*shown));
    *shown = done.max(*shown);
}
