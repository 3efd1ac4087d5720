//! A server program of a test's own, that does not outlive the test.
//!
//! A shell stands between: it holds on to the program and kills it when its standard input ends, which it does however
//! this process ends.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::Outcome;
use crate::harness::hosts::Host;
use crate::process::Process;

/// A running program, and the shell that holds on to it. Dropping it kills both.
#[derive(Debug)]
pub(super) struct Daemon {
    shell: Child,
    /// Its end is the shell's order to kill.
    leash: Option<ChildStdin>,
    process: Process,
}

/// Where Debian keeps what only root looks for.
const SYSTEM_DIRECTORIES: &str = "/usr/sbin:/sbin";
/// Starts the rest of its arguments, says its number, and kills it at the end of standard input.
const LEASH: &str = r#"log=$1; shift; "$@" >>"$log" 2>&1 & echo $!; read -r _; kill -KILL $!; wait"#;
const DEAD_WITHIN: Duration = Duration::from_secs(10);
/// Below the ports that the kernel gives to clients: nobody gets a server's port while it is dead.
const FIRST_PORT: u16 = 10_000;
const PORTS: u16 = 20_000;

impl Daemon {
    /// Starts a program whose output is added to the log; on a host, if there is one.
    pub(super) fn start(command: &Command, log: &Path, host: Option<&Host>) -> Outcome<Self> {
        let mut leashed = Command::new("sh");
        leashed.args(["-c", LEASH, "sh"]).arg(log);
        leashed.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            leashed.env(name, value.unwrap_or_default());
        }
        leashed.env("PATH", path());
        leashed.stdin(Stdio::piped()).stdout(Stdio::piped());
        let spawned = match host {
            Some(host) => host.inside(|| leashed.spawn())?,
            None => leashed.spawn(),
        };
        let mut shell = spawned?;
        let leash = shell.stdin.take();
        let mut line = String::new();
        BufReader::new(shell.stdout.take().ok_or("stdout was asked for")?).read_line(&mut line)?;
        Ok(Self {
            process: Process(line.trim().parse()?),
            shell,
            leash,
        })
    }

    /// The program, seen from outside.
    pub(super) fn process(&self) -> Process {
        self.process
    }

    pub(super) fn signal(&self, signal: Signal) -> Outcome {
        let Process(number) = self.process;
        let pid = Pid::from_raw(i32::try_from(number)?).ok_or("a process has a number")?;
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// Kills the program, stopped or not; when it returns nobody listens.
    pub(super) fn kill(mut self) -> Outcome {
        self.let_go()
    }

    /// Ends the leash and waits until both are gone; the shell waits for the program.
    fn let_go(&mut self) -> Outcome {
        drop(self.leash.take());
        let deadline = Instant::now() + DEAD_WITHIN;
        while self.shell.try_wait()?.is_none() {
            crate::ensure!(
                Instant::now() < deadline,
                "process {} does not die",
                self.process.0
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It fails only when nothing is left to end.
        drop(self.let_go());
    }
}

/// Where programs are looked for.
pub(super) fn path() -> String {
    format!(
        "{}:{SYSTEM_DIRECTORIES}",
        std::env::var("PATH").unwrap_or_default()
    )
}

/// Fails with the way to get a program that is not there.
pub(super) fn expect_installed(programs: &[&str]) -> Outcome {
    for program in programs {
        let is_installed = std::env::split_paths(&path()).any(|directory| directory.join(program).is_file());
        crate::ensure!(
            is_installed,
            "{program} is not there; run: tests/tools/need {program}"
        );
    }
    Ok(())
}

/// A port that this process has not tried yet, and that others begin to try elsewhere.
pub(super) fn next_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = std::process::id().wrapping_mul(97) % u32::from(PORTS);
    let start = u16::try_from(start).expect("less than the number of ports");
    FIRST_PORT + (start + NEXT.fetch_add(1, Ordering::Relaxed) % PORTS) % PORTS
}
