//! The private directory of a running machine: its API socket and its monitor's log.
//!
//! `coraclectl run` holds a lock on the directory for as long as it runs, so a directory whose lock
//! is free and whose socket nobody listens on is what a killed `run`, or a machine that was left to itself, has left behind.

use std::env;
use std::fs::{self, DirBuilder, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::getuid;
use thiserror::Error;

use crate::client::{Client, ClientError};
use crate::deadline::Deadline;
use crate::name::Name;

const SOCKET_NAME: &str = "api.sock";
const LOG_NAME: &str = "monitor.log";
/// In a directory that stays although its machine has ended.
const KEPT_NAME: &str = "kept";
/// `sun_path` with its terminating zero (unix(7)).
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// How often a directory is made again that another process has just removed.
const CREATE_ATTEMPTS_MAX: usize = 16;
/// How long somebody may take to remove what was left behind.
const REMOVAL_WAIT: Duration = Duration::from_secs(2);
/// Between two looks whether that is done.
const REMOVAL_PAUSE: Duration = Duration::from_millis(5);
const PROBE_WAIT: Duration = Duration::from_secs(1);

/// Why there is no runtime directory.
#[derive(Debug, Error)]
pub(crate) enum RuntimeDirError {
    #[error("a machine named {0} is running: choose another name, or end it with `coraclectl stop {0}`")]
    InUse(Name),
    #[error("cannot make the directory {}: set XDG_RUNTIME_DIR to one that this user may write", path.display())]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is not a directory that only this user can write, so sockets are not safe in it: \
         remove it, or set XDG_RUNTIME_DIR to another place",
        .0.display()
    )]
    NotPrivate(PathBuf),
    #[error("{} cannot be locked", path.display())]
    Lock {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} cannot be emptied of what an earlier machine has left", path.display())]
    Clear {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the socket's path {} is longer than {SOCKET_PATH_BYTES_MAX} bytes: \
         choose a shorter --name, or set XDG_RUNTIME_DIR to a shorter path",
        .0.display()
    )]
    PathTooLong(PathBuf),
}

/// Where all runtime directories of this user are.
#[derive(Clone, Debug)]
pub(crate) struct RuntimeRoot(PathBuf);

impl RuntimeRoot {
    /// `$XDG_RUNTIME_DIR/coracle`, else the same in `/run/user/UID`, else `/tmp/coracle-UID`.
    pub(crate) fn of_this_user() -> Self {
        let uid = getuid().as_raw();
        let session = PathBuf::from(format!("/run/user/{uid}"));
        let named = env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute());
        match named.or_else(|| session.is_dir().then_some(session)) {
            Some(runtime) => Self(runtime.join("coracle")),
            None => Self(PathBuf::from(format!("/tmp/coracle-{uid}"))),
        }
    }

    /// The socket that a machine of this name has if it runs.
    pub(crate) fn socket(&self, name: &Name) -> PathBuf {
        self.0.join(name.as_str()).join(SOCKET_NAME)
    }

    /// The names that have a directory, in order.
    pub(crate) fn names(&self) -> Vec<Name> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let mut names: Vec<Name> = entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        names.sort();
        names
    }

    /// Makes the directory of `name`, empty, and holds it until it is dropped.
    ///
    /// # Errors
    ///
    /// When a machine of that name runs, or the directory cannot be made or is not private.
    pub(crate) fn create(&self, name: &Name) -> Result<RuntimeDir, RuntimeDirError> {
        let socket = self.socket(name);
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(RuntimeDirError::PathTooLong(socket));
        }
        private(&self.0)?;
        let path = self.0.join(name.as_str());
        let until = Deadline::after(REMOVAL_WAIT);
        for _ in 0..CREATE_ATTEMPTS_MAX {
            private(&path)?;
            let lock = loop {
                match lock(&path, name) {
                    // Somebody may be removing what was left there, and lock it for that.
                    Err(RuntimeDirError::InUse(_)) if !is_answered(&socket) && !until.passed() => {
                        thread::sleep(REMOVAL_PAUSE);
                    }
                    locked => break locked?,
                }
            };
            if let Some(lock) = lock {
                if is_answered(&socket) {
                    return Err(RuntimeDirError::InUse(name.clone()));
                }
                clear(&path).map_err(|source| RuntimeDirError::Clear {
                    path: path.clone(),
                    source,
                })?;
                return Ok(RuntimeDir {
                    path,
                    _lock: lock,
                    at_the_end: AtTheEnd::Remove,
                });
            }
        }
        Err(RuntimeDirError::InUse(name.clone()))
    }

    /// Whether the machine `name` has ended, and its directory is to stay.
    pub(crate) fn is_kept(&self, name: &Name) -> bool {
        self.0.join(name.as_str()).join(KEPT_NAME).exists()
    }

    /// Removes the directories that nobody uses any more, and says whose they were.
    pub(crate) fn remove_stale(&self) -> Vec<Name> {
        let mut names = self.names();
        names.retain(|name| self.remove_if_stale(name));
        names
    }

    /// Removes the directory of `name` if no machine uses it; true when it did.
    pub(crate) fn remove_if_stale(&self, name: &Name) -> bool {
        let path = self.0.join(name.as_str());
        if self.is_kept(name) {
            return false;
        }
        match lock(&path, name) {
            // It may have ended since we looked.
            Ok(Some(_lock)) if self.is_kept(name) => false,
            Ok(Some(_lock)) => !is_answered(&self.socket(name)) && remove_tree(&path).is_ok(),
            Ok(None) | Err(_) => false,
        }
    }
}

/// What happens to a runtime directory when its `run` ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtTheEnd {
    /// It is removed.
    Remove,
    /// It stays, for whoever wants to read the log.
    Keep,
    /// It is the machine's, which runs on by itself.
    Leave,
}

/// The directory of one running machine; removed when it is dropped, unless it is to stay.
#[derive(Debug)]
pub(crate) struct RuntimeDir {
    path: PathBuf,
    _lock: OwnedFd,
    at_the_end: AtTheEnd,
}

impl RuntimeDir {
    /// The same directory, with `at_the_end` decided.
    pub(crate) fn then(self, at_the_end: AtTheEnd) -> Self {
        let mut dir = self;
        dir.at_the_end = at_the_end;
        dir
    }

    /// The directory itself.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the monitor makes its API socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join(SOCKET_NAME)
    }

    /// Where the monitor writes its log.
    pub(crate) fn log(&self) -> PathBuf {
        self.path.join(LOG_NAME)
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        // Removed while it is still locked: a `run` that waits for this lock then sees that the
        // directory is gone and makes its own.
        match self.at_the_end {
            // What cannot be removed is found and reported by the next `ps`.
            AtTheEnd::Remove => drop(remove_tree(&self.path)),
            // Without the mark the next `ps` would take it for one that was left behind.
            AtTheEnd::Keep => drop(fs::write(self.path.join(KEPT_NAME), "")),
            AtTheEnd::Leave => {}
        }
    }
}

fn private(path: &Path) -> Result<(), RuntimeDirError> {
    let made = make_private(path).map_err(|source| RuntimeDirError::Create {
        path: path.to_owned(),
        source,
    })?;
    match made {
        Made::Private => Ok(()),
        Made::Open => Err(RuntimeDirError::NotPrivate(path.to_owned())),
    }
}

fn lock(path: &Path, name: &Name) -> Result<Option<OwnedFd>, RuntimeDirError> {
    let locked = lock_directory(path).map_err(|source| RuntimeDirError::Lock {
        path: path.to_owned(),
        source,
    })?;
    match locked {
        Locked::Ours(directory) => Ok(Some(directory)),
        Locked::Gone => Ok(None),
        Locked::Others => Err(RuntimeDirError::InUse(name.clone())),
    }
}

/// What a directory is that was to be private.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// Only this user can write it.
    Private,
    /// It is no directory, or others can write it.
    Open,
}

/// Makes `path` with mode 0700, or looks whether the one that is there is as private.
///
/// # Errors
///
/// When there is none, and it cannot be made.
pub(crate) fn make_private(path: &Path) -> io::Result<Made> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return Ok(Made::Private),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        // Removed by its owner between the two calls; the caller tries again.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Made::Private),
        Err(error) => return Err(error),
    };
    Ok(if is_private(&metadata) {
        Made::Private
    } else {
        Made::Open
    })
}

/// Whether that is a directory that only this user can write.
pub(crate) fn is_private(metadata: &Metadata) -> bool {
    metadata.is_dir() && metadata.uid() == getuid().as_raw() && metadata.mode() & 0o022 == 0
}

/// Whose a directory is that was to be locked.
#[derive(Debug)]
pub(crate) enum Locked {
    /// Ours, until the descriptor is closed.
    Ours(OwnedFd),
    /// Another process'.
    Others,
    /// Nobody's: it is not there any more.
    Gone,
}

/// Locks the directory that others find by `path`, if nobody else has.
///
/// # Errors
///
/// When it cannot be opened or locked.
pub(crate) fn lock_directory(path: &Path) -> io::Result<Locked> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(Locked::Gone),
        Err(errno) => return Err(errno.into()),
    };
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(Locked::Others),
        Err(errno) => return Err(errno.into()),
    }
    // The lock is worth something only on the directory that others find by this path.
    let locked = rustix::fs::fstat(&directory)?;
    match rustix::fs::lstat(path) {
        Ok(found) if (found.st_dev, found.st_ino) == (locked.st_dev, locked.st_ino) => {
            Ok(Locked::Ours(directory))
        }
        Ok(_) | Err(Errno::NOENT) => Ok(Locked::Gone),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a process listens on `socket`, even one that does not answer.
fn is_answered(socket: &Path) -> bool {
    let peer = Client::new(socket).peer(PROBE_WAIT);
    !matches!(
        peer,
        Err(ClientError::NoSocket { .. } | ClientError::NobodyListens { .. })
    )
}

/// Removes all that is in a directory.
///
/// # Errors
///
/// When something stays.
pub(crate) fn clear(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let removed = match entry.file_type()?.is_dir() {
            true => remove_tree(&entry.path()),
            false => fs::remove_file(entry.path()),
        };
        match removed {
            // Whoever has been killed may still be tidying up.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed?,
        }
    }
    Ok(())
}

/// Removes a directory with all that is in it, also directories that may not be written.
///
/// # Errors
///
/// When something stays.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    if fs::remove_dir_all(path).is_ok() {
        return Ok(());
    }
    let mut directories = vec![path.to_owned()];
    while let Some(directory) = directories.pop() {
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    fs::remove_dir_all(path)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn root() -> (tempfile::TempDir, RuntimeRoot, Name) {
        let place = tempfile::tempdir().unwrap();
        let root = RuntimeRoot(place.path().join("coracle"));
        (place, root, "web-1".parse().unwrap())
    }

    #[test]
    fn a_directory_is_private_and_goes_away_with_its_run() {
        let (_place, root, name) = root();
        let dir = root.create(&name).unwrap();
        fs::write(dir.log(), "a line").unwrap();
        let path = dir.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(root.names(), [name]);
        drop(dir);
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_that_is_to_stay_stays() {
        let (_place, root, name) = root();
        let path = root.create(&name).unwrap().then(AtTheEnd::Keep).path().to_owned();
        assert!(path.exists() && root.is_kept(&name));
        // Another machine of that name begins with an empty one.
        let dir = root.create(&name).unwrap();
        assert!(!root.is_kept(&name));
        drop(dir);
        assert!(!path.exists());
        drop(root.create(&name).unwrap().then(AtTheEnd::Keep));
        assert!(!root.remove_if_stale(&name));
        assert!(path.exists());
    }

    #[test]
    fn a_name_is_taken_while_its_run_lives() {
        let (_place, root, name) = root();
        let dir = root.create(&name).unwrap();
        assert!(matches!(root.create(&name), Err(RuntimeDirError::InUse(_))));
        assert!(!root.remove_if_stale(&name));
        drop(dir);
        assert!(root.create(&name).is_ok());
    }

    #[test]
    fn a_name_is_taken_while_its_monitor_listens() {
        let (_place, root, name) = root();
        let dir = root.create(&name).unwrap().then(AtTheEnd::Leave);
        let listener = UnixListener::bind(dir.socket()).unwrap();
        drop(dir);
        assert!(matches!(root.create(&name), Err(RuntimeDirError::InUse(_))));
        assert!(!root.remove_if_stale(&name));
        drop(listener);
        assert!(
            root.create(&name)
                .unwrap()
                .then(AtTheEnd::Leave)
                .socket()
                .symlink_metadata()
                .is_err()
        );
        assert!(root.remove_if_stale(&name));
        assert!(root.names().is_empty());
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let (place, root, name) = root();
        let open = place.path().join("coracle");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(root.create(&name), Err(RuntimeDirError::NotPrivate(_))));
    }

    #[test]
    fn a_link_in_place_of_the_directory_is_refused() {
        let (place, root, name) = root();
        std::os::unix::fs::symlink(place.path(), place.path().join("coracle")).unwrap();
        assert!(matches!(root.create(&name), Err(RuntimeDirError::NotPrivate(_))));
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused_before_anything_is_made() {
        let place = tempfile::tempdir().unwrap();
        let root = RuntimeRoot(place.path().join("x".repeat(SOCKET_PATH_BYTES_MAX)));
        let name = "web-1".parse().unwrap();
        assert!(matches!(root.create(&name), Err(RuntimeDirError::PathTooLong(_))));
    }
}
