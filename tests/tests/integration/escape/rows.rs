//! The table: what is tried, and what refuses it where.

use std::fmt;

use super::{Line, REFUSED};

/// A process without filters; before the guest runs; and each kind of thread of a monitor whose guest runs.
pub(super) const PLACES: &[&str] = &[
    "bare",
    "main",
    "vmm",
    "api",
    "vcpu",
    "io",
    "io_network",
    "io_recording",
    "io_plain",
    "io_plain_network",
    "entropy",
    "net",
    "vsock",
    "balloon",
    "pmem",
    "pager",
    "mover",
];

/// What the program tries.
pub(super) struct Row {
    /// As the program calls it.
    pub(super) attempt: &'static str,
    /// What the jail answers without any filter: the name of an error, or `nobody`.
    pub(super) jail: &'static str,
    /// The system call that a filter refuses.
    call: &'static str,
    /// Where the filter lets it by, so that the jail answers; with `=` and another answer, if it is not the jail's.
    passes: &'static [&'static str],
}

/// The attempts on a process of the host, which know its number.
pub(super) const PROCESSES: &[&str] = &[
    "enter-namespaces",
    "trace",
    "read-memory",
    "take-a-descriptor",
    "signal",
    "probe-a-process",
    "limit-a-process",
];

/// Threads that open files: records of leases, and what the API's clients name.
const OPENERS: &[&str] = &[
    "main",
    "vmm",
    "io_recording",
    "io_plain_network",
    "pager",
    "mover",
];
/// Threads that call servers, and hosts to which a guest moves.
const CALLERS: &[&str] = &["main", "io_plain_network", "pager", "mover"];
/// Threads that have sockets of this host.
const LOCAL_CALLERS: &[&str] = &["main", "vsock", "mover"];
const NO_OTHER: &[&str] = &[];

/// Attempt, the jail's answer, the call that the filter names, and whom the filter lets by.
pub(super) const ROWS: &[Row] = &[
    row("open", "ENOENT", "openat", OPENERS),
    row("open-by-dots", "ENOENT", "openat", OPENERS),
    row("open-by-link", "ENOENT", "openat", OPENERS),
    row("open-by-link-of-dots", "ENOENT", "openat", OPENERS),
    row("open-by-proc", "ENOENT", "openat", OPENERS),
    row("open-by-own-root", "ENOENT", "openat", OPENERS),
    row("open-by-handle", "EPERM", "open_by_handle_at", NO_OTHER),
    row("change-root", "EPERM", "chroot", NO_OTHER),
    row("swap-root", "EPERM", "pivot_root", NO_OTHER),
    row("make-a-disk-node", "EPERM", "mknodat", NO_OTHER),
    row("mount", "EPERM", "mount", NO_OTHER),
    row("unmount", "EPERM", "umount2", NO_OTHER),
    row("copy-a-mount", "EPERM", "open_tree", NO_OTHER),
    row("make-a-file-system", "EPERM", "fsopen", NO_OTHER),
    // A kernel that lets users have such namespaces lets jailed ones, too: the filter is alone here.
    row("user-namespace", "nobody", "unshare", NO_OTHER),
    row("process-in-a-user-namespace", "nobody", "clone", NO_OTHER),
    row("mount-namespace", "EPERM", "unshare", NO_OTHER),
    row("enter-namespaces", "ESRCH", "pidfd_open", NO_OTHER),
    row("trace", "ESRCH", "ptrace", NO_OTHER),
    row("read-memory", "ESRCH", "process_vm_readv", NO_OTHER),
    row("take-a-descriptor", "ESRCH", "pidfd_open", NO_OTHER),
    row("signal", "ESRCH", "kill", NO_OTHER),
    row("probe-a-process", "ESRCH", "kill", &["main", "mover"]),
    row("limit-a-process", "ESRCH", "prlimit64", NO_OTHER),
    row("raw-socket", "EPERM", "socket", CALLERS),
    row("packet-socket", "EPERM", "socket", NO_OTHER),
    row("service-of-the-host", "ECONNREFUSED", "socket", CALLERS),
    row("socket-of-the-host", "ECONNREFUSED", "socket", LOCAL_CALLERS),
    row("kexec", "EPERM", "kexec_load", NO_OTHER),
    row("load-a-module", "EPERM", "finit_module", NO_OTHER),
    row("reboot", "EPERM", "reboot", NO_OTHER),
    row("stop-swapping", "EPERM", "swapoff", NO_OTHER),
    row("name-the-host", "EPERM", "sethostname", NO_OTHER),
    row("reach-ports", "EPERM", "ioperm", NO_OTHER),
    row("add-a-key", "nobody", "add_key", NO_OTHER),
    row("own-ring", "nobody", "io_uring_setup", &["main", "mover"]),
    row("become-root", "EPERM", "setresuid", NO_OTHER),
    row("join-a-group", "EPERM", "setgroups", NO_OTHER),
    row("take-capabilities", "EPERM", "capset", NO_OTHER),
    row("run-a-program", "nobody", "execve", NO_OTHER),
    row("run-what-was-written", "nobody", "mmap", NO_OTHER),
    row("fork", "nobody", "clone", NO_OTHER),
    row(
        "fork-by-clone3",
        "nobody",
        "clone3",
        &["main=ENOSYS", "mover=ENOSYS"],
    ),
];

const fn row(
    attempt: &'static str,
    jail: &'static str,
    call: &'static str,
    passes: &'static [&'static str],
) -> Row {
    Row {
        attempt,
        jail,
        call,
        passes,
    }
}

/// Whether an attempt is one on a file of the host, by a way that anybody has there.
pub(super) fn is_of_files(attempt: &str) -> bool {
    attempt.starts_with("open") && !["open-by-handle", "open-by-proc"].contains(&attempt)
}

impl Row {
    /// What has to be found at a place, as [`Found`] is written.
    pub(super) fn expected(&self, place: &str, by_jail: &str) -> String {
        let mut passes = self
            .passes
            .iter()
            .map(|word| word.split_once('=').unwrap_or((word, by_jail)));
        match passes.find(|(name, _)| *name == place) {
            Some((_, answer)) => answer.to_owned(),
            None if place == "bare" => by_jail.to_owned(),
            None => format!("the filter of `{place}`, for {}", self.call),
        }
    }
}

/// What has refused an attempt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing.
    Nobody,
    /// The kernel, by the name of its error.
    Error(String),
    /// A filter, which has named thread and call.
    Filter(String, String),
    /// It was ended by a signal of that number.
    Signal(i32),
    /// Nothing that makes sense.
    Unclear(String),
}

impl Found {
    pub(super) fn of(line: &Line) -> Self {
        let told = |said: &str| {
            let rest = said.strip_prefix("coracle: thread `")?;
            let (thread, rest) = rest.split_once("` was refused system call ")?;
            let (_, rest) = rest.split_once(" (")?;
            let (call, _) = rest.split_once(") by its filter")?;
            Some(Self::Filter(thread.to_owned(), call.to_owned()))
        };
        let by_filter = told(&line.said);
        match (line.status, line.signal) {
            (Some(0), None) if line.said.is_empty() => Self::Nobody,
            (Some(REFUSED), None) if by_filter.is_some() => by_filter.unwrap_or(Self::Nobody),
            (Some(number @ 1..134), None) if line.said.is_empty() => Self::Error(name(number)),
            (None, Some(signal)) => Self::Signal(signal),
            _ => Self::Unclear(format!("{line:?}")),
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody => f.write_str("nobody"),
            Self::Error(name) => f.write_str(name),
            Self::Filter(thread, call) => write!(f, "the filter of `{thread}`, for {call}"),
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::Unclear(line) => write!(f, "nothing clear: {line}"),
        }
    }
}

/// Of errors that refuse; the others stay numbers.
fn name(number: i32) -> String {
    let names = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::ESRCH, "ESRCH"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::EACCES, "EACCES"),
        (libc::EINVAL, "EINVAL"),
        (libc::EMFILE, "EMFILE"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::ENETUNREACH, "ENETUNREACH"),
        (libc::ECONNREFUSED, "ECONNREFUSED"),
    ];
    let known = names.iter().find(|(known, _)| *known == number);
    known.map_or_else(|| format!("error {number}"), |(_, name)| (*name).to_owned())
}
