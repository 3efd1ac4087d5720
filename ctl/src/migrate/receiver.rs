//! The receiver of a machine, where `coraclectl migrate` starts it.

use std::fs::OpenOptions;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;
use thiserror::Error;

use super::CertsDirectory;
use crate::client::{Client, Request};
use crate::deadline::{Deadline, wait_ready};
use crate::discovery::resolve;
use crate::here::HereArgs;
use crate::name::Name;
use crate::run::log_tail;
use crate::signals::Signals;

/// A receiver that was started for one machine. Dropped before it has the machine, it is ended.
#[derive(Debug)]
pub(super) struct Receiver {
    child: Child,
    place: Place,
    log: PathBuf,
    has_machine: bool,
}

/// How it is found.
#[derive(Debug)]
enum Place {
    /// By its name, on this host.
    Here(String),
    /// Where it was told to listen.
    At(String),
}

/// Why there is no receiver.
#[derive(Debug, Error)]
pub(crate) enum ReceiverError {
    #[error("cannot write {}", path.display())]
    Log {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot start the receiver")]
    Start(#[source] io::Error),
    #[error(
        "the receiver has ended ({status}) before it listened: {}",
        said(log, "it has said nothing")
    )]
    Ended { status: ExitStatus, log: Vec<String> },
    #[error(
        "the receiver does not listen at {place} after {} s: is that where it was told to? {}",
        LISTEN_MAX.as_secs(),
        said(log, "It has said nothing")
    )]
    Silent { place: String, log: Vec<String> },
    #[error("interrupted before the receiver listened; the guest runs on here")]
    Interrupted,
    #[error("cannot watch the receiver")]
    Watch(#[source] io::Error),
}

/// How long it may take to listen: a host that is far away is logged in to.
const LISTEN_MAX: Duration = Duration::from_secs(30);
/// How often that is looked at.
const PERIOD: Duration = Duration::from_millis(50);
/// How long one that is told to end may take.
const END_MAX: Duration = Duration::from_secs(5);

impl Receiver {
    /// One on this host, by the name `name`, which has `elsewhere` what the sender cannot share. What its guest says goes
    /// to `log`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub(super) fn here(
        name: &Name,
        certs: &CertsDirectory,
        elsewhere: &HereArgs,
        log: &Path,
    ) -> Result<Self, ReceiverError> {
        let mut command = Command::new(std::env::current_exe().map_err(ReceiverError::Start)?);
        command.args(["receive", "127.0.0.1:0", "--name", name.as_str(), "--certs"]);
        command.arg(certs.path()).args(elsewhere.arguments());
        Self::start(command, Place::Here(name.to_string()), log)
    }

    /// What the shell makes of `line`, which is to listen at `to`.
    ///
    /// # Errors
    ///
    /// As [`Self::here`].
    pub(super) fn by(line: &str, to: &str, log: &Path) -> Result<Self, ReceiverError> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", line]);
        Self::start(command, Place::At(to.to_owned()), log)
    }

    fn start(mut command: Command, place: Place, log: &Path) -> Result<Self, ReceiverError> {
        let refused = |source| ReceiverError::Log {
            path: log.to_owned(),
            source,
        };
        let file = OpenOptions::new().append(true).create(true).open(log);
        let file = file.map_err(refused)?;
        let also = file.try_clone().map_err(refused)?;
        // In a process group of its own: it outlives this process, and Ctrl-C is not for it.
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(also);
        Ok(Self {
            child: command.spawn().map_err(ReceiverError::Start)?,
            place,
            log: log.to_owned(),
            has_machine: false,
        })
    }

    /// Waits until it listens, and says where.
    ///
    /// # Errors
    ///
    /// When it has ended, does not listen in time, or nobody wants it any more.
    pub(super) fn wait(&mut self, signals: &Signals) -> Result<String, ReceiverError> {
        let until = Instant::now() + LISTEN_MAX;
        loop {
            let status = self.child.try_wait().map_err(ReceiverError::Watch)?;
            if let Some(place) = self.place.listens() {
                return Ok(place);
            }
            let log = || log_tail(&self.log);
            match status {
                // A command may have sent it to the background.
                Some(status) if !status.success() => return Err(ReceiverError::Ended { status, log: log() }),
                _ if Instant::now() >= until => {
                    let (Place::Here(place) | Place::At(place)) = &self.place;
                    return Err(ReceiverError::Silent {
                        place: place.clone(),
                        log: log(),
                    });
                }
                _ => {}
            }
            let mut signal = [PollFd::new(signals, PollFlags::IN)];
            let rings = wait_ready(&mut signal, Some(Deadline::after(PERIOD)));
            if rings.map_err(ReceiverError::Watch)? {
                return Err(ReceiverError::Interrupted);
            }
        }
    }

    /// It has the machine, and is left to itself. Says where its output goes.
    pub(super) fn leave(mut self) -> PathBuf {
        self.has_machine = true;
        self.log.clone()
    }

    /// Ends it, and all that it has started.
    fn end(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        let Ok(pid) = i32::try_from(self.child.id()) else {
            return;
        };
        let Some(group) = Pid::from_raw(pid) else { return };
        let until = Instant::now() + END_MAX;
        // It may end by itself meanwhile.
        let _ = kill_process_group(group, Signal::TERM);
        while Instant::now() < until {
            if self.child.try_wait().is_ok_and(|status| status.is_some()) {
                return;
            }
            std::thread::sleep(PERIOD);
        }
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if !self.has_machine {
            self.end();
        }
    }
}

impl Place {
    /// Where it listens, if it does by now.
    fn listens(&self) -> Option<String> {
        match self {
            Self::Here(name) => {
                let client = Client::new(&resolve(name).ok()?);
                let status = client.read(Request::get("/migration")).ok()?;
                status.get("listen").and_then(Value::as_str).map(str::to_owned)
            }
            // A caller who says nothing keeps nobody out.
            Self::At(place) => {
                let mut addresses = place.to_socket_addrs().ok()?;
                let answers = |address| TcpStream::connect_timeout(&address, PERIOD * 20).is_ok();
                addresses.any(answers).then(|| place.clone())
            }
        }
    }
}

fn said(log: &[String], nothing: &str) -> String {
    if log.is_empty() {
        nothing.to_owned()
    } else {
        log.join("; ")
    }
}
