//! A place of its own for each test: a runtime directory, and processes that go away with it.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::monitor::REQUESTS_NAME;

/// Far more than anything takes here, on the slowest machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(5);

/// Where a test works.
pub(crate) struct Workbench {
    place: TempDir,
}

impl Workbench {
    pub(crate) fn new() -> Self {
        Self {
            place: tempfile::tempdir().expect("a scratch directory"),
        }
    }

    /// `coraclectl` with `arguments`.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coraclectl"));
        let this_program = std::env::current_exe().expect("the program that runs has a path");
        command.args(arguments).stdin(Stdio::null());
        command
            .env("XDG_RUNTIME_DIR", self.place.path())
            .env("CORACLE_MONITOR", this_program);
        command
    }

    /// What `coraclectl` with `arguments` prints and returns.
    pub(crate) fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("coraclectl starts")
    }

    /// Runs a machine that behaves as `name` says, to its end.
    pub(crate) fn run(&self, name: &str, more: &[&str]) -> Output {
        self.output(&[&["run", "--kernel", "vmlinux", "--name", name], more].concat())
    }

    /// Starts a machine that behaves as `name` says, and waits until it runs.
    pub(crate) fn start(&self, name: &str, more: &[&str]) -> Running<'_> {
        let mut command = self.command(&["run", "--kernel", "vmlinux", "--name", name]);
        command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().expect("coraclectl starts");
        let running = Running {
            bench: self,
            name: name.to_owned(),
            child: Some(child),
        };
        until("the machine runs", || {
            running.requests().contains("InstanceStart")
        });
        running
    }

    /// The directory of a machine.
    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        self.place.path().join("coracle").join(name)
    }

    /// Whether every machine's directory is gone.
    pub(crate) fn is_clean(&self) -> bool {
        fs::read_dir(self.place.path().join("coracle")).is_ok_and(|mut entries| entries.next().is_none())
    }

    /// What a monitor was asked, a request per line.
    pub(crate) fn requests(&self, name: &str) -> String {
        fs::read_to_string(self.dir(name).join(REQUESTS_NAME)).unwrap_or_default()
    }

    /// What `ps` says of the machine `name`.
    pub(crate) fn ps(&self, name: &str) -> Value {
        let rows: Value =
            serde_json::from_slice(&self.output(&["ps", "--json"]).stdout).expect("ps prints JSON");
        let mut rows = rows.as_array().expect("ps prints an array").iter();
        rows.find(|row| row["id"] == name).cloned().unwrap_or_default()
    }
}

/// A machine in the background; killed with its test.
pub(crate) struct Running<'a> {
    bench: &'a Workbench,
    name: String,
    child: Option<Child>,
}

impl Running<'_> {
    fn child(&self) -> &Child {
        self.child.as_ref().expect("the machine has not been waited for")
    }

    fn requests(&self) -> String {
        self.bench.requests(&self.name)
    }

    /// The monitor's process.
    pub(crate) fn monitor(&self) -> Pid {
        let pid = self.bench.ps(&self.name)["pid"]
            .as_i64()
            .expect("the machine is listed");
        i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .expect("a process id")
    }

    /// Sends `signal` to `coraclectl`, not to the monitor.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child().id())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a process id");
        kill_process(pid, signal).expect("the child was not waited for");
    }

    /// What `coraclectl` has printed and returned, once it has ended.
    pub(crate) fn wait(mut self) -> Output {
        let mut child = self.child.take().expect("a machine is waited for once");
        until("coraclectl ends", || {
            child.try_wait().expect("the child is ours").is_some()
        });
        child.wait_with_output().expect("the child is ours")
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Its monitor dies with it.
            child
                .kill()
                .and_then(|()| child.wait())
                .expect("the child is ours");
        }
    }
}

/// Whether no process has the number `pid`.
pub(crate) fn is_gone(pid: Pid) -> bool {
    test_kill_process(pid).is_err()
}

/// Waits until `condition` holds; panics when it never does.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        thread::sleep(PAUSE);
    }
}

/// The text on standard error.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
