//! From a jail that is made to a monitor that runs in it.

use std::ffi::{CString, NulError, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::process::{Signal, set_parent_process_death_signal, setsid};
use rustix::time::{ClockId, clock_gettime};

use crate::chain;
use crate::enter::{self, EnterError};
use crate::jail::{self, Jail, JailError};
use crate::ledger::Ledger;
use crate::plan::{Plan, Standing};
use crate::process::{Fork, Heard, Namespaces, Teller, fork, leads_session, wire};

/// When the jailer began, for the monitor's metrics.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// Monotonic clock, in microseconds.
    pub(crate) start_us: u64,
    /// Processor time of the jailer's processes before this one, in microseconds.
    pub(crate) before_cpu_us: u64,
}

impl Times {
    /// Counted from here.
    pub(crate) fn now() -> Self {
        Self {
            start_us: microseconds(ClockId::Monotonic),
            before_cpu_us: 0,
        }
    }

    /// The same, as a process that is forked here has to count.
    #[must_use]
    pub(crate) fn across_fork(self) -> Self {
        Self {
            before_cpu_us: self.before_cpu_us + microseconds(ClockId::ProcessCPUTime),
            ..self
        }
    }
}

fn microseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec.cast_unsigned() * 1_000_000 + time.tv_nsec.cast_unsigned() / 1000
}

/// Starts the monitor as Firecracker's jailer does, and leaves it to itself. Returns in the process that was started, if
/// another one became the monitor.
///
/// # Errors
///
/// When the jail cannot be made or entered; what was made stays.
pub(crate) fn leave_alone(plan: &Plan, times: Times) -> Result<ExitCode, LaunchError> {
    let ledger = Ledger::forgetful(plan.base.try_clone().map_err(LaunchError::fork)?);
    let jail = jail::build(plan, &ledger)?;
    if !plan.request.daemonize && !plan.request.new_pid_ns {
        return Err(become_monitor(plan, &ledger, &jail, times));
    }
    let is_leader = leads_session();
    let (hearer, mut teller) = wire().map_err(LaunchError::fork)?;
    let after = times.across_fork();
    let namespaces = namespaces(plan);
    let first = if plan.request.daemonize {
        Namespaces::default()
    } else {
        namespaces
    };
    match fork(first).map_err(LaunchError::fork)? {
        Fork::Parent(_) => {
            drop(teller);
            return outcome(hearer.wait().map_err(LaunchError::fork)?);
        }
        Fork::Child => drop(hearer),
    }
    // From here on the process that was started hears of failures, and ends with them.
    let failed = child(plan, &ledger, &jail, (after, namespaces, is_leader), &mut teller);
    teller.failed(&chain(&failed));
    std::process::exit(1)
}

/// The process that becomes the monitor, or makes the one that does. Returns only why not.
fn child(
    plan: &Plan,
    ledger: &Ledger,
    jail: &Jail,
    (times, namespaces, is_leader): (Times, Namespaces, bool),
    teller: &mut Teller,
) -> LaunchError {
    let mut times = times;
    if plan.request.daemonize {
        if let Err(error) = setsid() {
            return LaunchError::fork(error.into());
        }
        // Whoever leads no session gets no terminal again.
        times = times.across_fork();
        match fork(namespaces) {
            Ok(Fork::Child) => {}
            Ok(Fork::Parent(_)) => std::process::exit(0),
            Err(error) => return LaunchError::fork(error),
        }
    } else if is_leader && let Err(error) = setsid() {
        // The end of a session's leader hangs up on its terminal's processes.
        return LaunchError::fork(error.into());
    }
    let has_user_ns = namespaces.user;
    if let Err(error) = enter::enter(plan, ledger, jail, has_user_ns) {
        return error.into();
    }
    if let Err(error) = teller.ready(None) {
        return LaunchError::fork(error);
    }
    execute(plan, &jail.monitor, times, &[])
}

fn become_monitor(plan: &Plan, ledger: &Ledger, jail: &Jail, times: Times) -> LaunchError {
    match enter::enter(plan, ledger, jail, false) {
        Ok(()) => execute(plan, &jail.monitor, times, &[]),
        Err(error) => error.into(),
    }
}

/// The child of a supervisor becomes the monitor, and ends when the supervisor does. Returns only why not.
pub(crate) fn become_supervised(
    plan: &Plan,
    ledger: &Ledger,
    jail: &Jail,
    (times, words): (Times, &[(&str, String)]),
    teller: &mut Teller,
) -> LaunchError {
    let with_parent = || set_parent_process_death_signal(Some(Signal::KILL));
    if let Err(error) = with_parent() {
        return LaunchError::fork(error.into());
    }
    if let Err(error) = enter::enter(plan, ledger, jail, namespaces(plan).user) {
        return error.into();
    }
    // Another user's process has to ask again.
    if let Err(error) = with_parent() {
        return LaunchError::fork(error.into());
    }
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let lack = kvm.err().map(|error| format!("/dev/kvm in the jail: {error}"));
    // The supervisor's end is closed if it has ended before the kernel was asked.
    if let Err(error) = teller.ready(lack.as_deref()) {
        return LaunchError::fork(error);
    }
    execute(plan, &jail.monitor, times, words)
}

/// The namespaces that the monitor's process has to start in.
pub(crate) fn namespaces(plan: &Plan) -> Namespaces {
    let pid = plan.request.new_pid_ns;
    Namespaces {
        pid,
        user: pid && plan.standing == Standing::Rootless,
    }
}

/// What the process that was started says and ends with.
fn outcome(heard: Heard) -> Result<ExitCode, LaunchError> {
    match heard {
        Heard::Started { .. } => Ok(ExitCode::SUCCESS),
        Heard::Failed(text) => Err(LaunchError::Told { text }),
        Heard::Silence => Err(LaunchError::Killed),
    }
}

/// Becomes the monitor, with no environment but `words`, no descriptor but the first three and what those name, and no signal
/// blocked. Returns only why not.
///
/// By a descriptor: its name is in a directory of the jail's user, who may have put something else there.
#[expect(unsafe_code, reason = "no crate here has execveat")]
fn execute(plan: &Plan, monitor: &File, times: Times, words: &[(&str, String)]) -> LaunchError {
    let program = Path::new("/").join(&plan.exec_name);
    let cpu_us = microseconds(ClockId::ProcessCPUTime);
    let mut arguments = vec![
        program.clone().into_os_string(),
        "--id".into(),
        plan.request.id.clone().into(),
    ];
    for (name, number) in [
        ("--start-time-us", times.start_us),
        ("--start-time-cpu-us", cpu_us),
        ("--parent-cpu-time-us", times.before_cpu_us + cpu_us),
    ] {
        arguments.extend([name.into(), number.to_string().into()]);
    }
    arguments.extend(plan.request.arguments.iter().cloned());
    let words = words.iter().map(|(name, word)| format!("{name}={word}").into());
    let (Ok(arguments), Ok(words)) = (strings(arguments), strings(words)) else {
        return LaunchError::Execute {
            path: program,
            source: io::ErrorKind::InvalidInput.into(),
        };
    };
    let (arguments, words) = (pointers(&arguments), pointers(&words));
    hear_all_signals();
    // SAFETY: the arrays end with a null pointer; their strings and they themselves outlive the call, which only reads them.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            monitor.as_raw_fd(),
            c"".as_ptr(),
            arguments.as_ptr(),
            words.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    LaunchError::Execute {
        path: program,
        source: io::Error::last_os_error(),
    }
}

/// A program begins with no signal blocked, and ends by SIGPIPE unless it says otherwise; Rust's runtime has said so here.
#[expect(unsafe_code, reason = "no crate here has these calls")]
fn hear_all_signals() {
    // SAFETY: all zeros is a set: the empty one.
    let none = unsafe { std::mem::zeroed::<libc::sigset_t>() };
    // SAFETY: the set is valid, and nothing is written.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) };
    // SAFETY: no handler is taken away that anybody waits for.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

fn strings(texts: impl IntoIterator<Item = OsString>) -> Result<Vec<CString>, NulError> {
    texts
        .into_iter()
        .map(|text| CString::new(text.into_vec()))
        .collect()
}

/// As the kernel takes them.
fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    let strings = strings.iter().map(|string| string.as_ptr());
    strings.chain([std::ptr::null()]).collect()
}

/// Why a monitor does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    /// No process, pipe or session.
    #[error("cannot make the monitor's process")]
    Fork {
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The program is none for this host.
    #[error(
        "cannot execute {} in the jail; it has to be a static program of this host; with --copy-exec it may lie anywhere",
        path.display()
    )]
    Execute {
        /// In the jail.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Told by the process that was to be the monitor.
    #[error("{text}")]
    Told {
        /// Why.
        text: String,
    },
    /// It was killed.
    #[error("the monitor's process was killed while its jail was entered")]
    Killed,
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The way into it.
    #[error(transparent)]
    Enter(#[from] EnterError),
}

impl LaunchError {
    /// No process, pipe or session.
    pub(crate) fn fork(source: io::Error) -> Self {
        Self::Fork { source }
    }
}
