//! `coraclectl run IMAGE -- COMMAND`: a guest that is made for one command, and is gone with it.
//!
//! ```text
//! IMAGE ──► overlay in memory ──► disk vda ─┐
//! coracle-agent ──► initial RAM disk ──► kernel ──► agent: mounts vda, moves into it ──► runs COMMAND
//!                       (or a warm snapshot) ─────────┘ ▲ vsock
//! standard input, output, error, signals ◄──────────────┘
//! ```

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Stdio};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use coracle_agent::wire::{PORT, Request, SEED_BYTES};
use thiserror::Error;

use super::image::{self, ImageError};
use super::machine::{self, MachineError, Step};
use super::monitor::{Files, Monitor, MonitorError};
use super::session::{Session, SessionError};
use super::warm::{Making, Warm, WarmError};
use super::{RunArgs, initrd, last_lines, unused_name};
use crate::client::Client;
use crate::deadline::Deadline;
use crate::guest::{CopyError, Done, ExecError, Link, LinkError, Ran, STATUS_LATE, Terms, converse, fetch};
use crate::ladder::Rung;
use crate::name::Name;
use crate::output::{Format, note, note_json, report};
use crate::runtime_dir::{RuntimeDir, RuntimeDirError, RuntimeRoot};
use crate::signals::{Signals, SignalsError, status_of};

/// Between two attempts to reach the agent of a guest that boots.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(10);
/// How much of the console is worth keeping, and how long the rest of it may take.
const TAIL_BYTES: usize = 4096;
const TAIL_WAIT: Duration = Duration::from_millis(200);
const AGENT: &str = "coracle-agent";
/// No file system fits, so the agent waits for more.
const PLACEHOLDER_BYTES: u64 = 512;

/// What the machine has that is made for its command.
pub(super) struct Disposable {
    /// An initial RAM disk with the agent in it.
    pub(super) initrd: PathBuf,
    /// Its root.
    pub(super) root: Root,
    /// The socket of its vsock device.
    pub(super) vsock: PathBuf,
}

/// The root of a machine that is made for its command.
pub(super) enum Root {
    /// An overlay over this image.
    Image(String),
    /// Not there yet: a disk that holds its place.
    Placeholder(PathBuf),
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
    #[error(transparent)]
    Warm(#[from] WarmError),
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
    #[error(
        "the guest has ended before its agent was there: it has gone on from the warm snapshot {}, which is made anew once it is \
         removed", .0.display()
    )]
    WarmEnded(PathBuf),
    #[error("the guest's agent is not there after {0} s: --boot-timeout SECONDS waits longer")]
    NotThere(u64),
    #[error("the guest cannot use {device} as its root: {why}")]
    Root { device: String, why: String },
    #[error("there are no random numbers for the guest")]
    Random(#[source] io::Error),
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
    let (name, dir) = args.foreground.place()?;
    let begun = Instant::now();
    let ran = begin(args, image, (&name, &dir), request, format, &signals);
    args.foreground.tell_what_is_kept(&dir);
    let (status, stopped_by) = match ran {
        Err(error) => match error.signal(&signals) {
            Some(signal) => (status_of(signal), Some("signal")),
            None if error.is_late() => {
                report(&error, format);
                (STATUS_LATE, Some("timeout"))
            }
            None => return Err(error),
        },
        Ok(Ran::Ended(status)) => (status, None),
        Ok(Ran::GivenUp(status)) if status == status_of(libc::SIGPIPE) => (status, Some("output")),
        Ok(Ran::GivenUp(status)) => (status, Some("signal")),
        Ok(ran @ Ran::Late { .. }) => (ran.status(), Some("timeout")),
    };
    if format == Format::Json {
        note_json(&serde_json::json!({
            "id": name.as_str(),
            "status": status,
            "ended": if stopped_by.is_some() { "stopped" } else { "command" },
            "stopped_by": stopped_by,
            "seconds": begun.elapsed().as_secs_f64(),
        }));
    }
    Ok(status)
}

fn begin(
    args: &RunArgs,
    image: &str,
    (name, dir): (&Name, &RuntimeDir),
    request: coracle_agent::wire::Exec,
    format: Format,
    signals: &Signals,
) -> Result<Ran, CommandError> {
    let (image, vsock) = (
        image::prepare(image, dir.path(), signals)?,
        dir.path().join("vsock"),
    );
    let warm = args.disposable.warm.as_deref();
    let warm = warm.map(|directory| Warm::new(args, directory)).transpose()?;
    if let Some(warm) = &warm
        && let Some(making) = warm.claim(signals)?
    {
        warm.remove_stale();
        save(args, &making, format, signals)?;
        making.finish(args, warm)?;
    }
    let warm_path = warm.as_ref().map(Warm::path);
    let machine = Machine {
        args,
        dir,
        vsock: &vsock,
        warm: warm_path.as_deref(),
        signals,
        format,
    };
    let (steps, start) = match &warm {
        Some(warm) => (Vec::new(), warm.load(args, &image, &vsock)?),
        None => (machine.boots(Root::Image(image))?, machine::start()),
    };
    machine.live(name, &steps, &start, |guest| guest.run(request))
}

/// Boots a guest until its agent waits for a root, and saves it.
fn save(args: &RunArgs, making: &Making, format: Format, signals: &Signals) -> Result<(), CommandError> {
    let name = unused_name("warm");
    let dir = RuntimeRoot::of_this_user().create(&name)?;
    let disk = dir.path().join("disk");
    let written = File::create(&disk).and_then(|file| file.set_len(PLACEHOLDER_BYTES));
    written.map_err(|source| CommandError::Write {
        path: disk.clone(),
        source,
    })?;
    let machine = Machine {
        args,
        dir: &dir,
        vsock: &dir.path().join("vsock"),
        warm: None,
        signals,
        format,
    };
    let steps = machine.boots(Root::Placeholder(disk))?;
    machine.live(&name, &steps, &machine::start(), |guest| {
        drop(guest.reach(None)?);
        let client = Client::new(&dir.socket());
        Ok(making.save(&client.interrupted_by(signals.as_fd()))?)
    })
}

/// A machine that is to be started.
#[derive(Clone, Copy)]
struct Machine<'a> {
    args: &'a RunArgs,
    dir: &'a RuntimeDir,
    vsock: &'a Path,
    /// The snapshot that it goes on from.
    warm: Option<&'a Path>,
    signals: &'a Signals,
    format: Format,
}

impl Machine<'_> {
    /// The requests after which it can boot.
    fn boots(&self, root: Root) -> Result<Vec<Step>, CommandError> {
        let made = Disposable {
            initrd: write_initrd(self.args, self.dir.path())?,
            root,
            vsock: self.vsock.to_owned(),
        };
        Ok(machine::steps(self.args, Some(&made))?)
    }

    /// Lives for as long as `work` takes. If that ends with its guest, what the guest has said last is told.
    fn live<T>(
        self,
        name: &Name,
        steps: &[Step],
        start: &Step,
        work: impl FnOnce(&Guest<'_>) -> Result<T, CommandError>,
    ) -> Result<T, CommandError> {
        let files = Files {
            input: Stdio::null(),
            output: Stdio::piped(),
            errors: match self.format {
                Format::Json => Stdio::null(),
                Format::Text => Stdio::inherit(),
            },
        };
        let foreground = &self.args.foreground;
        let mut started = foreground.start(name, self.dir, files)?;
        let console = started.take_stdout().map(Tail::listen);
        let guest_wait = Duration::from_secs(foreground.stop_timeout);
        let session = Session::new(started, &self.dir.socket(), self.signals, guest_wait);
        // From here whatever ends this function kills the machine.
        let guest = Guest {
            machine: self,
            monitor: session.start(steps, start)?,
        };
        let done = work(&guest);
        if done.as_ref().is_err_and(CommandError::is_of_the_guest) {
            for line in console.map(Tail::lines).unwrap_or_default() {
                match self.format {
                    Format::Json => note_json(&serde_json::json!({ "console": line })),
                    Format::Text => note(format_args!("guest's console: {line}")),
                }
            }
        }
        done
    }
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
                | Self::WarmEnded(_)
                | Self::NotThere(_)
                | Self::Link(LinkError::Closed)
                | Self::Exec(ExecError::Link(LinkError::Closed))
                | Self::Copy(CopyError::Link(LinkError::Closed))
        )
    }

    /// Whether it is because the time was over.
    fn is_late(&self) -> bool {
        matches!(
            self,
            Self::Link(LinkError::Late)
                | Self::Exec(ExecError::Link(LinkError::Late))
                | Self::Copy(CopyError::Link(LinkError::Late))
        )
    }

    /// What has interrupted it, if it was that.
    fn signal(&self, signals: &Signals) -> Option<i32> {
        match self {
            Self::Image(ImageError::Interrupted(signal))
            | Self::Link(LinkError::Interrupted(signal))
            | Self::Exec(ExecError::Link(LinkError::Interrupted(signal)))
            | Self::Copy(CopyError::Link(LinkError::Interrupted(signal))) => Some(*signal),
            Self::Warm(WarmError::Interrupted(signal)) => Some(*signal),
            // Its requests are broken off by a signal, which nobody has taken.
            Self::Session(_) | Self::Warm(WarmError::Save(_)) => signals.take(),
            _ => None,
        }
    }
}

fn random() -> io::Result<[u8; SEED_BYTES]> {
    let mut bytes = [0; SEED_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn unix_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}

/// The agent's program: the one that was named, or the one beside this program.
pub(super) fn agent(args: &RunArgs) -> PathBuf {
    let beside = || {
        let agent = std::env::current_exe().ok()?.with_file_name(AGENT);
        agent.is_file().then_some(agent)
    };
    let given = args.disposable.agent.clone();
    given.or_else(beside).unwrap_or_else(|| PathBuf::from(AGENT))
}

fn write_initrd(args: &RunArgs, place: &Path) -> Result<PathBuf, CommandError> {
    let agent = agent(args);
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

/// The guest of a machine that has been started.
struct Guest<'a> {
    machine: Machine<'a>,
    monitor: Monitor,
}

impl Guest<'_> {
    fn run(&self, request: coracle_agent::wire::Exec) -> Result<Ran, CommandError> {
        let Machine {
            args,
            signals,
            format,
            ..
        } = self.machine;
        let given = &args.disposable;
        let device = given.root_device.clone();
        let patience = Duration::from_secs(args.foreground.stop_timeout);
        let time = given.timeout.map(Duration::from_secs);
        let (until, end) = (
            time.map(Deadline::after),
            time.map(|time| Deadline::after(time + patience)),
        );
        let mut link = self.reach(until)?.limited(end);
        // Now, and not when it began to boot.
        let root = Request::Root(coracle_agent::wire::Root {
            device: device.clone(),
            is_one_of_many: given.warm.is_some(),
            seed: random().map_err(CommandError::Random)?,
            unix_ns: unix_ns(),
        });
        if let Done::No(why) = link.settle(root, signals)? {
            return Err(CommandError::Root { device, why });
        }
        let terms = Terms::of(given.surroundings.is_deaf(), format).limited(until, patience);
        let ran = converse(self.reach(until)?, signals, request, terms);
        // A guest that has not heard of a signal may not hear of this either.
        let limit = match ran {
            Ok(Ran::Ended(_)) => end,
            _ => Some(Deadline::after(patience)),
        };
        // Each of these whatever has become of the other, and of the command.
        let copied = match ran {
            Ok(Ran::Ended(_) | Ran::Late { has_ended: true }) => self.copy_out(limit),
            _ => Ok(()),
        };
        // Which has its own time, however long it took to copy.
        let synced = self.sync_disks(limit.map(|_| Deadline::after(patience)));
        let ran = ran?;
        if let (Ran::Late { .. }, Some(seconds), Format::Text) = (ran, given.timeout, format) {
            note(format_args!(
                "the command was not done in {seconds} s (--timeout)"
            ));
        }
        match copied.and(synced) {
            Err(error) if ran.status() != 0 => {
                report(&error, format);
                Ok(ran)
            }
            done => done.map(|()| ran),
        }
    }

    fn copy_out(&self, limit: Option<Deadline>) -> Result<(), CommandError> {
        let mut first = Ok(());
        let Machine { args, signals, .. } = self.machine;
        for Fetched { from, to } in &args.disposable.copy_out {
            let name = Path::new(from).file_name().and_then(|name| name.to_str());
            let link = self.reach(limit)?.limited(limit);
            let fetched = fetch(link, signals, from, to, name.unwrap_or_default());
            first = first.and(fetched.map(drop).map_err(CommandError::from));
        }
        first
    }

    /// What was written to disks that stay is on them when this is done.
    fn sync_disks(&self, limit: Option<Deadline>) -> Result<(), CommandError> {
        let Machine {
            args,
            dir,
            vsock,
            signals,
            ..
        } = self.machine;
        if args.disk.is_empty() && args.pmem.is_empty() {
            return Ok(());
        }
        let link = Link::reach(vsock, PORT, limit, signals).map_err(|error| match error {
            LinkError::Slow { .. } if limit.is_some_and(Deadline::passed) => LinkError::Late,
            error => error,
        });
        let mut link = link?.limited(limit);
        if let Done::No(why) = link.settle(Request::Sync, signals)? {
            return Err(CommandError::NotSynced(why));
        }
        // It drains its disks.
        let (rung, client) = (Rung::Monitor, Client::new(&dir.socket()));
        if rung.take(&client, self.monitor.process()).is_ok() {
            let limit = Deadline::after(rung.wait(Duration::ZERO));
            self.monitor.process().wait(limit).map_err(MonitorError::from)?;
        }
        Ok(())
    }

    /// The agent, when it is there; it is waited for until the guest should have booted, or has no more time.
    fn reach(&self, until: Option<Deadline>) -> Result<Link, CommandError> {
        let Machine {
            args, vsock, signals, ..
        } = self.machine;
        let seconds = args.disposable.boot_timeout;
        let deadline = Deadline::after(Duration::from_secs(seconds));
        loop {
            match Link::reach(vsock, PORT, until, signals) {
                Err(
                    LinkError::NoAgent { .. }
                    | LinkError::Slow { .. }
                    | LinkError::Closed
                    | LinkError::Connect { .. }
                    | LinkError::Io(_),
                ) => {}
                reached => return Ok(reached?),
            }
            let now = Deadline::after(Duration::ZERO);
            if self.monitor.process().wait(now).map_err(MonitorError::from)? {
                return Err(match self.machine.warm {
                    Some(path) => CommandError::WarmEnded(path.to_owned()),
                    None => CommandError::GuestEnded,
                });
            }
            if deadline.passed() {
                return Err(CommandError::NotThere(seconds));
            }
            if until.is_some_and(Deadline::passed) {
                return Err(LinkError::Late.into());
            }
            if let Some(signal) = signals.take() {
                return Err(LinkError::Interrupted(signal).into());
            }
            thread::sleep(ATTEMPT_PAUSE);
        }
    }
}
