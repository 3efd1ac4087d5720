//! `coraclectl run`: a machine in the foreground, from its start to its exit status.

mod balloon;
mod command;
mod console;
mod disk;
mod ended;
mod escape;
mod hotplug;
mod image;
mod initrd;
mod last_words;
mod machine;
mod memory;
pub(crate) mod monitor;
mod net;
mod pmem;
mod session;
mod vsock;
mod warm;

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};
use thiserror::Error;

use self::balloon::BalloonSpec;
use self::command::{CommandError, Fetched};
pub(crate) use self::console::Input;
use self::disk::DiskSpec;
use self::ended::Ended;
use self::hotplug::HotplugSpec;
use self::last_words::LastWords;
pub(crate) use self::machine::Step;
use self::machine::{DEFAULT_CMDLINE, MachineError};
use self::memory::MemoryMib;
use self::monitor::{Files, Launch, Monitor, MonitorError, Tie};
use self::net::NetSpec;
use self::pmem::PmemSpec;
use self::session::{Asked, Outcome, Session, SessionError};
use self::vsock::VsockSpec;
use crate::guest::Surroundings;
use crate::name::Name;
use crate::output::{Format, note, note_json};
use crate::runtime_dir::{AtTheEnd, RuntimeDir, RuntimeDirError, RuntimeRoot};
use crate::signals::{Signals, SignalsError};

/// From here a status is a monitor's own, or one of the few guests' that are as high: then the log, which
/// has nothing to explain, is empty.
const MONITOR_STATUS_MIN: u8 = 148;
/// How much of a monitor's log is worth showing when it has failed.
const LOG_TAIL_BYTES_MAX: u64 = 4096;
const LOG_TAIL_LINES_MAX: usize = 10;

/// Run a machine in the foreground: start it, show its console, end with its status; or a command in a guest made for it
///
/// The serial console is standard input and output. On a terminal every key goes to the guest, except
/// Ctrl-A x, which stops the machine. SIGINT, SIGTERM, SIGHUP and SIGQUIT stop it too: the guest is
/// sent Ctrl-Alt-Del, then the monitor SIGTERM and SIGKILL; asking again goes on to the next step.
///
/// With an IMAGE, a guest is made for one command: a file system in a file (also nfs:// or iscsi://), a directory, or a tar
/// archive is its root, which it may write and which stays as it is. Standard input, output and error are the command's,
/// signals go to it, and its status is ours; the guest is gone when it has ended. The kernel has to have ext4 (or what the
/// image is), initial RAM disks, virtio disks and vsock built in; nothing has to be in the image.
///
/// With --json the last line on standard error is one JSON object with the status and what chose it,
/// `ended`: guest_exit, power_off, reset, triple_fault, kvm_internal_error, entry_failed, run_failed,
/// memory_lost, migrated, handover_lost, stopped, monitor_failed, or null when the monitor did not say; with an IMAGE command or
/// stopped. Standard output stays the guest's alone.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
  the guest's, whatever it is, when the guest gave one; otherwise
  0        the guest has powered off or reset, or runs on elsewhere
  1        the monitor has failed
  124      the command of an IMAGE was not done in --timeout
  125      coraclectl itself has failed: a wrong command line or configuration among the reasons
  128 + N  signal N has stopped coraclectl or the monitor (`coraclectl stop --force`: 143)
  152      the monitor cannot use its configuration
  153      the monitor cannot use its arguments
  160      a vCPU took a triple fault
  161      KVM could not go on with a vCPU
  162      the processor refused a vCPU's state
  163      KVM failed to run a vCPU
  164      memory of a restored guest is damaged in its file, or cannot be read
  148      the monitor made a system call that its seccomp filter does not allow
  165      the guest was handed over by a migration whose end is not known
  166      a thread of the monitor has failed
A guest can give any of these too: the monitor says on standard error which it was, and --json
says it as `ended`.")]
pub(crate) struct RunArgs {
    /// The kernel: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "PATH", env = "CORACLE_KERNEL")]
    kernel: String,
    /// The initial RAM disk
    #[arg(long, value_name = "PATH", conflicts_with = "image")]
    initrd: Option<String>,
    /// A disk, by its path or an iscsi:// or nfs:// URL; the first is the root unless said otherwise. Options: ro, rw, root,
    /// noroot, sync, async, unsafe, writeback, id=ID, partuuid=UUID; a comma in the path is written twice
    #[arg(long, value_name = "PATH[,OPTION]…")]
    disk: Vec<DiskSpec>,
    /// A network interface, by its tap on this host, which has to be there. Options: id=ID, mac=ADDRESS, mtu=BYTES,
    /// pairs=NUMBER of its queues
    #[arg(long, value_name = "TAP[,OPTION]…")]
    net: Vec<NetSpec>,
    /// A socket device: programs of this host reach the guest by the socket PATH, which is made, and the guest reaches those at
    /// PATH_1, PATH_2 and so on. Option: cid=N, the guest's address [default: 3]
    #[arg(long, value_name = "PATH[,OPTION]", conflicts_with = "image")]
    vsock: Option<VsockSpec>,
    /// A balloon of so much memory that the guest gives back to this host, such as 0 or 64M. Options: stats=SECONDS,
    /// reporting (what is free goes back by itself), hinting, keep (also when the guest runs out of memory)
    #[arg(long, value_name = "SIZE[,OPTION]…")]
    balloon: Option<BalloonSpec>,
    /// Memory that may come to the guest while it runs (PATCH /hotplug/memory), such as 1G. Options: block=SIZE, slot=SIZE
    #[arg(long, value_name = "SIZE[,OPTION]…")]
    hotplug_memory: Option<HotplugSpec>,
    /// A file as persistent memory (/dev/pmem0): lengthened to a multiple of 2 MiB, and no part of snapshots. Options: ro, root,
    /// id=ID; a comma in the path is written twice
    #[arg(long, value_name = "PATH[,OPTION]…", conflicts_with = "warm")]
    pmem: Vec<PmemSpec>,
    /// The guest's memory, such as 512 (MiB), 128M or 2G
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    memory: MemoryMib,
    /// How many vCPUs
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: u8,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_CMDLINE, allow_hyphen_values = true)]
    cmdline: String,
    /// Keep a log of the pages that the guest writes, so that snapshots may be diffs
    #[arg(long)]
    track_dirty_pages: bool,
    /// A custom CPU template, as PUT /cpu-config takes it
    #[arg(long, value_name = "FILE")]
    cpu_template: Option<PathBuf>,
    /// Give the guest a source of entropy
    #[arg(long)]
    entropy: bool,
    #[command(flatten)]
    foreground: ForegroundArgs,
    #[command(flatten)]
    disposable: DisposableArgs,
    /// What a guest for one command begins with
    image: Option<String>,
    /// The command and its arguments
    #[arg(last = true, requires = "image")]
    command: Vec<String>,
}

/// What a guest for one command is given.
#[derive(Debug, Args)]
#[command(next_help_heading = "With an IMAGE")]
struct DisposableArgs {
    #[command(flatten)]
    surroundings: Surroundings,
    /// Copy a file or directory of the guest to PLACE [default: .] when the command has ended
    #[arg(long, value_name = "PATH[:PLACE]", requires = "image")]
    copy_out: Vec<Fetched>,
    /// The guest's device with the root: the image itself, or a partition of it
    #[arg(long, value_name = "DEVICE", default_value = "/dev/vda", requires = "image")]
    root_device: String,
    /// Begin with a snapshot of a guest that has booted: one that is kept in DIRECTORY, and is made there if none fits. Kernel,
    /// agent, monitor, memory, vCPUs and devices of the guest have to be the same, and this host not to have booted since
    #[arg(long, value_name = "DIRECTORY", requires = "image", conflicts_with = "disk")]
    warm: Option<PathBuf>,
    /// How long it may take from the start of its guest; then the command is told to end as by SIGTERM, and the status is 124
    #[arg(long, value_name = "SECONDS", requires = "image", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    timeout: Option<u64>,
    /// How long the guest may take to boot
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86400))]
    boot_timeout: u64,
    /// The agent's program [default: `coracle-agent` beside coraclectl]
    #[arg(long, value_name = "PATH", env = "CORACLE_AGENT")]
    agent: Option<PathBuf>,
}

/// How a machine is run in the foreground, whatever it begins with.
#[derive(Debug, Args)]
pub(crate) struct ForegroundArgs {
    /// What the machine is called [default: vm- and the process id]
    #[arg(long, visible_alias = "id")]
    name: Option<Name>,
    /// How long the guest may take to shut down when it is asked to, or the command of an IMAGE to end
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=86400))]
    stop_timeout: u64,
    /// Keep the runtime directory, with the monitor's log, when the machine has ended
    #[arg(long)]
    keep: bool,
    /// The monitor's program [default: `coracle` beside coraclectl, then in PATH]
    #[arg(long, value_name = "PATH", env = "CORACLE_MONITOR")]
    monitor: Option<PathBuf>,
    /// One more argument for the monitor, such as --monitor-arg=--no-seccomp
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    monitor_arg: Vec<OsString>,
}

/// Why a machine was not run.
#[derive(Debug, Error)]
pub(crate) enum RunError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Signals(#[from] SignalsError),
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// Runs a machine until it ends; returns the exit status.
///
/// # Errors
///
/// When it could not be started or watched. Nothing is left running or lying about in any case.
pub(crate) fn run(args: &RunArgs, format: Format) -> Result<u8, RunError> {
    let status = match &args.image {
        Some(image) => command::run(args, image, format)?,
        None => foreground(
            &args.foreground,
            &machine::steps(args, None)?,
            &machine::start(),
            format,
        )?,
    };
    // With a command for each machine nobody else may come by: what others have left that were killed.
    RuntimeRoot::of_this_user().remove_stale();
    Ok(status)
}

/// Configures a machine by `steps`, lets it go by `start` and stays with it until it ends; returns the exit status.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn foreground(
    args: &ForegroundArgs,
    steps: &[Step],
    start: &Step,
    format: Format,
) -> Result<u8, RunError> {
    let signals = Signals::watch()?;
    let (name, dir) = args.place()?;
    let input = Input::of_this_process();
    let started = Instant::now();
    // Programs are told what chose the status, and only the monitor can say; people read it themselves.
    let errors = match format {
        Format::Json => Stdio::piped(),
        Format::Text => Stdio::inherit(),
    };
    let files = Files {
        input: input.stdio(),
        output: Stdio::inherit(),
        errors,
    };
    let mut monitor = args.start(&name, &dir, files)?;
    let last_words = monitor.take_stderr().map(LastWords::listen);
    let pid = monitor.process().pid();
    let guest_wait = Duration::from_secs(args.stop_timeout);
    let ended = Session::new(monitor, &dir.socket(), &signals, guest_wait).run(steps, start, input);
    let last_words = last_words.and_then(LastWords::wait);
    if ended.as_ref().map_or_else(is_unexplained, has_failed) {
        print_log_tail(&dir.log(), format);
    }
    args.tell_what_is_kept(&dir);
    let outcome = ended?;
    if format == Format::Text
        && has_failed(&outcome)
        && let Some(signal) = outcome.monitor.signal()
    {
        note(format_args!(
            "the monitor was killed by signal {signal}, and the guest with it"
        ));
    }
    if format == Format::Json {
        let seconds = started.elapsed().as_secs_f64();
        let ended = Ended::of(&outcome, last_words.as_deref());
        let pid = pid.as_raw_nonzero().get();
        note_json(&summary(&outcome, ended, &name, pid, seconds));
    }
    Ok(outcome.status())
}

impl ForegroundArgs {
    /// The machine's name, and a runtime directory for it.
    fn place(&self) -> Result<(Name, RuntimeDir), RuntimeDirError> {
        let name = self.name.clone().unwrap_or_else(|| unused_name("vm"));
        let at_the_end = if self.keep {
            AtTheEnd::Keep
        } else {
            AtTheEnd::Remove
        };
        let dir = RuntimeRoot::of_this_user().create(&name)?.then(at_the_end);
        Ok((name, dir))
    }

    /// Starts a monitor that ends with this process.
    fn start(&self, name: &Name, dir: &RuntimeDir, files: Files) -> Result<Monitor, MonitorError> {
        let launch = Launch {
            program: &monitor::program(self.monitor.as_deref()),
            dir,
            name,
            more_arguments: &self.monitor_arg,
            tie: Tie::Child,
        };
        Monitor::start(launch, files)
    }

    fn tell_what_is_kept(&self, dir: &RuntimeDir) {
        if self.keep {
            note(format_args!("kept {}", dir.path().display()));
        }
    }
}

fn unused_name(kind: &str) -> Name {
    let name = format!("{kind}-{}", std::process::id());
    name.parse().expect("letters, a hyphen and digits are a name")
}

/// Whether the reason is left to the monitor's log.
fn is_unexplained(error: &SessionError) -> bool {
    !matches!(error, SessionError::Refused { .. })
}

/// Whether the monitor, not its guest, has something to explain.
fn has_failed(outcome: &Outcome) -> bool {
    let ended = &outcome.monitor;
    let by_itself = outcome.asked.is_none() && ended.signal() != Some(libc::SIGTERM);
    by_itself
        && ended
            .code()
            .is_none_or(|code| code >= i32::from(MONITOR_STATUS_MIN))
}

fn summary(outcome: &Outcome, ended: Option<Ended>, name: &Name, pid: i32, seconds: f64) -> Value {
    let (stopped_by, signal) = match outcome.asked {
        None => (None, None),
        Some(Asked::ByKey) => (Some("key"), None),
        Some(Asked::BySignal(signal)) => (Some("signal"), Some(signal)),
    };
    json!({
        "id": name.as_str(),
        "pid": pid,
        "status": outcome.status(),
        "ended": ended,
        "monitor_status": outcome.monitor.code(),
        "stopped_by": stopped_by,
        "signal": signal,
        "seconds": seconds,
    })
}

/// Shows the last lines of a monitor's log, if it has written any; to programs in one line of JSON.
fn print_log_tail(log: &Path, format: Format) {
    let last = log_tail(log);
    match format {
        Format::Json if last.is_empty() => {}
        Format::Json => note_json(&json!({ "monitor_log": last })),
        Format::Text => last
            .iter()
            .for_each(|line| note(format_args!("monitor's log: {line}"))),
    }
}

/// The last lines of a monitor's log; none of one that could not even open it, and has said so on standard error.
pub(crate) fn log_tail(log: &Path) -> Vec<String> {
    last_lines(&last_bytes(log).unwrap_or_default())
}

/// So many of the last lines as are worth showing.
fn last_lines(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(LOG_TAIL_LINES_MAX);
    let last = lines.get(skipped..).unwrap_or_default();
    last.iter().copied().map(str::to_owned).collect()
}

fn last_bytes(log: &Path) -> std::io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES_MAX)))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
