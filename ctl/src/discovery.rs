//! Finds the monitors that run on this host: by this user's runtime directories, and by `/proc`.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::name::Name;
use crate::runtime_dir::RuntimeRoot;

/// The programs that answer the API; Firecracker's own is among them because clients of it are ours.
const MONITOR_NAMES: [&str; 2] = ["coracle", "firecracker"];
/// What a monitor uses that was not told another socket.
const DEFAULT_SOCKET: &str = "/run/firecracker.socket";
/// What a monitor is called that was not told another id.
const DEFAULT_ID: &str = "anonymous-instance";

/// Why an argument names no machine.
#[derive(Debug, Error)]
pub(crate) enum FindError {
    #[error("no machine named {0} is running: `coraclectl ps` lists those that do")]
    Unknown(String),
    #[error("no machine is running on this host that this user can see")]
    NoneRuns,
    #[error("{count} machines are running: say which one with --vm, `coraclectl ps` lists them")]
    SeveralRun { count: usize },
    #[error("{count} machines are named {name}: name the socket instead, {sockets}")]
    Ambiguous {
        name: String,
        count: usize,
        sockets: String,
    },
}

/// A monitor that seems to run: it has a socket, and what it was told its name is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Found {
    /// Its id, as far as it is known without asking.
    pub(crate) id: String,
    /// Its API socket.
    pub(crate) socket: PathBuf,
}

/// What is on this host.
#[derive(Clone, Debug, Default)]
pub(crate) struct Host {
    /// The monitors, in the order of their ids.
    pub(crate) found: Vec<Found>,
    /// Directories that were left behind, and are removed now.
    pub(crate) cleaned: Vec<Name>,
}

impl Host {
    /// Looks at this host, and removes the runtime directories that nobody uses any more.
    pub(crate) fn look() -> Self {
        let root = RuntimeRoot::of_this_user();
        let mut host = Self {
            cleaned: root.remove_stale(),
            found: Vec::new(),
        };
        for name in root.names() {
            let socket = root.socket(&name);
            if !root.is_kept(&name) && socket.exists() {
                host.found.push(Found {
                    id: name.to_string(),
                    socket,
                });
            }
        }
        for found in monitors_in_proc() {
            if !host
                .found
                .iter()
                .any(|known| same_file(&known.socket, &found.socket))
            {
                host.found.push(found);
            }
        }
        host.found.sort();
        host
    }
}

/// The socket of the machine that `target` names: a path with a slash in it, or a name, which means
/// this user's machine before anybody else's.
///
/// # Errors
///
/// When no machine has the name, or several have.
pub(crate) fn resolve(target: &str) -> Result<PathBuf, FindError> {
    if target.contains('/') {
        return Ok(PathBuf::from(target));
    }
    let mut named = Host::look().found;
    named.retain(|found| found.id == target);
    let own = target
        .parse()
        .map(|name| RuntimeRoot::of_this_user().socket(&name));
    if let Ok(own) = own
        && named.iter().any(|found| found.socket == own)
    {
        return Ok(own);
    }
    match named.as_slice() {
        [only] => Ok(only.socket.clone()),
        [] => Err(FindError::Unknown(target.to_owned())),
        several => {
            let sockets: Vec<String> = several
                .iter()
                .map(|found| found.socket.display().to_string())
                .collect();
            let (name, count) = (target.to_owned(), several.len());
            Err(FindError::Ambiguous {
                name,
                count,
                sockets: sockets.join(" or "),
            })
        }
    }
}

/// The socket of the only machine that runs.
///
/// # Errors
///
/// When none or more than one does.
pub(crate) fn resolve_only() -> Result<PathBuf, FindError> {
    match Host::look().found.as_slice() {
        [only] => Ok(only.socket.clone()),
        [] => Err(FindError::NoneRuns),
        several => Err(FindError::SeveralRun { count: several.len() }),
    }
}

fn monitors_in_proc() -> Vec<Found> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|entry| monitor_at(&entry.path())).collect()
}

/// The monitor that the process directory `process` belongs to, if it is one and serves an API.
fn monitor_at(process: &Path) -> Option<Found> {
    let is_process = process.file_name()?.as_bytes().iter().all(u8::is_ascii_digit);
    if !is_process {
        return None;
    }
    let name = fs::read_to_string(process.join("comm")).ok()?;
    if !MONITOR_NAMES.contains(&name.trim_end()) {
        return None;
    }
    let (id, socket) = api_of(&fs::read(process.join("cmdline")).ok()?)?;
    let socket = path_of(process, &socket);
    socket.exists().then_some(Found { id, socket })
}

/// How this process reaches a path of the one whose directory in `/proc` is `process`: it is relative to that one's own directory
/// and, in a jail, to its own root.
pub(crate) fn path_of(process: &Path, path: &Path) -> PathBuf {
    let root = process.join("root");
    let jailed = fs::read_link(&root).is_ok_and(|target| target != Path::new("/"));
    match (path.strip_prefix("/"), jailed) {
        (Ok(inside), true) => root.join(inside),
        (Ok(_), false) => path.to_owned(),
        (Err(_), _) => process.join("cwd").join(path),
    }
}

/// The id and the socket in a monitor's command line; `None` when it has no API.
fn api_of(cmdline: &[u8]) -> Option<(String, PathBuf)> {
    let (mut id, mut socket) = (DEFAULT_ID.to_owned(), PathBuf::from(DEFAULT_SOCKET));
    let mut arguments = cmdline.split(|byte| *byte == 0).skip(1);
    while let Some(argument) = arguments.next() {
        let (flag, attached) = match argument.iter().position(|byte| *byte == b'=') {
            Some(at) => (argument.get(..at)?, argument.get(at + 1..)),
            None => (argument, None),
        };
        match flag {
            b"--" => break,
            b"--no-api" => return None,
            b"--id" => {
                id = String::from_utf8_lossy(attached.or_else(|| arguments.next())?).into_owned();
            }
            b"--api-sock" => {
                socket = PathBuf::from(OsStr::from_bytes(attached.or_else(|| arguments.next())?));
            }
            _ => {}
        }
    }
    Some((id, socket))
}

fn same_file(one: &Path, other: &Path) -> bool {
    match (fs::canonicalize(one), fs::canonicalize(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(cmdline: &[u8]) -> Option<(String, String)> {
        api_of(cmdline).map(|(id, socket)| (id, socket.display().to_string()))
    }

    #[test]
    fn a_command_line_tells_id_and_socket_in_both_spellings() {
        let both = Some(("web".to_owned(), "/x/api.sock".to_owned()));
        assert_eq!(api(b"coracle\0--id\0web\0--api-sock\0/x/api.sock\0"), both);
        assert_eq!(api(b"coracle\0--api-sock=/x/api.sock\0--id=web\0"), both);
        assert_eq!(
            api(b"coracle\0--id=web\0--api-sock\0/x/api.sock\0--\0--id\0no\0"),
            both
        );
    }

    #[test]
    fn a_command_line_that_says_nothing_means_the_defaults() {
        let defaults = Some((DEFAULT_ID.to_owned(), DEFAULT_SOCKET.to_owned()));
        assert_eq!(api(b"coracle\0"), defaults);
        assert_eq!(api(b"coracle\0--level\0Info\0"), defaults);
    }

    #[test]
    fn a_monitor_without_an_api_is_not_found() {
        assert_eq!(api(b"coracle\0--no-api\0--config-file\0x.json\0"), None);
    }

    #[test]
    fn a_path_is_taken_as_it_is() {
        assert_eq!(resolve("./x.sock").ok(), Some(PathBuf::from("./x.sock")));
        assert!(matches!(
            resolve("no-such-machine-here"),
            Err(FindError::Unknown(_))
        ));
    }
}
