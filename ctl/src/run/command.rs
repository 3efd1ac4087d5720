//! `coraclectl run IMAGE -- COMMAND`: a guest that is made for one command, and is gone with it.
//!
//! ```text
//! IMAGE ──► overlay in memory ──► disk vda ─┐
//! coracle-agent ──► initial RAM disk ──► kernel ──► agent: mounts vda, moves into it ──► runs COMMAND
//!                                                     ▲ vsock
//! standard input, output, error, signals ◄────────────┘
//! ```

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use coracle_agent::wire::{PORT, Request};
use thiserror::Error;

use super::image::{self, ImageError};
use super::machine::{self, MachineError};
use super::monitor::{self, Files, Launch, Monitor, MonitorError, Tie};
use super::session::{Session, SessionError};
use super::{RunArgs, initrd, log_tail, unused_name};
use crate::client::Client;
use crate::deadline::Deadline;
use crate::guest::{CopyError, Done, ExecError, Link, LinkError, converse, fetch};
use crate::ladder::Rung;
use crate::output::{Format, note, note_json};
use crate::runtime_dir::{AtTheEnd, RuntimeDir, RuntimeDirError, RuntimeRoot};
use crate::signals::{Signals, SignalsError};

/// Between two attempts to reach the agent of a guest that boots.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(10);
const AGENT: &str = "coracle-agent";

/// What the machine has that is made for its command.
pub(super) struct Disposable {
    /// An initial RAM disk with the agent in it.
    pub(super) initrd: PathBuf,
    /// The base of its root.
    pub(super) image: String,
    /// The socket of its vsock device.
    pub(super) vsock: PathBuf,
}

/// What is fetched from the guest when the command has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fetched {
    from: String,
    to: PathBuf,
}

impl FromStr for Fetched {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (from, to) = text.split_once(':').unwrap_or((text, "."));
        if Path::new(from).file_name().is_none() || to.is_empty() {
            return Err("write PATH of the guest, or PATH:PLACE with the place here");
        }
        Ok(Self {
            from: from.to_owned(),
            to: PathBuf::from(to),
        })
    }
}

/// Why a command was not run, or its status not known.
#[derive(Debug, Error)]
pub(crate) enum CommandError {
    #[error("say what to run in the guest: coraclectl run IMAGE -- COMMAND")]
    NoCommand,
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Signals(#[from] SignalsError),
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("cannot read the agent {}: name it with --agent, or put it beside coraclectl", path.display())]
    NoAgent {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the guest has ended before its agent was there")]
    GuestEnded,
    #[error("the guest's agent is not there after {0} s: --boot-timeout SECONDS waits longer")]
    NotThere(u64),
    #[error("the guest cannot use {device} as its root: {why}")]
    Root { device: String, why: String },
    #[error("what was written is not safe: {0}")]
    NotSynced(String),
}

/// Runs the command in a guest of its own; returns its status.
///
/// # Errors
///
/// When there is none. Nothing is left running or lying about in any case.
pub(super) fn run(args: &RunArgs, image: &str, format: Format) -> Result<u8, CommandError> {
    if args.command.is_empty() {
        return Err(CommandError::NoCommand);
    }
    let signals = Signals::watch()?;
    let request = args.disposable.surroundings.of(&args.command)?;
    let name = args.foreground.name.clone().unwrap_or_else(unused_name);
    let at_the_end = if args.foreground.keep {
        AtTheEnd::Keep
    } else {
        AtTheEnd::Remove
    };
    let dir = RuntimeRoot::of_this_user().create(&name)?.then(at_the_end);
    let made = Disposable {
        initrd: write_initrd(args, dir.path())?,
        image: image::prepare(image, dir.path())?,
        vsock: dir.path().join("vsock"),
    };
    let steps = machine::steps(args, Some(&made))?;
    let console = dir.path().join("console");
    let write = |source| CommandError::Write {
        path: console.clone(),
        source,
    };
    let program = monitor::program(args.foreground.monitor.as_deref());
    let files = Files {
        input: Stdio::null(),
        output: File::create(&console).map_err(write)?.into(),
        errors: match format {
            Format::Json => Stdio::null(),
            Format::Text => Stdio::inherit(),
        },
    };
    let more: &[OsString] = &args.foreground.monitor_arg;
    let launch = Launch {
        program: &program,
        dir: &dir,
        name: &name,
        more_arguments: more,
        tie: Tie::Child,
    };
    let started = Monitor::start(launch, files)?;
    let guest_wait = Duration::from_secs(args.foreground.stop_timeout);
    let session = Session::new(started, &dir.socket(), &signals, guest_wait);
    // From here whatever ends this function kills the machine.
    let mut monitor = session.start(&steps, &machine::start())?;
    let mut guest = Guest {
        args,
        dir: &dir,
        vsock: &made.vsock,
        signals: &signals,
        monitor: &mut monitor,
    };
    let ran = guest.run(request, format);
    if matches!(ran, Err(CommandError::GuestEnded | CommandError::NotThere(_))) {
        for line in log_tail(&console) {
            match format {
                Format::Json => note_json(&serde_json::json!({ "console": line })),
                Format::Text => note(format_args!("guest's console: {line}")),
            }
        }
    }
    if args.foreground.keep {
        note(format_args!("kept {}", dir.path().display()));
    }
    ran
}

fn write_initrd(args: &RunArgs, place: &Path) -> Result<PathBuf, CommandError> {
    let beside = || {
        let agent = std::env::current_exe().ok()?.with_file_name(AGENT);
        agent.is_file().then_some(agent)
    };
    let given = args.disposable.agent.clone();
    let agent = given.or_else(beside).unwrap_or_else(|| PathBuf::from(AGENT));
    let program = fs::read(&agent).map_err(|source| CommandError::NoAgent { path: agent, source })?;
    let path = place.join("initrd");
    let write = |source| CommandError::Write {
        path: path.clone(),
        source,
    };
    let mut file = BufWriter::new(File::create(&path).map_err(write)?);
    initrd::write(&program, &mut file)
        .and_then(|()| file.flush())
        .map_err(write)?;
    Ok(path)
}

/// A machine that has been started.
struct Guest<'a> {
    args: &'a RunArgs,
    dir: &'a RuntimeDir,
    vsock: &'a Path,
    signals: &'a Signals,
    monitor: &'a mut Monitor,
}

impl Guest<'_> {
    fn run(&mut self, request: coracle_agent::wire::Exec, format: Format) -> Result<u8, CommandError> {
        let given = &self.args.disposable;
        let device = given.root_device.clone();
        let root = Request::Root {
            device: device.clone(),
        };
        let mut link = self.reach()?;
        if let Done::No(why) = link.settle(root, self.signals)? {
            return Err(CommandError::Root { device, why });
        }
        let status = converse(
            self.reach()?,
            self.signals,
            request,
            given.surroundings.is_deaf(),
            format,
        )?;
        for Fetched { from, to } in &given.copy_out {
            let name = Path::new(from).file_name().and_then(|name| name.to_str());
            fetch(self.reach()?, self.signals, from, to, name.unwrap_or_default())?;
        }
        if !self.args.disk.is_empty() {
            if let Done::No(why) = self.reach()?.settle(Request::Sync, self.signals)? {
                return Err(CommandError::NotSynced(why));
            }
            // It drains its disks.
            let (rung, client) = (Rung::Monitor, Client::new(&self.dir.socket()));
            if rung.take(&client, self.monitor.process()).is_ok() {
                let limit = Deadline::after(rung.wait(Duration::ZERO));
                self.monitor.process().wait(limit).map_err(MonitorError::from)?;
            }
        }
        Ok(status)
    }

    /// The agent, when it is there.
    fn reach(&self) -> Result<Link, CommandError> {
        let seconds = self.args.disposable.boot_timeout;
        let deadline = Deadline::after(Duration::from_secs(seconds));
        loop {
            match Link::reach(self.vsock, PORT, self.signals) {
                Err(
                    LinkError::NoAgent { .. }
                    | LinkError::Closed
                    | LinkError::Connect { .. }
                    | LinkError::Io(_),
                ) => {}
                reached => return Ok(reached?),
            }
            let now = Deadline::after(Duration::ZERO);
            if self.monitor.process().wait(now).map_err(MonitorError::from)? {
                return Err(CommandError::GuestEnded);
            }
            if deadline.passed() {
                return Err(CommandError::NotThere(seconds));
            }
            thread::sleep(ATTEMPT_PAUSE);
        }
    }
}
