//! `coraclectl clone`: many machines from one snapshot.
//!
//! ```text
//!   state, memory ──read and checked once──► sealed, in memory ──► monitor 1: maps it, copy-on-write
//!                                                             ├──► monitor 2
//!                                                             └──► …
//! ```

mod disks;
mod fleet;
mod places;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use coracle_storage::lease::Owner;
use coracle_vmm::config::Disks;
use coracle_vmm::keys::{KeyError, ReadingKeys};
use coracle_vmm::snapshot::files::{Files, Reader};
use coracle_vmm::snapshot::memory::Progress;
use coracle_vmm::snapshot::sealed::{SealError, Sealed};
use serde_json::{Value, json};
use thiserror::Error;

use self::disks::DisksError;
use self::fleet::{Berth, Clone, Failed, Fleet, Running, StartError, Started};
use self::places::{Places, PlacesError};
use crate::here::named;
use crate::name::{Name, NameError};
use crate::output::{Format, OutputError, causes, joined, note, note_json, path_text, print, print_json};
use crate::run::monitor;
use crate::runtime_dir::{RuntimeDirError, RuntimeRoot};
use crate::signals::{Signals, SignalsError, status_of};
use crate::snapshot::load::{Load, LoadOptions, VerifyMode};
use crate::snapshot::memory_path;
use crate::snapshot::progress::shown;
use crate::table::Table;

/// Go on from a snapshot with many machines at once, in the background
///
/// State and memory are read and checked once, and held where nobody can change them; the clones share that memory, and each has
/// what it writes for itself. A clone has a name, a generation ID and random numbers of its own. When all of them run (or, if one
/// cannot be started, none), coraclectl ends; `ps`, `info` and `stop` know them by their names.
///
/// The disks stay as they are: each clone writes to temporary overlays over them. So nobody may write them meanwhile, or have
/// written them since; the machine that was saved has to have ended, unless its disks are read-only or in the snapshot.
#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// The state file: a path, or nfs://HOST/EXPORT/FILE; or the directory of a snapshot that includes its disks
    state: String,
    /// The memory file: a path, or nfs://HOST/EXPORT/FILE; that in the directory if absent
    memory: Option<String>,
    /// How many machines
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=COUNT_MAX))]
    count: u16,
    /// What they are called: this, a hyphen and a number from 1 [default: clone- and the process id]
    #[arg(long, value_name = "NAME")]
    name_prefix: Option<Name>,
    /// The taps of the clones for the network interface ID: TAP has a `{}`, in whose place each clone has its number; may be
    /// given for each interface. A tap is one machine's
    #[arg(long = "net", value_name = "ID=TAP", value_parser = named)]
    nets: Vec<(String, String)>,
    /// The sockets of the clones' vsock devices: PATH has a `{}`, in whose place each clone has its number [default: `v.sock` in
    /// each one's runtime directory]
    #[arg(long, value_name = "PATH")]
    vsock: Option<String>,
    /// Keep those that have started when one cannot be
    #[arg(long)]
    keep_going: bool,
    /// Keep what each guest says on its console in a file DIRECTORY/NAME.log, however long it gets [default: nowhere]
    #[arg(long, value_name = "DIRECTORY")]
    console: Option<PathBuf>,
    /// Refuse what no key in this file has signed: Ed25519 public keys in PEM, one after the other. (One that is encrypted cannot
    /// be cloned.)
    #[arg(long, value_name = "FILE")]
    trusted_keys: Option<PathBuf>,
    #[command(flatten)]
    options: LoadOptions,
    /// The monitor's program [default: `coracle` beside coraclectl, then in PATH]
    #[arg(long, value_name = "PATH", env = "CORACLE_MONITOR")]
    monitor: Option<PathBuf>,
    /// One more argument for each monitor, such as --monitor-arg=--no-seccomp
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    monitor_arg: Vec<OsString>,
}

/// More than a host of today has memory for.
const COUNT_MAX: i64 = 1_000;
/// Who reads the snapshot, for whoever asks the storage.
const OWNER: &str = "coraclectl";

/// Why there are no clones, or not all of them.
#[derive(Debug, Error)]
pub(crate) enum CloneError {
    #[error(transparent)]
    Keys(#[from] KeyError),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error(transparent)]
    Disks(#[from] DisksError),
    #[error(transparent)]
    Places(#[from] PlacesError),
    #[error("there is no name for clone {number}: choose a shorter --name-prefix")]
    Name {
        number: u16,
        #[source]
        source: NameError,
    },
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    #[error(transparent)]
    Signals(#[from] SignalsError),
    #[error("{name} cannot be started; {stopped} others were, and are stopped (--keep-going keeps them)")]
    NotStarted {
        name: Name,
        stopped: usize,
        #[source]
        source: Box<StartError>,
    },
    #[error("{failed} of {count} clones cannot be started")]
    SomeNotStarted { failed: usize, count: u16 },
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Carries it out; returns the exit status.
///
/// # Errors
///
/// When one cannot be started; then none runs, unless asked otherwise.
pub(crate) fn clone(args: &CloneArgs, format: Format) -> Result<u8, CloneError> {
    let owner = Owner::of_this_process(OWNER);
    let sealed = sealed(args, &owner)?;
    // Until all clones have them as well.
    let _disks = disks::hold(&sealed.snapshot, &owner)?;
    let config = &sealed.snapshot.config;
    if let Some(path) = config
        .serial()
        .and_then(|serial| serial.serial_out_path.as_deref())
    {
        note(format_args!(
            "all clones write what their guests say to {}, as the snapshot's machine did",
            path.display()
        ));
    }
    let places = Places::of(args, config)?;
    // Before anything is started: a name that is taken is said at once.
    let berths = berths(args)?;
    let signals = Signals::watch()?;
    let state = sealed.state_path();
    let load = Load {
        state: &state,
        memory: sealed.memory_path(),
        // It was checked above, and nobody has changed it since.
        verify: VerifyMode::Off,
        disks: Disks::Clone,
        here: None,
        keys: None,
        options: &args.options,
    };
    let fleet = Fleet {
        program: &monitor::program(args.monitor.as_deref()),
        more_arguments: &args.monitor_arg,
        step: &load.step(),
        places: &places,
        consoles: args.console.as_deref(),
        signals: &signals,
        keeps_going: args.keep_going,
    };
    let started = fleet.start(berths);
    if let Some(signal) = signals.take() {
        note("interrupted: the clones are stopped");
        fleet::stop(started.running);
        return Ok(status_of(signal));
    }
    settle(args, format, started)
}

fn sealed(args: &CloneArgs, owner: &Owner) -> Result<Sealed, CloneError> {
    let files = Files {
        state: &args.state,
        memory: &memory_path(&args.state, args.memory.as_ref()),
    };
    let progress = Progress::new();
    let reader = Reader {
        owner,
        keys: &ReadingKeys::read(args.trusted_keys.as_deref(), None)?,
    };
    Ok(shown("check", &progress, || files.seal(&reader, &progress))?)
}

fn berths(args: &CloneArgs) -> Result<Vec<Berth>, CloneError> {
    let root = RuntimeRoot::of_this_user();
    let prefix = args.name_prefix.as_ref().map_or_else(
        || format!("clone-{}", std::process::id()),
        |prefix| prefix.as_str().to_owned(),
    );
    let berth = |number| {
        let name = format!("{prefix}-{number}").parse::<Name>();
        let name = name.map_err(|source| CloneError::Name { number, source })?;
        let dir = root.create(&name)?;
        Ok(Berth { number, name, dir })
    };
    (1..=args.count).map(berth).collect()
}

/// Leaves those that run to themselves, or stops them if one does not and that is not allowed; and says so.
fn settle(args: &CloneArgs, format: Format, started: Started) -> Result<u8, CloneError> {
    let Started { running, failed } = started;
    failed.iter().for_each(|failed| print_log(failed, format));
    if args.keep_going {
        let clones: Vec<Clone> = running.into_iter().map(Running::leave).collect();
        print_clones(&clones, format)?;
        for failed in &failed {
            note_failure(failed, format);
        }
        return match failed.len() {
            0 => Ok(0),
            failed => Err(CloneError::SomeNotStarted {
                failed,
                count: args.count,
            }),
        };
    }
    match failed.into_iter().next() {
        None => {
            let clones: Vec<Clone> = running.into_iter().map(Running::leave).collect();
            print_clones(&clones, format)?;
            Ok(0)
        }
        Some(Failed { name, error, .. }) => {
            let stopped = running.len();
            fleet::stop(running);
            Err(CloneError::NotStarted {
                name,
                stopped,
                source: error,
            })
        }
    }
}

fn print_clones(clones: &[Clone], format: Format) -> Result<(), OutputError> {
    let ms = |clone: &Clone| clone.loaded_after.as_secs_f64() * 1e3;
    if format == Format::Json {
        let clones = clones.iter().map(|clone| {
            json!({
                "id": clone.name.as_str(),
                "pid": clone.pid,
                "loaded_after_ms": ms(clone),
                "socket": path_text(&clone.socket),
            })
        });
        return print_json(&json!({ "clones": clones.collect::<Value>() }));
    }
    let mut table = Table::new(["ID", "PID", "READY AFTER", "SOCKET"]);
    for clone in clones {
        table.push([
            clone.name.to_string(),
            clone.pid.to_string(),
            format!("{:.1} ms", ms(clone)),
            path_text(&clone.socket),
        ]);
    }
    print(table)
}

fn note_failure(failed: &Failed, format: Format) {
    let error = failed.error.as_ref();
    match format {
        Format::Json => note_json(&json!({
            "id": failed.name.as_str(),
            "error": error.to_string(),
            "causes": causes(error).collect::<Value>(),
        })),
        Format::Text => note(format_args!("{}: {}", failed.name, joined(error))),
    }
}

/// What the monitor of a clone that was not started has said.
fn print_log(failed: &Failed, format: Format) {
    let name = &failed.name;
    match format {
        Format::Json if failed.log.is_empty() => {}
        Format::Json => note_json(&json!({ "id": name.as_str(), "monitor_log": failed.log })),
        Format::Text => {
            let lines = failed.log.iter();
            lines.for_each(|line| note(format_args!("log of {name}'s monitor: {line}")));
        }
    }
}
