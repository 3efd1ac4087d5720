//! The monitor's process: started by this one, and left behind only if that is said.
#![expect(
    unsafe_code,
    reason = "a child that dies with its parent, or leaves its terminal, has to say so between fork and exec; numbers of \
              processes that are not in our namespace have no safe form"
)]

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal, setsid};
use thiserror::Error;

use crate::client::{Client, ClientError};
use crate::deadline::Deadline;
use crate::name::Name;
use crate::process::Process;
use crate::runtime_dir::RuntimeDir;
use crate::signals::Signals;

/// How long a monitor may take from its start to its API.
const API_WAIT: Duration = Duration::from_secs(10);
/// How long one attempt to reach the API may take, and the pause between two.
const ATTEMPT_WAIT: Duration = Duration::from_secs(1);
const ATTEMPT_PAUSE: Duration = Duration::from_millis(1);

const PROGRAM: &str = "coracle";

/// Why there is no monitor.
#[derive(Debug, Error)]
pub(crate) enum MonitorError {
    #[error(
        "cannot start the monitor {}: name the program with --monitor or CORACLE_MONITOR, \
         or put it beside coraclectl",
        program.display()
    )]
    Start {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot make the monitor's log {}", path.display())]
    Log {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot watch the monitor")]
    Watch(#[from] io::Error),
    #[error("the monitor has ended before its API answered, with {0}")]
    EndedEarly(String),
    #[error("the monitor has not made its API socket {} within {} s", socket.display(), API_WAIT.as_secs())]
    NoApi {
        socket: PathBuf,
        #[source]
        source: ClientError,
    },
    #[error("it was interrupted before the monitor's API answered")]
    Interrupted,
}

/// The program to start: the one that was named, else the one beside this program, else the one that
/// the shell would find.
pub(crate) fn program(named: Option<&Path>) -> PathBuf {
    let beside = || {
        let program = env::current_exe().ok()?.with_file_name(PROGRAM);
        program.is_file().then_some(program)
    };
    named
        .map(Path::to_owned)
        .or_else(beside)
        .unwrap_or_else(|| PathBuf::from(PROGRAM))
}

/// What is started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch<'a> {
    /// The program.
    pub(crate) program: &'a Path,
    /// Where its socket and its log go.
    pub(crate) dir: &'a RuntimeDir,
    /// The machine's name.
    pub(crate) name: &'a Name,
    /// What it gets beside that.
    pub(crate) more_arguments: &'a [OsString],
    /// What becomes of it when this process ends.
    pub(crate) tie: Tie,
}

/// How a monitor hangs together with the process that starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tie {
    /// It is in a process group of its own, so that Ctrl-C reaches it as a request to stop the guest and not as a signal, and it
    /// gets SIGTERM when this process dies of anything.
    Child,
    /// It is in a session of its own: neither this process nor the terminal takes it along.
    Alone,
}

/// What a monitor reads and writes beside its API.
#[derive(Debug)]
pub(crate) struct Files {
    /// Where the console's input comes from.
    pub(crate) input: Stdio,
    /// Where the console's output goes.
    pub(crate) output: Stdio,
    /// Its standard error.
    pub(crate) errors: Stdio,
}

/// A monitor that runs, or has ended and was not waited for; killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Monitor {
    child: Child,
    process: Process,
    is_left: bool,
}

/// Has a program run in a process group of its own, and get SIGTERM when this process dies of anything.
pub(super) fn tie(command: &mut Command) {
    command.process_group(0);
    let parent = getpid();
    // SAFETY: the closure makes two system calls and touches neither memory nor a lock of the parent; `Command` runs it in the
    // child alone, between fork and exec.
    unsafe { command.pre_exec(move || die_with(parent)) };
}

impl Monitor {
    /// Starts a program with its socket and its log in its directory.
    ///
    /// # Errors
    ///
    /// When the program cannot be executed.
    pub(crate) fn start(launch: Launch<'_>, files: Files) -> Result<Self, MonitorError> {
        let program = launch.program;
        let (socket, log) = (launch.dir.socket(), launch.dir.log());
        // Firecracker opens its log and does not make it.
        std::fs::File::create(&log).map_err(|source| MonitorError::Log {
            path: log.clone(),
            source,
        })?;
        let mut command = Command::new(program);
        command
            .arg("--api-sock")
            .arg(socket)
            .args(["--id", launch.name.as_str()]);
        command
            .arg("--log-path")
            .arg(log)
            .args(["--level", "Warning"])
            .args(launch.more_arguments);
        command
            .stdin(files.input)
            .stdout(files.output)
            .stderr(files.errors);
        match launch.tie {
            Tie::Child => tie(&mut command),
            Tie::Alone => {
                // SAFETY: as above, with one system call.
                unsafe { command.pre_exec(|| Ok(setsid().map(drop)?)) };
            }
        }
        let start_error = |source| MonitorError::Start {
            program: program.to_owned(),
            source,
        };
        let mut child = command.spawn().map_err(start_error)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        match Process::open(pid.expect("a child's process id is a positive i32")) {
            Ok(process) => Ok(Self {
                child,
                process,
                is_left: false,
            }),
            Err(error) => {
                // No monitor may be left that nobody watches; its failure to die is the lesser news.
                let _ = child.kill().and_then(|()| child.wait());
                Err(MonitorError::Watch(error))
            }
        }
    }

    /// Waits until the API behind `client` answers.
    ///
    /// # Errors
    ///
    /// When the monitor ends before that or takes too long, or a signal comes.
    pub(crate) fn await_api(&mut self, client: &Client<'_>, signals: &Signals) -> Result<(), MonitorError> {
        let deadline = Deadline::after(API_WAIT);
        loop {
            let source = match client.peer(ATTEMPT_WAIT) {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if self.process.wait(Deadline::after(ATTEMPT_PAUSE))? {
                let status = self.reap()?;
                return Err(MonitorError::EndedEarly(status.to_string()));
            }
            if deadline.passed() {
                let socket = client.socket().to_owned();
                return Err(MonitorError::NoApi { socket, source });
            }
            if signals.is_ringing()? {
                return Err(MonitorError::Interrupted);
            }
        }
    }

    /// Lets the monitor run on by itself.
    pub(crate) fn leave(mut self) {
        self.is_left = true;
    }

    /// The process, to be signalled and waited for.
    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// The pipe that is the monitor's standard input, once, if it has one.
    pub(crate) fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// The guest's console, once, if it was to be a pipe.
    pub(super) fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// The pipe that is the monitor's standard error, once, if it has one.
    pub(crate) fn take_stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// The status of a monitor that has ended; waits for one that has not.
    ///
    /// # Errors
    ///
    /// What `waitpid` reports.
    pub(crate) fn reap(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl AsFd for Monitor {
    /// Readable once the monitor has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if self.is_left {
            return;
        }
        // Both do nothing to a monitor that was reaped; neither can fail for one that was not.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn die_with(parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    // A parent that died before the call above sends nothing any more.
    if getppid() == Some(parent) {
        Ok(())
    } else {
        Err(io::ErrorKind::Interrupted.into())
    }
}

/// Whether that is the process group that we are in. One that began outside of our PID namespace is 0 to us, which
/// `rustix::process::getpgrp` takes for no group.
pub(super) fn is_own_group(group: Pid) -> bool {
    // SAFETY: it only reads a number of this process.
    unsafe { libc::getpgrp() == group.as_raw_nonzero().get() }
}
