//! Monitors that are started a few at a time, and stopped all at once.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::places::Places;
use crate::client::{Client, ClientError};
use crate::deadline::Deadline;
use crate::disk::Progress;
use crate::ladder::Rung;
use crate::name::Name;
use crate::run::monitor::{Files, Launch, Monitor, MonitorError, Tie};
use crate::run::{Step, log_tail};
use crate::runtime_dir::{AtTheEnd, RuntimeDir};
use crate::signals::Signals;

/// How many are started at a time for each processor: one waits for the kernel while the other computes.
const STARTED_PER_PROCESSOR: usize = 2;
/// And at most.
const STARTED_AT_ONCE_MAX: usize = 32;

/// How monitors are started.
pub(super) struct Fleet<'a> {
    /// Their program.
    pub(super) program: &'a Path,
    /// What it gets beside its name, its socket and its log.
    pub(super) more_arguments: &'a [OsString],
    /// What each is told.
    pub(super) step: &'a Step,
    /// And of what each has for itself.
    pub(super) places: &'a Places,
    /// The directory for what guests say.
    pub(super) consoles: Option<&'a Path>,
    /// They end it.
    pub(super) signals: &'a Signals,
    /// Whether the others are started when one is not.
    pub(super) keeps_going: bool,
}

/// A place for a machine.
pub(super) struct Berth {
    pub(super) number: u16,
    pub(super) name: Name,
    pub(super) dir: RuntimeDir,
}

/// What came of it, each in the order of the numbers.
pub(super) struct Started {
    pub(super) running: Vec<Running>,
    pub(super) failed: Vec<Failed>,
}

/// A machine that runs; killed when it is dropped, and nothing of it is left then.
pub(super) struct Running {
    /// Dropped before its directory.
    monitor: Monitor,
    number: u16,
    name: Name,
    dir: RuntimeDir,
    console: Option<PathBuf>,
    loaded_after: Duration,
}

/// A machine that was not started; nothing is left of it.
pub(super) struct Failed {
    number: u16,
    pub(super) name: Name,
    pub(super) error: Box<StartError>,
    /// The last lines of its monitor's log.
    pub(super) log: Vec<String>,
}

/// A machine that was left to itself.
pub(super) struct Clone {
    pub(super) name: Name,
    pub(super) pid: i32,
    pub(super) socket: PathBuf,
    /// From the start of the process to the answer that it goes on.
    pub(super) loaded_after: Duration,
}

/// Why a machine was not started.
#[derive(Debug, Error)]
pub(crate) enum StartError {
    #[error("cannot write {}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error("its monitor refuses: {0}")]
    Refused(String),
    #[error("its monitor does not load the snapshot")]
    Load(#[source] ClientError),
}

impl Fleet<'_> {
    /// Starts a machine in each berth; when one cannot be, only those that have begun are.
    pub(super) fn start(&self, berths: Vec<Berth>) -> Started {
        let bar = Progress::of_pieces("clones", berths.len() as u64);
        let at_once = thread::available_parallelism().map_or(1, usize::from) * STARTED_PER_PROCESSOR;
        let at_once = at_once.min(STARTED_AT_ONCE_MAX).min(berths.len());
        let waiting = Mutex::new(berths.into_iter());
        let outcomes = Mutex::new(Vec::new());
        let is_over = AtomicBool::new(false);
        let work = || {
            while !is_over.load(Ordering::Relaxed) {
                let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(berth) = next else { break };
                let outcome = self.start_one(berth);
                let ends_it = outcome.is_err() && !self.keeps_going;
                if ends_it || self.signals.is_ringing().unwrap_or(true) {
                    is_over.store(true, Ordering::Relaxed);
                }
                outcomes
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(outcome);
                bar.add(1);
            }
        };
        thread::scope(|scope| {
            for _ in 1..at_once {
                scope.spawn(work);
            }
            work();
        });
        let mut started = Started {
            running: Vec::new(),
            failed: Vec::new(),
        };
        for outcome in outcomes.into_inner().unwrap_or_else(PoisonError::into_inner) {
            match outcome {
                Ok(running) => started.running.push(running),
                Err(failed) => started.failed.push(failed),
            }
        }
        started.running.sort_by_key(|running| running.number);
        started.failed.sort_by_key(|failed| failed.number);
        started
    }

    fn start_one(&self, berth: Berth) -> Result<Running, Failed> {
        let Berth { number, name, dir } = berth;
        let console = self
            .consoles
            .map(|directory| directory.join(format!("{name}.log")));
        let step = self.places.told(self.step, number, &dir);
        match self.load(&step, &name, &dir, console.as_deref()) {
            Ok((monitor, loaded_after)) => Ok(Running {
                monitor,
                number,
                name,
                dir,
                console,
                loaded_after,
            }),
            Err(error) => Err(Failed {
                number,
                name,
                log: match error {
                    StartError::Refused(_) => Vec::new(),
                    _ => log_tail(&dir.log()),
                },
                error: Box::new(error),
            }),
        }
    }

    fn load(
        &self,
        step: &Step,
        name: &Name,
        dir: &RuntimeDir,
        console: Option<&Path>,
    ) -> Result<(Monitor, Duration), StartError> {
        let launch = Launch {
            program: self.program,
            dir,
            name,
            more_arguments: self.more_arguments,
            tie: Tie::Alone,
        };
        let files = Files {
            input: Stdio::null(),
            output: match console {
                Some(path) => File::create(path).map_err(file_error(path))?.into(),
                None => Stdio::null(),
            },
            // Its last words go where people look for them.
            errors: appended(&dir.log())?.into(),
        };
        let begun = Instant::now();
        let mut monitor = Monitor::start(launch, files)?;
        let socket = dir.socket();
        let client = Client::new(&socket).interrupted_by(self.signals.as_fd());
        monitor.await_api(&client, self.signals)?;
        let loaded = client.send("PUT", &step.path, &step.body);
        loaded.map_err(|error| match error {
            ClientError::Refused { fault, .. } => StartError::Refused(fault),
            other => StartError::Load(other),
        })?;
        Ok((monitor, begun.elapsed()))
    }
}

impl Running {
    /// Lets it run on by itself.
    pub(super) fn leave(self) -> Clone {
        let pid = self.monitor.process().pid().as_raw_nonzero().get();
        self.monitor.leave();
        let dir = self.dir.then(AtTheEnd::Leave);
        Clone {
            name: self.name,
            pid,
            socket: dir.socket(),
            loaded_after: self.loaded_after,
        }
    }
}

/// Ends all of them, and removes what they have left.
pub(super) fn stop(running: Vec<Running>) {
    let rung = Rung::Monitor;
    for running in &running {
        // One that cannot be asked is killed below.
        let _ = rung.take(&Client::new(&running.dir.socket()), running.monitor.process());
    }
    let deadline = Deadline::after(rung.wait(Duration::ZERO));
    for running in running {
        let _ = running.monitor.process().wait(deadline);
        if let Some(console) = &running.console {
            // Whoever has moved it away may keep it.
            let _ = fs::remove_file(console);
        }
    }
}

fn appended(path: &Path) -> Result<File, StartError> {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.map_err(file_error(path))
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> StartError {
    let path = path.to_owned();
    |source| StartError::File { path, source }
}
