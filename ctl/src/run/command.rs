//! `coraclectl run IMAGE -- COMMAND`: a guest that is made for one command, and is gone with it.
//!
//! ```text
//! IMAGE ──► overlay in memory ──► disk vda ─┐
//! coracle-agent ──► initial RAM disk ──► kernel ──► agent: mounts vda, moves into it ──► runs COMMAND
//!                                                     ▲ vsock
//! standard input, output, error, signals ◄────────────┘
//! ```

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Stdio};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use coracle_agent::wire::{PORT, Request};
use thiserror::Error;

use super::image::{self, ImageError};
use super::machine::{self, MachineError};
use super::monitor::{Files, Monitor, MonitorError};
use super::session::{Session, SessionError};
use super::{RunArgs, initrd, last_lines};
use crate::client::Client;
use crate::deadline::Deadline;
use crate::guest::{CopyError, Done, ExecError, Link, LinkError, Ran, converse, fetch};
use crate::ladder::Rung;
use crate::output::{Format, note, note_json, report};
use crate::runtime_dir::{RuntimeDir, RuntimeDirError};
use crate::signals::{Signals, SignalsError, status_of};

/// Between two attempts to reach the agent of a guest that boots.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(10);
/// How much of the console is worth keeping, and how long the rest of it may take.
const TAIL_BYTES: usize = 4096;
const TAIL_WAIT: Duration = Duration::from_millis(200);
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
    match begin(args, image, format, &signals) {
        Err(error) => error
            .signal(&signals)
            .map_or(Err(error), |signal| Ok(status_of(signal))),
        ran => ran,
    }
}

fn begin(args: &RunArgs, image: &str, format: Format, signals: &Signals) -> Result<u8, CommandError> {
    let request = args.disposable.surroundings.of(&args.command)?;
    let (name, dir) = args.foreground.place()?;
    let made = Disposable {
        initrd: write_initrd(args, dir.path())?,
        image: image::prepare(image, dir.path(), signals)?,
        vsock: dir.path().join("vsock"),
    };
    let steps = machine::steps(args, Some(&made))?;
    let files = Files {
        input: Stdio::null(),
        output: Stdio::piped(),
        errors: match format {
            Format::Json => Stdio::null(),
            Format::Text => Stdio::inherit(),
        },
    };
    let mut started = args.foreground.start(&name, &dir, files)?;
    let console = started.take_stdout().map(Tail::listen);
    let guest_wait = Duration::from_secs(args.foreground.stop_timeout);
    let session = Session::new(started, &dir.socket(), signals, guest_wait);
    // From here whatever ends this function kills the machine.
    let monitor = session.start(&steps, &machine::start())?;
    let guest = Guest {
        args,
        dir: &dir,
        vsock: &made.vsock,
        signals,
        monitor: &monitor,
    };
    let ran = guest.run(request, format);
    if ran.as_ref().is_err_and(CommandError::is_of_the_guest) {
        for line in console.map(Tail::lines).unwrap_or_default() {
            match format {
                Format::Json => note_json(&serde_json::json!({ "console": line })),
                Format::Text => note(format_args!("guest's console: {line}")),
            }
        }
    }
    args.foreground.tell_what_is_kept(&dir);
    ran
}

/// The last of what a guest says on its console, whatever that is: nobody is waited for, and nothing else is kept.
struct Tail {
    said: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Tail {
    fn listen(mut console: ChildStdout) -> Self {
        let said = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&said);
        let reader = thread::spawn(move || {
            let mut piece = [0; TAIL_BYTES];
            while let Ok(read @ 1..) = console.read(&mut piece) {
                let mut said = theirs.lock().unwrap_or_else(PoisonError::into_inner);
                said.extend(piece.iter().take(read));
                let excess = said.len().saturating_sub(TAIL_BYTES);
                said.drain(..excess);
            }
        });
        Self { said, reader }
    }

    /// Its last lines; all that an ended monitor has passed on.
    fn lines(self) -> Vec<String> {
        let limit = Deadline::after(TAIL_WAIT);
        while !self.reader.is_finished() && !limit.passed() {
            thread::sleep(ATTEMPT_PAUSE);
        }
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        last_lines(&String::from_utf8_lossy(&said))
    }
}

impl CommandError {
    /// Whether the guest's console may say more.
    fn is_of_the_guest(&self) -> bool {
        matches!(
            self,
            Self::GuestEnded
                | Self::NotThere(_)
                | Self::Link(LinkError::Closed)
                | Self::Exec(ExecError::Link(LinkError::Closed))
                | Self::Copy(CopyError::Link(LinkError::Closed))
        )
    }

    /// What has interrupted it, if it was that.
    fn signal(&self, signals: &Signals) -> Option<i32> {
        match self {
            Self::Image(ImageError::Interrupted(signal))
            | Self::Link(LinkError::Interrupted(signal))
            | Self::Exec(ExecError::Link(LinkError::Interrupted(signal)))
            | Self::Copy(CopyError::Link(LinkError::Interrupted(signal))) => Some(*signal),
            // Its requests are broken off by a signal, which nobody has taken.
            Self::Session(_) => signals.take(),
            _ => None,
        }
    }
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
    monitor: &'a Monitor,
}

impl Guest<'_> {
    fn run(&self, request: coracle_agent::wire::Exec, format: Format) -> Result<u8, CommandError> {
        let given = &self.args.disposable;
        let device = given.root_device.clone();
        let root = Request::Root {
            device: device.clone(),
        };
        let mut link = self.reach()?;
        if let Done::No(why) = link.settle(root, self.signals)? {
            return Err(CommandError::Root { device, why });
        }
        let ran = converse(
            self.reach()?,
            self.signals,
            request,
            given.surroundings.is_deaf(),
            format,
        );
        // Each of these whatever has become of the other, and of the command.
        let copied = match ran {
            Ok(Ran::Ended(_)) => self.copy_out(),
            _ => Ok(()),
        };
        let synced = self.sync_disks();
        let status = ran?.status();
        match copied.and(synced) {
            Err(error) if status != 0 => {
                report(&error, format);
                Ok(status)
            }
            done => done.map(|()| status),
        }
    }

    fn copy_out(&self) -> Result<(), CommandError> {
        let mut first = Ok(());
        for Fetched { from, to } in &self.args.disposable.copy_out {
            let name = Path::new(from).file_name().and_then(|name| name.to_str());
            let link = self.reach()?;
            let fetched = fetch(link, self.signals, from, to, name.unwrap_or_default());
            first = first.and(fetched.map(drop).map_err(CommandError::from));
        }
        first
    }

    /// What was written to disks that stay is on them when this is done.
    fn sync_disks(&self) -> Result<(), CommandError> {
        if self.args.disk.is_empty() {
            return Ok(());
        }
        let mut link = Link::reach(self.vsock, PORT, self.signals)?;
        if let Done::No(why) = link.settle(Request::Sync, self.signals)? {
            return Err(CommandError::NotSynced(why));
        }
        // It drains its disks.
        let (rung, client) = (Rung::Monitor, Client::new(&self.dir.socket()));
        if rung.take(&client, self.monitor.process()).is_ok() {
            let limit = Deadline::after(rung.wait(Duration::ZERO));
            self.monitor.process().wait(limit).map_err(MonitorError::from)?;
        }
        Ok(())
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
            if let Some(signal) = self.signals.take() {
                return Err(LinkError::Interrupted(signal).into());
            }
            thread::sleep(ATTEMPT_PAUSE);
        }
    }
}
