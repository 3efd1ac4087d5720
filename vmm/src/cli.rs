//! The command line: Firecracker's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::PathBuf;

use clap::Parser;
use clap::error::ErrorKind;
use rustix::time::{ClockId, clock_gettime};

use crate::api::http::BODY_BYTES_MAX_DEFAULT;
use crate::config::{
    IdError, Level, LoggerConfig, MetricsConfig, UnknownLevel, check_device_id, check_instance_id,
};
use crate::end::{EXIT_BAD_ARGUMENT, EXIT_BAD_CONFIGURATION};
use crate::seccomp::Filters;
use crate::state::{FORMAT_VERSION, HEADER_BYTES, Header, StateError};

/// Largest `--http-api-max-payload-size`, in bytes.
pub const BODY_BYTES_MAX_MAX: usize = 1 << 30;

/// What the process was asked to do, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// Name of the instance.
    pub id: String,
    /// Where the API listens; `None` for no API.
    pub api_sock: Option<PathBuf>,
    /// A configuration to start at once.
    pub config_file: Option<PathBuf>,
    /// What to log, and where.
    pub logger: LoggerConfig,
    /// Where metrics go, if the command line says so.
    pub metrics: Option<MetricsConfig>,
    /// Longest body of a request.
    pub body_bytes_max: usize,
    /// A file with what the guest may ask for about itself.
    pub metadata: Option<PathBuf>,
    /// Longest such content as text.
    pub metadata_bytes_max: usize,
    /// Whether the guest gets a boot timer.
    pub boot_timer: bool,
    /// Keys of leases that may be taken from processes that have ended, by drive.
    pub takes_over: BTreeMap<String, u64>,
    /// The keys of which one must have signed each snapshot that is loaded.
    pub trusted_keys: Option<PathBuf>,
    /// When the process was started, by whoever started it.
    pub start_times: StartTimes,
    /// What its threads may ask of the kernel.
    pub filters: Filters,
    /// Whether Landlock says which files they may open.
    pub landlock: bool,
}

/// Times that a starter took, for the metrics of how long the start has taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StartTimes {
    /// Monotonic clock at the start of the process, in microseconds.
    pub wall_us: Option<u64>,
    /// CPU time of the process at its start, in microseconds.
    pub cpu_us: Option<u64>,
    /// CPU time that the starter had used, in microseconds.
    pub parent_cpu_us: Option<u64>,
}

impl StartTimes {
    /// Wall and CPU time from the start of the process to now, in microseconds, of what the starter
    /// told; the CPU time includes the starter's.
    pub fn elapsed_us(&self) -> (Option<u64>, Option<u64>) {
        let since = |clock, start_us: u64| {
            let now = clock_gettime(clock);
            let now_us = now.tv_sec.cast_unsigned() * 1_000_000 + now.tv_nsec.cast_unsigned() / 1000;
            now_us.saturating_sub(start_us)
        };
        let wall_us = self.wall_us.map(|start_us| since(ClockId::Monotonic, start_us));
        let cpu_us = self
            .cpu_us
            .map(|start_us| since(ClockId::ProcessCPUTime, start_us));
        (
            wall_us,
            cpu_us.map(|us| us.saturating_add(self.parent_cpu_us.unwrap_or(0))),
        )
    }
}

/// Reads the command line, whose first word is the program.
///
/// # Errors
///
/// Something is wrong with it; or it only asks for a text, which comes the same way.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Arguments, CliError> {
    let flags = Flags::try_parse_from(words).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => CliError::Text {
            text: error.to_string(),
        },
        _ => CliError::Syntax {
            text: error.to_string(),
        },
    })?;
    flags.refuse_what_is_not_built()?;
    if flags.snapshot_version {
        return Err(CliError::Text {
            text: format!("v{FORMAT_VERSION}\n"),
        });
    }
    if let Some(path) = flags.describe_snapshot {
        return Err(described(path));
    }
    check_instance_id(&flags.id)?;
    let level = flags.level.as_deref().map(str::parse::<Level>).transpose()?;
    if flags.http_api_max_payload_size > BODY_BYTES_MAX_MAX {
        return Err(CliError::BodyBytes {
            bytes: flags.http_api_max_payload_size,
        });
    }
    Ok(Arguments {
        id: flags.id,
        api_sock: (!flags.no_api).then_some(flags.api_sock),
        config_file: flags.config_file,
        logger: LoggerConfig {
            log_path: flags.log_path,
            level,
            show_level: flags.show_level.then_some(true),
            show_log_origin: flags.show_log_origin.then_some(true),
            module: flags.module,
        },
        metrics: flags.metrics_path.map(|metrics_path| MetricsConfig {
            metrics_path,
            emit_id: false,
            properties: None,
        }),
        body_bytes_max: flags.http_api_max_payload_size,
        metadata: flags.metadata,
        metadata_bytes_max: flags.mmds_size_limit.unwrap_or(flags.http_api_max_payload_size),
        boot_timer: flags.boot_timer,
        takes_over: take_overs(&flags.takes_over)?,
        trusted_keys: flags.trusted_keys,
        filters: match flags.seccomp_filter {
            Some(path) => Filters::Own(path),
            None if flags.no_seccomp => Filters::None,
            None => Filters::BuiltIn,
        },
        landlock: !flags.no_landlock,
        start_times: StartTimes {
            wall_us: flags.start_time_us,
            cpu_us: flags.start_time_cpu_us,
            parent_cpu_us: flags.parent_cpu_time_us,
        },
    })
}

/// The keys by drive, of words like `root=1f`.
fn take_overs(words: &[String]) -> Result<BTreeMap<String, u64>, CliError> {
    let mut keys = BTreeMap::new();
    for word in words {
        let parsed = word.split_once('=').and_then(|(id, key)| {
            // `from_str_radix` would take a sign.
            let is_hex = key.bytes().all(|byte| byte.is_ascii_hexdigit());
            let key = u64::from_str_radix(key, 16).ok().filter(|_| is_hex)?;
            check_device_id(id).ok().map(|()| (id, key))
        });
        let (id, key) = parsed.ok_or_else(|| CliError::TakesOver { word: word.clone() })?;
        if keys.insert(id.to_owned(), key).is_some() {
            return Err(CliError::TakesOverTwice {
                drive_id: id.to_owned(),
            });
        }
    }
    Ok(keys)
}

/// Why the process does not go on after its command line.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// It was asked only for a text, which goes to standard output.
    #[error("{text}")]
    Text {
        /// The text.
        text: String,
    },
    /// The words make no sense.
    #[error("{text}")]
    Syntax {
        /// What is wrong, with a hint.
        text: String,
    },
    /// A flag whose feature there is not.
    #[error("--{flag} asks for {what}, which this version does not have; leave it out")]
    NotBuilt {
        /// The flag.
        flag: &'static str,
        /// The feature.
        what: &'static str,
    },
    /// A bad name.
    #[error("--id")]
    Id(#[from] IdError),
    /// No such level.
    #[error("--level")]
    Level(#[from] UnknownLevel),
    /// No drive, or no key.
    #[error(
        "--takes-over is `{word}`; write DRIVE_ID=KEY, where KEY is the key of the lease, up to 16 hex digits"
    )]
    TakesOver {
        /// As asked.
        word: String,
    },
    /// Two keys for one drive.
    #[error("--takes-over names drive `{drive_id}` twice; a lease has one holder")]
    TakesOverTwice {
        /// The drive.
        drive_id: String,
    },
    /// No state file of a snapshot.
    #[error("--describe-snapshot {}", path.display())]
    Describe {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: DescribeError,
    },
    /// A limit that is none.
    #[error("--http-api-max-payload-size is {bytes}; choose at most {BODY_BYTES_MAX_MAX}")]
    BodyBytes {
        /// As asked.
        bytes: usize,
    },
}

/// Why a file is not described.
#[derive(Debug, thiserror::Error)]
pub enum DescribeError {
    /// It cannot be read.
    #[error("it cannot be read")]
    Host(#[source] io::Error),
    /// It is something else.
    #[error(transparent)]
    State(#[from] StateError),
}

impl CliError {
    /// The status that the process ends with: Firecracker's.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Text { .. } => 0,
            Self::Level(_) => EXIT_BAD_CONFIGURATION,
            Self::Syntax { .. }
            | Self::NotBuilt { .. }
            | Self::Id(_)
            | Self::TakesOver { .. }
            | Self::TakesOverTwice { .. }
            | Self::Describe { .. }
            | Self::BodyBytes { .. } => EXIT_BAD_ARGUMENT,
        }
    }
}

/// Runs one microVM.
#[derive(Debug, Parser)]
#[command(name = "Coracle", version = concat!("v", env!("CARGO_PKG_VERSION")))]
struct Flags {
    /// Path of the Unix socket on which the API is served
    #[arg(long, default_value = "/run/firecracker.socket", value_name = "PATH")]
    api_sock: PathBuf,
    /// Name of the instance: letters, digits and dashes
    #[arg(long, default_value = "anonymous-instance")]
    id: String,
    /// A configuration in JSON, to be started at once
    #[arg(long, value_name = "PATH")]
    config_file: Option<PathBuf>,
    /// Serve no API; needs --config-file
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// Least important level that is logged: Off, Error, Warning, Info, Debug or Trace
    #[arg(long)]
    level: Option<String>,
    /// A file or FIFO to log to, instead of standard output
    #[arg(long, value_name = "PATH")]
    log_path: Option<PathBuf>,
    /// Log only modules whose path starts with this
    #[arg(long)]
    module: Option<String>,
    /// Show the level in log lines
    #[arg(long)]
    show_level: bool,
    /// Show the source line in log lines
    #[arg(long)]
    show_log_origin: bool,
    /// A file or FIFO to write metrics to
    #[arg(long, value_name = "PATH")]
    metrics_path: Option<PathBuf>,
    /// Longest body of an API request, in bytes
    #[arg(long, default_value_t = BODY_BYTES_MAX_DEFAULT, value_name = "BYTES")]
    http_api_max_payload_size: usize,
    /// Longest content of the metadata service, in bytes; as long as a body of a request unless given
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,
    /// Monotonic clock when the process was started, in microseconds
    #[arg(long, value_name = "US", hide = true)]
    start_time_us: Option<u64>,
    /// CPU time when the process was started, in microseconds
    #[arg(long, value_name = "US", hide = true)]
    start_time_cpu_us: Option<u64>,
    /// CPU time that the starter had used, in microseconds
    #[arg(long, value_name = "US", hide = true)]
    parent_cpu_time_us: Option<u64>,
    /// Give the guest a device that logs its boot time: a byte 123 written to address 0xc0000000
    #[arg(long)]
    boot_timer: bool,
    /// Let a drive take the lease of its network image from the process that held it by KEY (hexadecimal), which the caller
    /// knows to have ended, as a parent that has reaped it does; may be given for several drives
    #[arg(long, value_name = "DRIVE_ID=KEY")]
    takes_over: Vec<String>,
    /// Load only snapshots that a key in this file has signed: Ed25519 public keys in PEM, one after the other
    #[arg(long, value_name = "PATH")]
    trusted_keys: Option<PathBuf>,
    /// Run without filters of system calls: for debugging
    #[arg(long, conflicts_with = "seccomp_filter")]
    no_seccomp: bool,
    /// Filters of system calls in place of those that are built in: JSON, a filter for each kind of thread
    #[arg(long, value_name = "PATH")]
    seccomp_filter: Option<PathBuf>,
    /// Confine the process to no files by Landlock: for debugging
    #[arg(long)]
    no_landlock: bool,
    /// A file with JSON that the guest may ask for about itself (PUT /mmds)
    #[arg(long, value_name = "PATH")]
    metadata: Option<PathBuf>,
    /// Print the version of a snapshot's state file, and end
    #[arg(long, value_name = "PATH")]
    describe_snapshot: Option<PathBuf>,
    /// Print the version of the snapshots that this program makes, and end
    #[arg(long)]
    snapshot_version: bool,
    /// Not built yet: PCI
    #[arg(long)]
    enable_pci: bool,
}

/// The version of the snapshot's state file `path`, or what is wrong with it.
fn described(path: PathBuf) -> CliError {
    let mut start = vec![0; HEADER_BYTES];
    let read = File::open(&path).and_then(|mut file| file.read_exact(&mut start));
    match read
        .map_err(DescribeError::Host)
        .and_then(|()| Ok(Header::parse(&start)?))
    {
        Ok(header) => CliError::Text {
            text: format!("v{}\n", header.format),
        },
        Err(source) => CliError::Describe { path, source },
    }
}

impl Flags {
    fn refuse_what_is_not_built(&self) -> Result<(), CliError> {
        let flags = [(self.enable_pci, "enable-pci", "PCI")];
        match flags.into_iter().find(|(is_set, ..)| *is_set) {
            Some((_, flag, what)) => Err(CliError::NotBuilt { flag, what }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::*;

    fn read(line: &str) -> Result<Arguments, CliError> {
        parse(
            ["coracle"]
                .into_iter()
                .chain(line.split_whitespace())
                .map(OsString::from),
        )
    }

    #[test]
    fn a_line_without_words_has_firecrackers_defaults() {
        let arguments = read("").unwrap();
        assert_eq!(arguments.api_sock, Some("/run/firecracker.socket".into()));
        assert_eq!(
            (arguments.id.as_str(), arguments.body_bytes_max),
            ("anonymous-instance", 51_200)
        );
        assert_eq!(
            (arguments.logger, arguments.boot_timer),
            (LoggerConfig::default(), false)
        );
    }

    #[test]
    fn what_a_jailer_passes_is_understood() {
        let arguments = read(
            "--id vm-1 --start-time-us 5 --start-time-cpu-us 6 --parent-cpu-time-us 7 --api-sock a.sock --no-seccomp \
             --config-file vm.json --log-path log --level warning --show-level --show-log-origin --module coracle_vmm \
             --metrics-path m --http-api-max-payload-size 1000 --mmds-size-limit 9 --boot-timer",
        )
        .unwrap();
        let times = StartTimes {
            wall_us: Some(5),
            cpu_us: Some(6),
            parent_cpu_us: Some(7),
        };
        assert_eq!(arguments.start_times, times);
        assert_eq!(arguments.logger.level, Some(Level::Warn));
        assert_eq!((arguments.body_bytes_max, arguments.boot_timer), (1000, true));
        assert_eq!(arguments.metadata_bytes_max, 9);
        assert_eq!(read("--trusted-keys k").unwrap().trusted_keys, Some("k".into()));
        assert_eq!(read("--no-api --config-file vm.json").unwrap().api_sock, None);
    }

    #[test]
    fn leases_are_taken_over_by_drive_and_key() {
        let arguments = read("--takes-over root=1F --takes-over data=ffffffffffffffff").unwrap();
        let keys = [("data".to_owned(), u64::MAX), ("root".to_owned(), 0x1f)];
        assert_eq!(arguments.takes_over, BTreeMap::from(keys));
    }

    #[test]
    fn a_line_that_is_wrong_ends_with_firecrackers_status() {
        for (line, status, reason) in [
            ("--foo", 153, "unexpected argument '--foo'"),
            ("extra", 153, "unexpected argument 'extra'"),
            ("--api-sock", 153, "a value is required"),
            ("--no-api", 153, "--config-file"),
            ("--id a --id b", 153, "cannot be used multiple times"),
            ("--id a_b", 153, "--id"),
            ("--no-seccomp --seccomp-filter f", 153, "cannot be used with"),
            ("--http-api-max-payload-size x", 153, "invalid"),
            ("--http-api-max-payload-size 1073741825", 153, "at most"),
            ("--level loud", 152, "--level"),
            ("--takes-over root", 153, "DRIVE_ID=KEY"),
            ("--takes-over root=", 153, "DRIVE_ID=KEY"),
            ("--takes-over root=+1", 153, "DRIVE_ID=KEY"),
            ("--takes-over root=11112222333344445", 153, "up to 16 hex digits"),
            ("--takes-over a/b=1", 153, "DRIVE_ID=KEY"),
            ("--takes-over a=1 --takes-over a=2", 153, "`a` twice"),
            ("--describe-snapshot /nowhere/f", 153, "/nowhere/f"),
            ("--snapshot-version", 0, "v1"),
            ("--enable-pci", 153, "PCI"),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.to_string().contains(reason), "{line}: {error}");
            assert_eq!(error.exit_status(), status, "{line}");
        }
    }

    #[test]
    fn the_start_is_timed_on_the_clocks_that_the_starter_used() {
        let (wall_us, cpu_us) = StartTimes {
            wall_us: Some(0),
            cpu_us: Some(0),
            parent_cpu_us: Some(7),
        }
        .elapsed_us();
        assert!(wall_us.unwrap() > 0 && cpu_us.unwrap() > 7);
        let future = StartTimes {
            wall_us: Some(u64::MAX),
            ..StartTimes::default()
        };
        assert_eq!(future.elapsed_us(), (Some(0), None));
    }

    #[test]
    fn help_and_version_are_texts() {
        let version = read("--version").unwrap_err();
        assert_eq!(
            version.to_string(),
            concat!("Coracle v", env!("CARGO_PKG_VERSION"), "\n")
        );
        assert_eq!(version.exit_status(), 0);
        assert!(
            read("--help")
                .unwrap_err()
                .to_string()
                .contains("--http-api-max-payload-size <BYTES>")
        );
    }
}
