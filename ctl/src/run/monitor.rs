//! The monitor's process: started by `run`, and never left behind by it.
#![expect(
    unsafe_code,
    reason = "a child that dies with its parent has to say so between fork and exec"
)]

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};
use thiserror::Error;

use super::console::Input;
use crate::name::Name;
use crate::process::Process;
use crate::runtime_dir::RuntimeDir;

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
    Watch(#[source] io::Error),
}

/// The program to start: the one that was named, else the one beside this program, else the one that
/// the shell would find.
pub(super) fn program(named: Option<&Path>) -> PathBuf {
    let beside = || {
        let program = env::current_exe().ok()?.with_file_name(PROGRAM);
        program.is_file().then_some(program)
    };
    named
        .map(Path::to_owned)
        .or_else(beside)
        .unwrap_or_else(|| PathBuf::from(PROGRAM))
}

/// What a monitor reads and writes beside its API; its standard output is this process's.
#[derive(Debug)]
pub(super) struct Files {
    /// Where the console's input comes from.
    pub(super) input: Input,
    /// Its standard error.
    pub(super) stderr: Stdio,
}

/// A monitor that runs, or has ended and was not waited for; killed when it is dropped.
#[derive(Debug)]
pub(super) struct Monitor {
    child: Child,
    process: Process,
}

impl Monitor {
    /// Starts `program` with its socket and its log in `dir`.
    ///
    /// It is in a process group of its own, so that Ctrl-C reaches it as a request to stop the guest
    /// and not as a signal, and it gets SIGTERM when this process dies of anything.
    ///
    /// # Errors
    ///
    /// When the program cannot be executed.
    pub(super) fn start(
        program: &Path,
        dir: &RuntimeDir,
        name: &Name,
        files: Files,
        more_arguments: &[OsString],
    ) -> Result<Self, MonitorError> {
        let (socket, log) = (dir.socket(), dir.log());
        // Firecracker opens its log and does not make it.
        std::fs::File::create(&log).map_err(|source| MonitorError::Log {
            path: log.clone(),
            source,
        })?;
        let mut command = Command::new(program);
        command
            .arg("--api-sock")
            .arg(socket)
            .args(["--id", name.as_str()]);
        command
            .arg("--log-path")
            .arg(log)
            .args(["--level", "Warning"])
            .args(more_arguments);
        command
            .stdin(files.input.stdio())
            .stderr(files.stderr)
            .process_group(0);
        let parent = getpid();
        // SAFETY: the closure makes two system calls and touches neither memory nor a lock of the
        // parent; `Command` runs it in the child alone, between fork and exec.
        unsafe { command.pre_exec(move || die_with(parent)) };
        let start_error = |source| MonitorError::Start {
            program: program.to_owned(),
            source,
        };
        let mut child = command.spawn().map_err(start_error)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        match Process::open(pid.expect("a child's process id is a positive i32")) {
            Ok(process) => Ok(Self { child, process }),
            Err(error) => {
                // No monitor may be left that nobody watches; its failure to die is the lesser news.
                let _ = child.kill().and_then(|()| child.wait());
                Err(MonitorError::Watch(error))
            }
        }
    }

    /// The process, to be signalled and waited for.
    pub(super) fn process(&self) -> &Process {
        &self.process
    }

    /// The pipe that is the monitor's standard input, once, if it has one.
    pub(super) fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// The pipe that is the monitor's standard error, once, if it has one.
    pub(super) fn take_stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// The status of a monitor that has ended; waits for one that has not.
    ///
    /// # Errors
    ///
    /// What `waitpid` reports.
    pub(super) fn reap(&mut self) -> io::Result<ExitStatus> {
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
