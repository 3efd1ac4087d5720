//! The command line: that of Firecracker's jailer, and flags of our own.

mod flags;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use flags::{Given, Words};

/// Longest name of a machine.
const ID_LENGTH_MAX: usize = 64;
/// Most files that a jail is given.
pub(crate) const FILES_MAX: usize = 64;
const RESTARTS_MAX_DEFAULT: u32 = 5;
const RESTART_DELAY_MS_DEFAULT: u64 = 100;
/// Longest wait before a restart.
pub(crate) const RESTART_DELAY_MS_MAX: u64 = 30_000;

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Asked {
    /// A text, and nothing else.
    Text(String),
    /// A jail.
    Jail(Box<Request>),
}

/// A jail to be, checked as far as the words go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Name of the machine.
    pub(crate) id: String,
    /// The monitor.
    pub(crate) exec_file: PathBuf,
    /// Whether the jail gets a copy of it.
    pub(crate) copy_exec: bool,
    /// Who runs it.
    pub(crate) uid: u32,
    /// With which group.
    pub(crate) gid: u32,
    /// Where jails are made.
    pub(crate) base: PathBuf,
    /// What is to be written into files of its cgroups.
    pub(crate) cgroups: Vec<Setting>,
    /// Version of the hierarchy.
    pub(crate) cgroup_version: CgroupVersion,
    /// The cgroup above, relative to the hierarchy.
    pub(crate) parent_cgroup: Option<PathBuf>,
    /// A network namespace to join.
    pub(crate) netns: Option<PathBuf>,
    /// A PID namespace of its own.
    pub(crate) new_pid_ns: bool,
    /// Without a terminal.
    pub(crate) daemonize: bool,
    /// Bounds of the process.
    pub(crate) limits: Limits,
    /// Files that the jail is given.
    pub(crate) files: Vec<Shown>,
    /// Whether what was made is removed at the end.
    pub(crate) cleanup: bool,
    /// How the monitor is looked after, if it is.
    pub(crate) supervision: Option<Supervision>,
    /// The monitor's own arguments.
    pub(crate) arguments: Vec<OsString>,
}

/// A file of a cgroup and what is written to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// Its name: `memory.limit_in_bytes`, say.
    pub(crate) file: String,
    /// What is written.
    pub(crate) value: String,
}

/// Version of the cgroup hierarchy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CgroupVersion {
    /// One hierarchy for each controller.
    V1,
    /// One for all.
    V2,
}

/// Bounds of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Largest file that it can make, in bytes.
    pub(crate) file_size: Option<u64>,
    /// One more than the largest descriptor; there is a default.
    pub(crate) no_file: Option<u64>,
}

/// A file of the host that is shown in the jail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Where it comes from.
    pub(crate) source: Source,
    /// Its path in the jail, relative to the root; `None`: the last part of its own.
    pub(crate) name: Option<PathBuf>,
}

/// Where a file comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A path.
    Path(PathBuf),
    /// A descriptor that was inherited.
    Fd(i32),
}

/// How a monitor is looked after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Supervision {
    /// Where records go; `None`: standard error.
    pub(crate) record: Option<PathBuf>,
    /// Restarts in a row, at most; 0: never.
    pub(crate) restarts_max: u32,
    /// The first wait.
    pub(crate) delay: Duration,
}

/// Reads the command line, without its first word.
///
/// # Errors
///
/// When it is not understood, or contradicts itself.
pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Asked, CliError> {
    match flags::sorted(words)? {
        Words::Help => Ok(Asked::Text(flags::help())),
        Words::Version => Ok(Asked::Text(format!(
            "Coracle jailer v{}\n",
            env!("CARGO_PKG_VERSION")
        ))),
        Words::Flags { given, rest } => request(&given, rest).map(|request| Asked::Jail(Box::new(request))),
    }
}

fn request(given: &Given, arguments: Vec<OsString>) -> Result<Request, CliError> {
    let has = |flag: &str| given.contains_key(flag);
    let path = |flag: &str| first(given, flag).map(PathBuf::from);
    let request = Request {
        id: id(text(given, "id")?.unwrap_or_default())?,
        exec_file: path("exec-file").unwrap_or_default(),
        copy_exec: has("copy-exec"),
        uid: number(given, "uid")?,
        gid: number(given, "gid")?,
        base: path("chroot-base-dir").unwrap_or_else(|| PathBuf::from("/srv/jailer")),
        cgroups: texts(given, "cgroup")?
            .into_iter()
            .map(setting)
            .collect::<Result<_, _>>()?,
        cgroup_version: match text(given, "cgroup-version")? {
            None | Some("1") => CgroupVersion::V1,
            Some("2") => CgroupVersion::V2,
            Some(word) => {
                return Err(CliError::CgroupVersion {
                    word: word.to_owned(),
                });
            }
        },
        parent_cgroup: path("parent-cgroup").map(beneath_hierarchy).transpose()?,
        netns: path("netns"),
        new_pid_ns: has("new-pid-ns"),
        daemonize: has("daemonize"),
        limits: limits(texts(given, "resource-limit")?)?,
        files: files(given)?,
        cleanup: has("cleanup"),
        supervision: supervision(given)?,
        arguments,
    };
    let is_recorded = request.supervision.as_ref().is_none_or(|s| s.record.is_some());
    if request.daemonize && !is_recorded {
        return Err(CliError::NowhereToRecord);
    }
    Ok(request)
}

fn id(word: &str) -> Result<String, CliError> {
    let is_plain = word
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if word.is_empty() || word.len() > ID_LENGTH_MAX || !is_plain {
        return Err(CliError::Id {
            word: word.to_owned(),
        });
    }
    Ok(word.to_owned())
}

fn setting(word: &str) -> Result<Setting, CliError> {
    let parts = word.split_once('=').filter(|(file, value)| {
        let controller = file.split_once('.').map(|(controller, _)| controller);
        controller.is_some_and(|name| !name.is_empty()) && !file.contains('/') && !value.is_empty()
    });
    let (file, value) = parts.ok_or_else(|| CliError::Cgroup {
        word: word.to_owned(),
    })?;
    Ok(Setting {
        file: file.to_owned(),
        value: value.to_owned(),
    })
}

/// A path that cannot lead out of the hierarchy.
fn beneath_hierarchy(path: PathBuf) -> Result<PathBuf, CliError> {
    let is_beneath = path.components().all(|part| matches!(part, Component::Normal(_)));
    is_beneath
        .then_some(())
        .ok_or_else(|| CliError::ParentCgroup { path: path.clone() })?;
    Ok(path)
}

fn limits(words: Vec<&str>) -> Result<Limits, CliError> {
    let mut limits = Limits::default();
    for word in words {
        let bad = || CliError::Limit {
            word: word.to_owned(),
        };
        let (name, value) = word.split_once('=').ok_or_else(bad)?;
        let value = Some(value.parse().map_err(|_| bad())?);
        match name {
            "fsize" => limits.file_size = value,
            "no-file" => limits.no_file = value,
            _ => return Err(bad()),
        }
    }
    Ok(limits)
}

fn files(given: &Given) -> Result<Vec<Shown>, CliError> {
    let mut files = Vec::new();
    for word in given.get("file").into_iter().flatten() {
        let (source, name) = parted(word);
        let source = PathBuf::from(source);
        if source.as_os_str().is_empty() || source.components().any(|part| part == Component::ParentDir) {
            return Err(CliError::File { word: word.clone() });
        }
        files.push((word, Source::Path(source), name));
    }
    for word in given.get("fd").into_iter().flatten() {
        let (number, name) = parted(word);
        let number = number.to_str().and_then(|number| number.parse::<i32>().ok());
        // Those below are the monitor's input and output.
        let number = number.filter(|number| *number > 2);
        let number = number.ok_or_else(|| CliError::Fd { word: word.clone() })?;
        files.push((word, Source::Fd(number), name));
    }
    if files.len() > FILES_MAX {
        return Err(CliError::Files { count: files.len() });
    }
    let shown = |(word, source, name): (&OsString, Source, Option<OsString>)| {
        let name = name.map(PathBuf::from);
        match name.as_deref().is_none_or(is_beneath_root) {
            true => Ok(Shown { source, name }),
            false => Err(CliError::Name { word: word.clone() }),
        }
    };
    files.into_iter().map(shown).collect()
}

/// What stands before the last colon, and what stands behind it.
fn parted(word: &OsStr) -> (OsString, Option<OsString>) {
    let bytes = word.as_bytes();
    match bytes.iter().rposition(|byte| *byte == b':') {
        Some(at) => {
            let (source, name) = bytes.split_at(at);
            let name = name.strip_prefix(b":").unwrap_or_default();
            (
                OsString::from_vec(source.to_vec()),
                Some(OsString::from_vec(name.to_vec())),
            )
        }
        None => (word.to_owned(), None),
    }
}

/// Whether a path is a name in the jail: relative, without `..`, and not the jail itself.
pub(crate) fn is_beneath_root(path: &Path) -> bool {
    path.components().count() > 0 && path.components().all(|part| matches!(part, Component::Normal(_)))
}

fn supervision(given: &Given) -> Result<Option<Supervision>, CliError> {
    let is_asked = given.contains_key("supervise");
    for flag in ["record", "restart", "restart-limit", "restart-delay-ms"] {
        if given.contains_key(flag) && !is_asked {
            return Err(CliError::NeedsSupervise { flag });
        }
    }
    let restarts_max = match text(given, "restart")? {
        None | Some("never") => 0,
        Some("on-failure") => number_or(given, "restart-limit", RESTARTS_MAX_DEFAULT)?,
        Some(word) => {
            return Err(CliError::Restart {
                word: word.to_owned(),
            });
        }
    };
    let delay_ms: u64 = number_or(given, "restart-delay-ms", RESTART_DELAY_MS_DEFAULT)?;
    let supervision = Supervision {
        record: first(given, "record").map(PathBuf::from),
        restarts_max,
        delay: Duration::from_millis(delay_ms.min(RESTART_DELAY_MS_MAX)),
    };
    Ok(is_asked.then_some(supervision))
}

fn first<'a>(given: &'a Given, flag: &str) -> Option<&'a OsString> {
    given.get(flag).and_then(|values| values.first())
}

fn text<'a>(given: &'a Given, flag: &'static str) -> Result<Option<&'a str>, CliError> {
    Ok(texts(given, flag)?.first().copied())
}

fn texts<'a>(given: &'a Given, flag: &'static str) -> Result<Vec<&'a str>, CliError> {
    let values = given.get(flag).into_iter().flatten();
    values
        .map(|value| value.to_str().ok_or(CliError::NoText { flag }))
        .collect()
}

fn number(given: &Given, flag: &'static str) -> Result<u32, CliError> {
    let word = text(given, flag)?.unwrap_or_default();
    // The largest number means "leave it as it is" to the kernel.
    let number = word.parse().ok().filter(|number| *number != u32::MAX);
    number.ok_or_else(|| CliError::Number {
        flag,
        word: word.to_owned(),
    })
}

fn number_or<T: std::str::FromStr>(given: &Given, flag: &'static str, default: T) -> Result<T, CliError> {
    let Some(word) = text(given, flag)? else {
        return Ok(default);
    };
    word.parse().map_err(|_| CliError::Number {
        flag,
        word: word.to_owned(),
    })
}

/// What is wrong with the command line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// No such flag.
    #[error("`{}` is no flag; see --help, and write what is meant for the monitor after --", word.display())]
    Unknown {
        /// The word.
        word: OsString,
    },
    /// A flag that has to be there.
    #[error("--{flag} is missing; see --help")]
    Missing {
        /// The flag.
        flag: &'static str,
    },
    /// A flag without its value.
    #[error("--{flag} needs a value: --{flag} {called}")]
    Value {
        /// The flag.
        flag: &'static str,
        /// What the value is called.
        called: &'static str,
    },
    /// A value for a flag that has none.
    #[error("--{flag} takes no value")]
    NoValue {
        /// The flag.
        flag: &'static str,
    },
    /// A flag that has one value.
    #[error("--{flag} is given more than once")]
    Twice {
        /// The flag.
        flag: &'static str,
    },
    /// No text.
    #[error("the value of --{flag} is not UTF-8")]
    NoText {
        /// The flag.
        flag: &'static str,
    },
    /// No number.
    #[error("--{flag} is `{word}`, which is no number that it can be")]
    Number {
        /// The flag.
        flag: &'static str,
        /// As asked.
        word: String,
    },
    /// No name.
    #[error("--id is `{word}`; choose 1 to {ID_LENGTH_MAX} letters, digits and dashes")]
    Id {
        /// As asked.
        word: String,
    },
    /// No setting.
    #[error(
        "--cgroup is `{word}`; write FILE=VALUE, where FILE is a file of a controller such as cpu.shares"
    )]
    Cgroup {
        /// As asked.
        word: String,
    },
    /// No version.
    #[error("--cgroup-version is `{word}`; there are 1 and 2")]
    CgroupVersion {
        /// As asked.
        word: String,
    },
    /// A path that may lead out of the hierarchy.
    #[error("--parent-cgroup is `{}`; write a relative path without . and ..", path.display())]
    ParentCgroup {
        /// As asked.
        path: PathBuf,
    },
    /// No limit.
    #[error("--resource-limit is `{word}`; write fsize=BYTES or no-file=DESCRIPTORS")]
    Limit {
        /// As asked.
        word: String,
    },
    /// A file that cannot be named so.
    #[error("--file is `{}`; write SRC or SRC:NAME, where SRC is a path without ..", word.display())]
    File {
        /// As asked.
        word: OsString,
    },
    /// No descriptor.
    #[error("--fd is `{}`; write N or N:NAME, where N is an open descriptor from 3 on", word.display())]
    Fd {
        /// As asked.
        word: OsString,
    },
    /// A name that is not one in the jail.
    #[error("`{}` names no file in the jail; write a relative path without . and .. after the colon", word.display())]
    Name {
        /// As asked.
        word: OsString,
    },
    /// Too many.
    #[error("{count} files are given; a jail takes {FILES_MAX}, and directories count as one")]
    Files {
        /// So many.
        count: usize,
    },
    /// No policy.
    #[error("--restart is `{word}`; there are never and on-failure")]
    Restart {
        /// As asked.
        word: String,
    },
    /// A flag that means nothing alone.
    #[error("--{flag} says how to supervise; give --supervise too")]
    NeedsSupervise {
        /// The flag.
        flag: &'static str,
    },
    /// Nobody would see the record.
    #[error("--daemonize leaves no standard error to record to; give --supervise a file with --record")]
    NowhereToRecord,
}
