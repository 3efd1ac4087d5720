//! A parent that stays: it passes signals on, starts the monitor again if it is to, and takes away what was made.
//!
//! ```text
//! jailer (--cleanup: the front, which removes what a killed supervisor has left)
//!   └── supervisor (removes; kills the monitor when the front has been killed)
//!         └── monitor, in the jail (dies with the supervisor)
//! ```
//!
//! Without `--cleanup` the jailer is the supervisor itself.

use std::fs::File;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, getpid, getppid, kill_process, set_child_subreaper,
    set_parent_process_death_signal, setsid, wait, waitpid,
};

use crate::cgroup::Group;
use crate::chain;
use crate::cli::RESTART_DELAY_MS_MAX;
use crate::death::{self, Cause, Death, End, Evidence};
use crate::jail;
use crate::launch::{self, LaunchError, Times};
use crate::ledger::Ledger;
use crate::lives::Lives;
use crate::plan::Plan;
use crate::process::{Fork, Heard, Namespaces, Teller, fork, wire};
use crate::signals::{Received, Signals};

/// A monitor that ran so long was all right: restarts are counted anew.
const STEADY: Duration = Duration::from_secs(60);
/// How long the first process of a PID namespace may take until it listens to a signal; before, it gets none.
const DEAF_MAX: Duration = Duration::from_secs(5);

/// Starts the monitor, and stays until it has ended for good.
///
/// # Errors
///
/// When it cannot be started.
pub(crate) fn stay(plan: &Plan, times: Times) -> Result<ExitCode, LaunchError> {
    let base = plan.base.try_clone().map_err(LaunchError::fork)?;
    let ledger = Ledger::shared(base, plan.items()).map_err(LaunchError::fork)?;
    let signals = Signals::take_over().map_err(LaunchError::fork)?;
    let mut teller = None;
    if plan.request.daemonize {
        let (hearer, tells) = wire().map_err(LaunchError::fork)?;
        if let Fork::Parent(_) = fork(Namespaces::default()).map_err(LaunchError::fork)? {
            drop(tells);
            return match hearer.wait().map_err(LaunchError::fork)? {
                Heard::Failed(text) => Err(LaunchError::Told { text }),
                Heard::Started { .. } => Ok(ExitCode::SUCCESS),
                Heard::Silence => Err(LaunchError::Killed),
            };
        }
        drop(hearer);
        setsid().map_err(|error| LaunchError::fork(error.into()))?;
        if let Fork::Parent(_) = fork(Namespaces::default()).map_err(LaunchError::fork)? {
            return Ok(ExitCode::SUCCESS);
        }
        teller = Some(tells);
    }
    let mut front = None;
    if plan.request.cleanup {
        set_child_subreaper(Some(getpid())).map_err(|error| LaunchError::fork(error.into()))?;
        let own = getpid();
        match fork(Namespaces::default()).map_err(LaunchError::fork)? {
            Fork::Parent(supervisor) => {
                drop(teller);
                return stand_in_front(plan, &ledger, signals, supervisor);
            }
            Fork::Child => {
                front = Some(own);
                // Any signal that is waited for will do: who has died is asked each time.
                let asked = set_parent_process_death_signal(Some(Signal::CHILD));
                asked.map_err(|error| LaunchError::fork(error.into()))?;
                // What the monitor has started is ended by whoever of the two is left.
                set_child_subreaper(Some(getpid())).map_err(|error| LaunchError::fork(error.into()))?;
            }
        }
    }
    let is_daemon = teller.is_some();
    let mut supervisor = Supervisor {
        plan,
        ledger,
        signals,
        times,
        front,
        teller,
        is_stopping: false,
        lives: Lives::default(),
    };
    let ended = supervisor.supervise();
    if plan.request.cleanup {
        end_children();
    }
    if plan.request.cleanup {
        supervisor.tidy_up();
    }
    match (ended, supervisor.teller.take()) {
        (Err(error), Some(mut teller)) => {
            teller.failed(&chain(&error));
            Ok(ExitCode::FAILURE)
        }
        // Whoever started it has gone; there is nobody to tell.
        (Err(_), None) if is_daemon => Ok(ExitCode::FAILURE),
        (ended, _) => ended,
    }
}

/// What the process does that was started, while another supervises: passes signals on to it, and does its last work for it
/// if it was killed.
fn stand_in_front(
    plan: &Plan,
    ledger: &Ledger,
    signals: Signals,
    supervisor: Pid,
) -> Result<ExitCode, LaunchError> {
    if plan.request.daemonize {
        let _ = without_terminal();
    }
    let status = loop {
        if let Some(status) = reaped(supervisor) {
            break status;
        }
        match signals.next(None) {
            Some(Received {
                signal,
                is_everybodys: false,
            }) if signal != Signal::CHILD => {
                let _ = kill_process(supervisor, signal);
            }
            _ => {}
        }
    };
    let end = End::of(status);
    // The monitor dies with its parent, and has become our child, as has whatever it has made itself.
    end_children();
    if matches!(end, End::Killed(_))
        && let Err(error) = ledger.remove()
    {
        complain(&chain(&error));
    }
    Ok(ExitCode::from(end.status()))
}

/// Ends all children, those that they leave too. A kernel that does not list them has only those that end by themselves.
fn end_children() {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => continue,
            Ok(None) => {}
            Err(_) => return,
        }
        let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        for child in children.split_whitespace() {
            if let Some(child) = child.parse().ok().and_then(Pid::from_raw) {
                // One that has ended meanwhile is not reaped before we do it, so the number is still its own.
                let _ = kill_process(child, Signal::KILL);
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The status of a child that has ended; whatever else has been inherited is buried on the way.
fn reaped(child: Pid) -> Option<WaitStatus> {
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid == child {
            return Some(status);
        }
    }
    None
}

struct Supervisor<'a> {
    plan: &'a Plan,
    ledger: Ledger,
    signals: Signals,
    times: Times,
    /// The parent that removes what is left if this process is killed.
    front: Option<Pid>,
    /// Who waits for the first start of a daemon.
    teller: Option<Teller>,
    /// Whether somebody has asked for the end.
    is_stopping: bool,
    /// Those before the one that runs.
    lives: Lives,
}

impl Supervisor<'_> {
    fn supervise(&mut self) -> Result<ExitCode, LaunchError> {
        let supervision = self.plan.request.supervision.clone();
        let (mut in_a_row, mut number) = (0, 1);
        loop {
            let death = match self.one_life() {
                Err(error) if number > 1 => {
                    // Whoever reads the record waits for this one.
                    let id = &self.plan.request.id;
                    self.write_record(&death::no_start(id, number, &chain(&error)));
                    return Err(error);
                }
                death => death?,
            };
            in_a_row = if death.ran >= STEADY { 0 } else { in_a_row };
            let status = death.end.status();
            let may_restart = supervision.as_ref().filter(|supervision| {
                let is_failure = status != 0 && !death.end.was_asked_for();
                is_failure && !self.is_stopping && !self.is_orphan() && in_a_row < supervision.restarts_max
            });
            let pause = may_restart.map(|supervision| backoff(supervision.delay, in_a_row));
            if supervision.is_some() {
                self.write_record(&death.record(&self.plan.request.id, number, pause));
            }
            let Some(pause) = pause else {
                return Ok(ExitCode::from(status));
            };
            self.pause(pause);
            if self.is_stopping || self.is_orphan() {
                return Ok(ExitCode::from(status));
            }
            // What the last one's jail was made of would be in the way of the next one's.
            self.tidy_up();
            (in_a_row, number) = (in_a_row + 1, number + 1);
            self.times = Times::now();
        }
    }

    /// Takes away what the jail was made of, when all that was in it has ended.
    fn tidy_up(&self) {
        let root = self.plan.root();
        for folder in [root.clone(), root.join("run")] {
            // One that cannot be looked into is left as it is.
            let _ = self.ledger.remove_dead_sockets(&folder);
        }
        if let Err(error) = self.ledger.remove() {
            complain(&chain(&error));
        }
    }

    /// One monitor from its start to its end.
    fn one_life(&mut self) -> Result<Death, LaunchError> {
        let jail = jail::build(self.plan, &self.ledger)?;
        let kills_before = oom_kills(&self.plan.groups);
        let times = self.times.across_fork();
        let (hearer, mut teller) = wire().map_err(LaunchError::fork)?;
        let introduction = self.may_restart().then(Lives::expect).transpose();
        let (introduction, tells) = introduction.map_err(LaunchError::fork)?.unzip();
        let started = Instant::now();
        let pid = match fork(launch::namespaces(self.plan)).map_err(LaunchError::fork)? {
            Fork::Parent(pid) => pid,
            Fork::Child => {
                drop(hearer);
                drop(self.teller.take());
                let failed = match self.lives.words(tells.as_ref()) {
                    Ok(words) => {
                        let how = (times, words.as_slice());
                        launch::become_supervised(self.plan, &self.ledger, &jail, how, &mut teller)
                    }
                    Err(error) => LaunchError::fork(error),
                };
                teller.failed(&chain(&failed));
                std::process::exit(1)
            }
        };
        drop((teller, tells, jail));
        let lack = match hearer.wait().map_err(LaunchError::fork)? {
            Heard::Started { lack } => lack,
            Heard::Failed(text) => {
                let _ = waitpid(Some(pid), WaitOptions::empty());
                return Err(LaunchError::Told { text });
            }
            Heard::Silence => {
                let _ = waitpid(Some(pid), WaitOptions::empty());
                return Err(LaunchError::Killed);
            }
        };
        if let Some(mut teller) = self.teller.take() {
            let _ = without_terminal();
            let _ = teller.ready(None);
        }
        let end = End::of(self.watch(pid, started));
        if let Some(introduction) = introduction {
            self.lives.bury(introduction);
        }
        let evidence = Evidence {
            has_oom_kill: oom_kills(&self.plan.groups) > kills_before,
            lack,
            since_us: self.times.start_us,
        };
        Ok(Death {
            pid,
            cause: Cause::of(pid, end, evidence),
            end,
            ran: started.elapsed(),
        })
    }

    /// Whether there can be another life after this one.
    fn may_restart(&self) -> bool {
        let supervision = self.plan.request.supervision.as_ref();
        supervision.is_some_and(|supervision| supervision.restarts_max > 0)
    }

    /// Passes signals on until the monitor has ended.
    fn watch(&mut self, monitor: Pid, started: Instant) -> WaitStatus {
        loop {
            if let Some(status) = reaped(monitor) {
                return status;
            }
            if self.is_orphan() {
                // Nobody is left who could ask for its end.
                let _ = kill_process(monitor, Signal::KILL);
            }
            let Some(Received {
                signal,
                is_everybodys,
            }) = self.signals.next(None)
            else {
                continue;
            };
            if signal == Signal::CHILD {
                continue;
            }
            self.is_stopping |= !matches!(signal, Signal::USR1 | Signal::USR2);
            if !is_everybodys {
                self.pass_on(monitor, signal, started);
            }
        }
    }

    fn pass_on(&self, monitor: Pid, signal: Signal, started: Instant) {
        // The kernel takes no signal to the first process of a PID namespace that has no handler for it.
        while self.plan.request.new_pid_ns
            && started.elapsed() < DEAF_MAX
            && is_awaited(monitor, signal) == Some(false)
        {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = kill_process(monitor, signal);
    }

    /// Waits before a restart; a signal that asks for the end cuts it short.
    fn pause(&mut self, pause: Duration) {
        let deadline = Instant::now() + pause;
        while !self.is_stopping && !self.is_orphan() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.signals.next(Some(left)) {
                Some(Received { signal, .. }) => {
                    self.is_stopping |= !matches!(signal, Signal::USR1 | Signal::USR2 | Signal::CHILD);
                }
                None => return,
            }
        }
    }

    fn is_orphan(&self) -> bool {
        self.front.is_some_and(|front| getppid() != Some(front))
    }

    fn write_record(&self, line: &str) {
        let written = match &self.plan.record {
            Some(file) => (&mut &*file).write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
        if let Err(error) = written {
            complain(&format!("cannot write to --record: {error}"));
        }
    }
}

/// Doubled each time, up to a limit.
fn backoff(first: Duration, restarts: u32) -> Duration {
    let most = Duration::from_millis(RESTART_DELAY_MS_MAX);
    first.saturating_mul(2_u32.saturating_pow(restarts)).min(most)
}

fn oom_kills(groups: &[Group]) -> u64 {
    groups.iter().filter_map(Group::oom_kills).sum()
}

/// Whether a process waits for a signal, by a handler or with it blocked; `None` if nobody can tell, or it is gone.
fn is_awaited(process: Pid, signal: Signal) -> Option<bool> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let bit = 1_u64.checked_shl(u32::try_from(signal.as_raw() - 1).ok()?)?;
    let masks = status
        .lines()
        .filter_map(|line| line.strip_prefix("SigCgt:").or(line.strip_prefix("SigBlk:")));
    let mut masks = masks.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    Some(masks.any(|mask| mask & bit != 0))
}

/// A daemon keeps nobody's terminal or pipe open.
fn without_terminal() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&null)?)
}

/// Says what could not be done, when there is nothing else to do.
fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "coracle-jailer: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_limit() {
        let first = Duration::from_millis(100);
        let waits: Vec<_> = (0..4)
            .map(|restarts| backoff(first, restarts).as_millis())
            .collect();
        assert_eq!(waits, [100, 200, 400, 800]);
        assert_eq!(backoff(first, 1000).as_secs(), 30);
    }

    #[test]
    fn this_process_waits_for_no_quit_but_for_what_it_has_taken_over() {
        assert_eq!(is_awaited(getpid(), Signal::QUIT), Some(false));
        // Of the Rust runtime, which tells of a stack that is too small.
        assert_eq!(is_awaited(getpid(), Signal::SEGV), Some(true));
    }
}
