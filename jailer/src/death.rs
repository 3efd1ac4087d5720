//! How a monitor ended, and the line that says so.

#[path = "../../resources/seccomp/names.rs"]
mod syscalls;

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, WaitStatus};

/// A monitor that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Death {
    /// The process that it was.
    pub(crate) pid: Pid,
    /// Why it ended.
    pub(crate) cause: Cause,
    /// What the kernel says.
    pub(crate) end: End,
    /// How long it ran.
    pub(crate) ran: Duration,
}

/// Why a monitor ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// It ended by itself, as its guest did.
    Exit,
    /// Somebody sent a signal, or it made a mistake.
    Signal,
    /// Its cgroup had no memory left.
    OutOfMemory,
    /// A system call that its filter refuses, if the kernel's log says which.
    Seccomp {
        /// By its number.
        syscall: Option<u32>,
    },
    /// /dev/kvm could not be used.
    NoKvm {
        /// What was tried, and what the kernel said.
        detail: String,
    },
}

/// What a monitor ends with that has asked for what its own filters refuse.
const EXIT_BAD_SYSTEM_CALL: u8 = 148;

/// What a process leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its status.
    Exited(u8),
    /// The number of the signal that it died of.
    Killed(i32),
}

/// What a cause is told from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Evidence {
    /// Whether the kernel has killed for want of memory in its cgroup meanwhile.
    pub(crate) has_oom_kill: bool,
    /// What the start found missing of KVM.
    pub(crate) lack: Option<String>,
    /// When its start began: monotonic clock, in microseconds.
    pub(crate) since_us: u64,
}

/// A monitor that a signal asks to end does so in order, with 128 and the number of the signal.
const ASKED_TO_END: [u8; 4] = [128 + 1, 128 + 2, 128 + 3, 128 + 15];

impl End {
    /// Whether somebody has asked the monitor to end, by SIGHUP, SIGINT, SIGQUIT or SIGTERM, as `coraclectl stop` does.
    pub(crate) fn was_asked_for(self) -> bool {
        matches!(self, Self::Exited(status) if ASKED_TO_END.contains(&status))
    }

    /// Of what `wait` has returned.
    pub(crate) fn of(status: WaitStatus) -> Self {
        let code = status.exit_status().and_then(|code| u8::try_from(code).ok());
        match (code, status.terminating_signal()) {
            (Some(code), _) => Self::Exited(code),
            (None, signal) => Self::Killed(signal.unwrap_or_default()),
        }
    }

    /// The status that passes it on, as a shell does.
    pub(crate) fn status(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Killed(signal) => u8::try_from(signal).unwrap_or(u8::MAX).saturating_add(128),
        }
    }
}

impl Cause {
    /// What the end and the evidence say.
    pub(crate) fn of(pid: Pid, end: End, evidence: Evidence) -> Self {
        let since_us = evidence.since_us;
        match (end, evidence.lack) {
            (End::Killed(signal), _) if signal == Signal::SYS.as_raw() => Self::Seccomp {
                syscall: refused_syscall(pid, since_us),
            },
            (End::Killed(signal), _) if signal == Signal::KILL.as_raw() && evidence.has_oom_kill => {
                Self::OutOfMemory
            }
            (End::Killed(_), _) => Self::Signal,
            (End::Exited(EXIT_BAD_SYSTEM_CALL), _) => Self::Seccomp {
                syscall: refused_syscall(pid, since_us),
            },
            (End::Exited(code), Some(detail)) if code != 0 => Self::NoKvm { detail },
            (End::Exited(_), _) => Self::Exit,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Exit => "exit",
            Self::Signal => "signal",
            Self::OutOfMemory => "oom",
            Self::Seccomp { .. } => "seccomp",
            Self::NoKvm { .. } => "kvm",
        }
    }
}

impl Death {
    /// One line of JSON. `number` counts the monitors of a supervisor from 1; `restart` is the wait before the next.
    pub(crate) fn record(&self, id: &str, number: u32, restart: Option<Duration>) -> String {
        let mut line = String::new();
        let (status, signal) = match self.end {
            End::Exited(code) => (code.to_string(), "null".to_owned()),
            End::Killed(signal) => ("null".to_owned(), quoted(&signal_name(signal))),
        };
        let (syscall, detail) = match &self.cause {
            Cause::Seccomp {
                syscall: Some(number),
            } => {
                let name = syscalls::name(*number).map_or_else(|| number.to_string(), str::to_owned);
                (quoted(&name), None)
            }
            Cause::NoKvm { detail } => ("null".to_owned(), Some(detail)),
            _ => ("null".to_owned(), None),
        };
        let restart = restart.map_or("null".to_owned(), |wait| wait.as_millis().to_string());
        let detail = detail.map_or("null".to_owned(), |detail| quoted(detail));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Writing to a string cannot fail.
        let _ = writeln!(
            line,
            "{{\"id\":{},\"incarnation\":{number},\"pid\":{},\"cause\":\"{}\",\"status\":{status},\"signal\":{signal},\
             \"syscall\":{syscall},\"detail\":{detail},\"ran_ms\":{},\"ended_at_ms\":{},\"restart_in_ms\":{restart}}}",
            quoted(id),
            self.pid,
            self.cause.name(),
            self.ran.as_millis(),
            now.as_millis(),
        );
        line
    }
}

/// The line of a monitor that is not started again, and why not.
pub(crate) fn no_start(id: &str, number: u32, why: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!(
        "{{\"id\":{},\"incarnation\":{number},\"pid\":null,\"cause\":\"start\",\"status\":null,\"signal\":null,\
         \"syscall\":null,\"detail\":{},\"ran_ms\":0,\"ended_at_ms\":{},\"restart_in_ms\":null}}\n",
        quoted(id),
        quoted(why),
        now.as_millis(),
    )
}

/// Names of the signals from 1 on, as in signal(7).
const SIGNALS: &str = "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP \
                       TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS";

fn signal_name(number: i32) -> String {
    let index = usize::try_from(number)
        .ok()
        .and_then(|number| number.checked_sub(1));
    let name = index.and_then(|index| SIGNALS.split_whitespace().nth(index));
    name.map_or_else(|| format!("SIG{number}"), |name| format!("SIG{name}"))
}

/// A JSON string.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => {
                quoted.push('\\');
                quoted.push(character);
            }
            control if control < ' ' => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(control));
            }
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

/// How long the kernel's log may take to have a record.
const LOG_WITHIN: Duration = Duration::from_millis(500);
const LOG_PERIOD: Duration = Duration::from_millis(5);

/// The log has a clock of its own, which may be so far from the monotonic one.
const LOG_SKEW_US: u64 = 1_000_000;

/// The system call that the kernel's log says a process was killed for that began then, if this process may read that.
fn refused_syscall(pid: Pid, since_us: u64) -> Option<u32> {
    let mut log = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .ok()?;
    let deadline = Instant::now() + LOG_WITHIN;
    let mut last = None;
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(0) => return last,
            Ok(bytes) => {
                let text = String::from_utf8_lossy(record.get(..bytes).unwrap_or_default());
                last = of_record(&text, pid, since_us).or(last);
            }
            // A record that was overwritten meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            // A thread of the kernel's own writes the record, perhaps a moment after the end.
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock
                    && last.is_none()
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(LOG_PERIOD);
            }
            Err(_) => return last,
        }
    }
}

/// Type of the audit records of seccomp.
const AUDIT_SECCOMP: &str = "type=1326";

fn of_record(text: &str, pid: Pid, since_us: u64) -> Option<u32> {
    // Priority, number and time, before whatever else; another process had the number before this one.
    let at_us: u64 = text.split(',').nth(2)?.parse().ok()?;
    if at_us < since_us.saturating_sub(LOG_SKEW_US) {
        return None;
    }
    let mut words = text.split_whitespace();
    let is_seccomp = words.any(|word| word == AUDIT_SECCOMP || word.ends_with(AUDIT_SECCOMP));
    let pid = format!("pid={pid}");
    if !is_seccomp || !words.clone().any(|word| word == pid) {
        return None;
    }
    words.find_map(|word| word.strip_prefix("syscall="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pid() -> Pid {
        Pid::from_raw(42).expect("it is positive")
    }

    #[test]
    fn causes_are_told_apart() {
        let oom = Evidence {
            has_oom_kill: true,
            ..Evidence::default()
        };
        let lack = Evidence {
            lack: Some("/dev/kvm: no".into()),
            ..Evidence::default()
        };
        let none = Evidence::default();
        let of = |end, evidence: &Evidence| Cause::of(pid(), end, evidence.clone()).name();
        assert_eq!(of(End::Exited(0), &none), "exit");
        assert_eq!(of(End::Exited(0), &lack), "exit");
        assert_eq!(of(End::Exited(1), &lack), "kvm");
        assert_eq!(of(End::Exited(148), &none), "seccomp");
        assert_eq!(of(End::Exited(1), &oom), "exit");
        assert_eq!(of(End::Killed(libc::SIGKILL), &none), "signal");
        assert_eq!(of(End::Killed(libc::SIGKILL), &oom), "oom");
        assert_eq!(of(End::Killed(libc::SIGSEGV), &oom), "signal");
        assert_eq!(of(End::Killed(libc::SIGSYS), &none), "seccomp");
        assert_eq!(End::Killed(libc::SIGKILL).status(), 137);
    }

    #[test]
    fn a_record_is_one_line_that_quotes_what_it_was_told() {
        let death = Death {
            pid: pid(),
            cause: Cause::NoKvm {
                detail: "a \"b\"\n\\".into(),
            },
            end: End::Exited(1),
            ran: Duration::from_millis(7),
        };
        let line = death.record("vm1", 2, Some(Duration::from_millis(100)));
        assert!(
            line.starts_with(
                "{\"id\":\"vm1\",\"incarnation\":2,\"pid\":42,\"cause\":\"kvm\",\"status\":1,\"signal\":null,"
            ),
            "{line}"
        );
        assert!(
            line.contains(r#""detail":"a \"b\"\u000a\\","ran_ms":7"#),
            "{line}"
        );
        assert!(
            line.ends_with("\"restart_in_ms\":100}\n") && line.lines().count() == 1,
            "{line}"
        );
    }

    #[test]
    fn a_refused_call_is_read_from_the_log_of_that_process_only() {
        let record = "5,1,7000000,-;audit: type=1326 audit(1.2:3): auid=0 uid=0 gid=0 ses=1 pid=42 comm=\"a\" exe=\"/a\" \
                      sig=31 arch=c000003e syscall=59 compat=0 ip=0x1 code=0x80000000";
        assert_eq!(of_record(record, pid(), 7_500_000), Some(59));
        assert_eq!(of_record(record, pid(), 8_500_000), None);
        assert_eq!(syscalls::name(59), Some("execve"));
        assert_eq!(of_record(&record.replace("pid=42", "pid=421"), pid(), 0), None);
        assert_eq!(of_record(&record.replace("1326", "1325"), pid(), 0), None);
    }

    #[test]
    fn names_of_signals_are_those_of_the_manual() {
        assert_eq!(signal_name(libc::SIGSEGV), "SIGSEGV");
        assert_eq!(signal_name(libc::SIGSYS), "SIGSYS");
        assert_eq!(signal_name(35), "SIG35");
    }
}
