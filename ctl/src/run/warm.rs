//! `--warm`: a snapshot of a guest whose agent waits for its root, with which others begin.
//!
//! ```text
//! DIRECTORY/<host>-<boot>-<what it is made of>/       state, memory: whole, and never changed
//! DIRECTORY/<host>-<boot>-<what it is made of>.new/   locked by who is making it, in a directory named by its process
//! ```
//!
//! In the snapshot the image is a disk of one sector. A guest that goes on from it has its own in that place, and is told that
//! the disk has another size.

use std::env;
use std::fmt::{self, Display, Formatter};
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::process::getuid;
use serde_json::{Value, json};
use thiserror::Error;

use super::RunArgs;
use super::command::{self, Disposable, Root};
use super::machine::{self, MachineError, ROOT_ID, Step};
use super::monitor;
use super::net::{self, NetError};
use crate::client::{Client, ClientError, LONG_REQUEST_WAIT, Request};
use crate::pause::Phase;
use crate::runtime_dir::{Locked, Made, clear, is_private, lock_directory, make_private, remove_tree};
use crate::signals::Signals;
use crate::snapshot::progress::SNAPSHOT_WAIT;

/// Where the two parts of a snapshot are.
const STATE: &str = "state";
const MEMORY: &str = "memory";
/// What the name of one ends with that is being made.
const NEW: &str = ".new";
/// Between two looks whether somebody else has made it.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(10);
/// How much of a hash is in a name: enough to tell hosts and boots apart, and to mistake nothing for something else.
const SHORT_DIGITS: usize = 8;
const LONG_DIGITS: usize = 32;

/// Why there is no snapshot to begin with.
#[derive(Debug, Error)]
pub(crate) enum WarmError {
    #[error("cannot use {} for warm snapshots", path.display())]
    Place {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is not a directory that only this user can write, so nothing in it can be trusted with a guest: \
         choose another for --warm",
        .0.display()
    )]
    NotPrivate(PathBuf),
    #[error(
        "others can write {}, so nothing below it can be trusted with a guest: choose another place for --warm",
        .0.display()
    )]
    Open(PathBuf),
    #[error("the name {} is no text: choose another for --warm", .0.display())]
    NoText(PathBuf),
    #[error(
        "with --warm, say the MAC address of {0} (`--net TAP,mac=ADDRESS`): guests of one snapshot would have the one that its \
         kernel has drawn"
    )]
    NoMac(String),
    #[error("what the guest is made of has changed while its snapshot was made: try again")]
    Changed,
    #[error("cannot tell which {what} this is")]
    Unknown {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot find the {what} {}", path.display())]
    Part {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error("the guest cannot be saved as a warm snapshot")]
    Save(#[source] ClientError),
    #[error("it was interrupted by a signal")]
    Interrupted(i32),
}

/// The snapshot that fits a command line.
#[derive(Debug)]
pub(super) struct Warm {
    directory: PathBuf,
    /// Of this host and this boot of it.
    here: Here,
    name: String,
}

/// Names of the host, and of its boot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Here {
    host: String,
    boot: String,
}

/// One that is being made; nothing is left of it if it is not finished.
#[derive(Debug)]
pub(super) struct Making {
    path: PathBuf,
    /// In it, what becomes the snapshot.
    place: PathBuf,
    _lock: OwnedFd,
}

impl Warm {
    /// The one for `args` in `directory`, whether it is there or not.
    ///
    /// # Errors
    ///
    /// When the directory is not private, or something that the guest is made of is not there.
    pub(super) fn new(args: &RunArgs, directory: &Path) -> Result<Self, WarmError> {
        let place = |source| WarmError::Place {
            path: directory.to_owned(),
            source,
        };
        if make_private(directory).map_err(place)? == Made::Open {
            return Err(WarmError::NotPrivate(directory.to_owned()));
        }
        // From here on without links, and below what nobody else can put another in the place of.
        let directory = fs::canonicalize(directory).map_err(place)?;
        if directory.to_str().is_none() {
            return Err(WarmError::NoText(directory));
        }
        let found = fs::symlink_metadata(&directory).map_err(place)?;
        if !is_private(&found) {
            return Err(WarmError::NotPrivate(directory));
        }
        for above in directory.ancestors().skip(1) {
            if !is_kept(&fs::symlink_metadata(above).map_err(place)?) {
                return Err(WarmError::Open(above.to_owned()));
            }
        }
        for (id, config) in net::configs(&args.net)? {
            if config.get("guest_mac").is_none() {
                return Err(WarmError::NoMac(id));
            }
        }
        let here = Here::read()?;
        let made_of = short(&made_of(args)?.to_string(), LONG_DIGITS);
        Ok(Self {
            name: format!("{here}{made_of}"),
            directory,
            here,
        })
    }

    /// Where it is.
    pub(super) fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// Waits until it is there, or nobody else is making it: then it is ours to make.
    ///
    /// # Errors
    ///
    /// When the directory cannot be used, or a signal comes first.
    pub(super) fn claim(&self, signals: &Signals) -> Result<Option<Making>, WarmError> {
        let path = self.directory.join(format!("{}{NEW}", self.name));
        let place = |source| WarmError::Place {
            path: path.clone(),
            source,
        };
        loop {
            if self.is_there()? {
                return Ok(None);
            }
            if make_private(&path).map_err(place)? == Made::Open {
                return Err(WarmError::NotPrivate(path));
            }
            match lock_directory(&path).map_err(place)? {
                Locked::Ours(lock) => {
                    let making = Making {
                        place: path.join(std::process::id().to_string()),
                        path: path.clone(),
                        _lock: lock,
                    };
                    // Whoever had the lock may have finished it after we looked.
                    if self.is_there()? {
                        return Ok(None);
                    }
                    clear(&making.path).map_err(place)?;
                    // A monitor whose coraclectl was killed may write into another for a while.
                    make_private(&making.place).map_err(place)?;
                    return Ok(Some(making));
                }
                Locked::Gone => {}
                Locked::Others => thread::sleep(ATTEMPT_PAUSE),
            }
            if let Some(signal) = signals.take() {
                return Err(WarmError::Interrupted(signal));
            }
        }
    }

    fn is_there(&self) -> Result<bool, WarmError> {
        match fs::symlink_metadata(self.path()) {
            Ok(found) if is_private(&found) => Ok(true),
            Ok(_) => Err(WarmError::NotPrivate(self.path())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(WarmError::Place {
                path: self.path(),
                source,
            }),
        }
    }

    /// Removes what this host has left in the directory before it booted, and cannot use any more.
    pub(super) fn remove_stale(&self) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let is_stale = entry
                .file_name()
                .to_str()
                .is_some_and(|name| self.here.is_past(name));
            // What stays for another reason stays.
            if is_stale && let Ok(Locked::Ours(_lock)) = lock_directory(&path) {
                let _ = remove_tree(&path);
            }
        }
    }

    /// The request that has a fresh monitor go on from it with `image` as the root.
    ///
    /// # Errors
    ///
    /// When two network interfaces are one.
    pub(super) fn load(&self, args: &RunArgs, image: &str, vsock: &Path) -> Result<Step, WarmError> {
        let path = self.path();
        let taps = net::configs(&args.net)?
            .into_iter()
            .map(|(id, config)| json!({ "iface_id": id, "host_dev_name": config.get("host_dev_name") }));
        let body = json!({
            "snapshot_path": path.join(STATE),
            // It is ours alone, and guests share it.
            "mem_backend": { "backend_type": "File", "backend_path": path.join(MEMORY) },
            "verify": "off",
            "resume_vm": true,
            "track_dirty_pages": args.track_dirty_pages,
            "disks": "Detached",
            "drive_overrides": [{ "drive_id": ROOT_ID, "path_on_host": image }],
            "network_overrides": taps.collect::<Vec<_>>(),
            "vsock_override": { "uds_path": vsock },
        });
        Ok(Step {
            part: format!(
                "go on from the warm snapshot {}, which is made anew once it is removed",
                path.display()
            ),
            path: "/snapshot/load".to_owned(),
            body,
            wait: LONG_REQUEST_WAIT,
        })
    }
}

impl Making {
    /// Has the monitor behind `client` save its machine there.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub(super) fn save(&self, client: &Client<'_>) -> Result<(), WarmError> {
        Phase::Paused.bring(client).map_err(WarmError::Save)?;
        let body = json!({
            "snapshot_path": self.place.join(STATE),
            "mem_file_path": self.place.join(MEMORY),
        });
        let saved = client.call(Request {
            method: "PUT",
            path: "/snapshot/create",
            body: Some(&body.to_string()),
            wait: SNAPSHOT_WAIT,
        });
        saved.map(drop).map_err(WarmError::Save)
    }

    /// Lets others find it as `warm`, if that is still what `args` ask for.
    ///
    /// # Errors
    ///
    /// When it is not, or the directory does not take it.
    pub(super) fn finish(self, args: &RunArgs, warm: &Warm) -> Result<(), WarmError> {
        if Warm::new(args, &warm.directory)?.name != warm.name {
            return Err(WarmError::Changed);
        }
        self.take_place(&warm.path())
    }

    fn take_place(&self, whole: &Path) -> Result<(), WarmError> {
        fs::rename(&self.place, whole).map_err(|source| WarmError::Place {
            path: whole.to_owned(),
            source,
        })
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        // What stays is taken over by who makes it next.
        let _ = remove_tree(&self.path);
    }
}

impl Here {
    fn read() -> Result<Self, WarmError> {
        let read = |path, what| match fs::read_to_string(path) {
            Ok(text) => Ok(short(&text, SHORT_DIGITS)),
            Err(source) => Err(WarmError::Unknown { what, source }),
        };
        // Hosts that share a directory may have one name, and not every host has a number.
        let machine = fs::read_to_string("/etc/machine-id").unwrap_or_default();
        let host = read("/proc/sys/kernel/hostname", "host")?;
        Ok(Self {
            host: short(&format!("{host} {machine}"), SHORT_DIGITS),
            boot: read("/proc/sys/kernel/random/boot_id", "boot of the host")?,
        })
    }

    /// Whether that is the name of one, whole or not, that was made on this host before it booted.
    fn is_past(&self, name: &str) -> bool {
        let name = name.strip_suffix(NEW).unwrap_or(name);
        let parts: Vec<&str> = name.split('-').collect();
        let is_hash =
            |text: &str, digits| text.len() == digits && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        match parts[..] {
            [host, boot, made_of] => {
                let is_one = is_hash(boot, SHORT_DIGITS) && is_hash(made_of, LONG_DIGITS);
                is_one && host == self.host && boot != self.boot
            }
            _ => false,
        }
    }
}

impl Display for Here {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-", self.host, self.boot)
    }
}

/// Whether nobody but root and this user can put something else in the place of what is in a directory.
fn is_kept(directory: &Metadata) -> bool {
    let is_sticky = directory.mode() & 0o1000 != 0;
    let is_ours = [0, getuid().as_raw()].contains(&directory.uid());
    is_ours && (directory.mode() & 0o022 == 0 || is_sticky)
}

/// All that two guests must have in common to begin with one snapshot.
fn made_of(args: &RunArgs) -> Result<Value, WarmError> {
    // What each guest has for itself stands for nothing.
    let made = Disposable {
        initrd: PathBuf::new(),
        root: Root::Placeholder(PathBuf::new()),
        vsock: PathBuf::new(),
    };
    let mut steps = machine::steps(args, Some(&made))?;
    for step in &mut steps {
        if let Some(body) = step.body.as_object_mut() {
            body.remove("kernel_image_path");
            body.remove("host_dev_name");
        }
    }
    let steps = steps.iter().map(|step| json!([step.path, step.body]));
    let monitor = monitor::program(args.foreground.monitor.as_deref());
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "kernel": identity(Path::new(&args.kernel), "kernel")?,
        "agent": identity(&command::agent(args), "agent")?,
        "monitor": identity(&in_path(monitor), "monitor")?,
        "machine": steps.collect::<Value>(),
    }))
}

/// What changes whenever a file does.
fn identity(path: &Path, what: &'static str) -> Result<Value, WarmError> {
    let file = fs::metadata(path).map_err(|source| WarmError::Part {
        what,
        path: path.to_owned(),
        source,
    })?;
    Ok(json!([
        file.dev(),
        file.ino(),
        file.size(),
        [file.mtime(), file.mtime_nsec()],
        [file.ctime(), file.ctime_nsec()],
    ]))
}

/// Where the shell would find `program`.
fn in_path(program: PathBuf) -> PathBuf {
    if program.components().nth(1).is_some() {
        return program;
    }
    let paths = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&paths).map(|path| path.join(&program));
    found.into_iter().find(|path| path.is_file()).unwrap_or(program)
}

fn short(text: &str, digits: usize) -> String {
    let mut hash = blake3::hash(text.as_bytes()).to_hex().to_string();
    hash.truncate(digits);
    hash
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use clap::Parser;
    use coracle_vmm::config::{Disks, SnapshotLoad};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            for file in ["kernel", "agent", "monitor"] {
                fs::write(place.path(file), file).unwrap();
            }
            place
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn args(&self, words: &str) -> RunArgs {
            let path = |name: &str| self.path(name).display().to_string();
            let mut line = vec!["run".to_owned()];
            for name in ["kernel", "agent", "monitor"] {
                line.push(format!("--{name}={}", path(name)));
            }
            line.extend(words.split_whitespace().map(ToOwned::to_owned));
            line.extend(["image", "--", "true"].map(ToOwned::to_owned));
            Line::parse_from(line).run
        }

        fn warm(&self, words: &str) -> Warm {
            Warm::new(&self.args(words), &self.path("warm")).unwrap()
        }
    }

    #[test]
    fn one_fits_guests_that_are_made_of_the_same_and_no_others() {
        let place = Place::new();
        let path = |words| place.warm(words).path();
        let first = path("--net=tap0,mac=06:00:00:00:00:01");
        for same in [
            "--net=tap7,mac=06:00:00:00:00:01",
            "--net=tap0,mac=06:00:00:00:00:01 --copy-out=/a --name=b --boot-timeout=5",
        ] {
            assert_eq!(path(same), first, "{same}");
        }
        for other in [
            "",
            "--net=tap0,mac=06:00:00:00:00:02",
            "--net=tap0,mac=06:00:00:00:00:01 --cpus=2",
            "--net=tap0,mac=06:00:00:00:00:01 --memory=256M",
            "--net=tap0,mac=06:00:00:00:00:01 --cmdline=quiet",
            "--net=tap0,mac=06:00:00:00:00:01 --entropy",
        ] {
            assert_ne!(path(other), first, "{other}");
        }
        for file in ["kernel", "agent", "monitor"] {
            let before = path("");
            fs::write(place.path("next"), file).unwrap();
            fs::rename(place.path("next"), place.path(file)).unwrap();
            assert_ne!(path(""), before, "another {file}");
        }
    }

    #[test]
    fn one_process_makes_it_and_the_others_wait_and_find_it() {
        let place = Place::new();
        let (warm, signals) = (place.warm(""), Signals::watch().unwrap());
        let making = warm.claim(&signals).unwrap().unwrap();
        let made = making.path.clone();
        fs::write(making.place.join(STATE), "half").unwrap();
        fs::write(making.path.join("left"), "by somebody else").unwrap();
        drop(making);
        assert!(!made.exists());

        let making = warm.claim(&signals).unwrap().unwrap();
        thread::scope(|scope| {
            let waits = scope.spawn(|| warm.claim(&signals).unwrap().is_none());
            thread::sleep(3 * ATTEMPT_PAUSE);
            assert!(!waits.is_finished());
            fs::write(making.place.join(STATE), "whole").unwrap();
            making.take_place(&warm.path()).unwrap();
            drop(making);
            assert!(waits.join().unwrap());
        });
        assert_eq!(fs::read(warm.path().join(STATE)).unwrap(), b"whole");
        assert_eq!(fs::read_dir(place.path("warm")).unwrap().count(), 1);
    }

    #[test]
    fn what_is_left_of_another_boot_is_removed_and_nothing_else() {
        let place = Place::new();
        let warm = place.warm("");
        let (host, made_of) = (&warm.here.host, "0".repeat(LONG_DIGITS));
        let stale = format!("{host}-00000000-{made_of}");
        let half = format!("{stale}{NEW}");
        let kept = [
            format!("{}{made_of}", warm.here),
            format!("00000000-00000000-{made_of}"),
            format!("{host}-00000000-mine"),
            format!("{host}-00000000"),
        ];
        for name in [&stale, &half].into_iter().chain(&kept) {
            let directory = place.path("warm").join(name);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("memory.0123456789abcdef.draft"), "").unwrap();
        }
        let busy = format!("{host}-11111111-{made_of}{NEW}");
        fs::create_dir(place.path("warm").join(&busy)).unwrap();
        let lock = lock_directory(&place.path("warm").join(&busy)).unwrap();
        warm.remove_stale();
        let is_there = |name: &String| place.path("warm").join(name).exists();
        assert!(!is_there(&stale) && !is_there(&half));
        assert!(kept.iter().all(is_there) && is_there(&busy));
        drop(lock);
        warm.remove_stale();
        assert!(!is_there(&busy));
    }

    #[test]
    fn what_others_can_write_is_not_trusted() {
        use std::os::unix::fs::PermissionsExt;

        let place = Place::new();
        fs::create_dir(place.path("open")).unwrap();
        fs::set_permissions(place.path("open"), fs::Permissions::from_mode(0o777)).unwrap();
        let refused = Warm::new(&place.args(""), &place.path("open"));
        assert!(matches!(refused, Err(WarmError::NotPrivate(_))), "{refused:?}");

        let below = place.path("open/below");
        let refused = Warm::new(&place.args(""), &below);
        assert!(
            matches!(&refused, Err(WarmError::Open(above)) if *above == place.path("open")),
            "{refused:?}"
        );
        std::os::unix::fs::symlink(&below, place.path("link")).unwrap();
        for link in ["link", "link/"] {
            let refused = Warm::new(&place.args(""), &place.path(link));
            assert!(refused.is_err(), "{link}");
        }

        let warm = place.warm("");
        fs::create_dir(warm.path()).unwrap();
        fs::set_permissions(warm.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let refused = warm.claim(&Signals::watch().unwrap());
        assert!(matches!(refused, Err(WarmError::NotPrivate(_))), "{refused:?}");
    }

    #[test]
    fn guests_of_one_snapshot_are_told_their_addresses() {
        let place = Place::new();
        let refused = Warm::new(&place.args("--net=tap0,id=lan"), &place.path("warm"));
        assert!(
            matches!(&refused, Err(WarmError::NoMac(id)) if id == "lan"),
            "{refused:?}"
        );
    }

    #[test]
    fn the_monitor_takes_the_load() {
        let place = Place::new();
        let words = "--net=tap3,id=lan,mac=06:00:00:00:00:01 --track-dirty-pages";
        let load = place
            .warm(words)
            .load(&place.args(words), "nfs://nas/image", Path::new("/v"));
        let load: SnapshotLoad = serde_json::from_value(load.unwrap().body).unwrap();
        assert!(load.resume_vm && load.track_dirty_pages && load.disks == Disks::Detached);
        let drive = load.drive_overrides.first().unwrap();
        assert_eq!(drive.path_on_host.as_deref(), Some("nfs://nas/image"));
        assert_eq!(load.network_overrides.first().unwrap().host_dev_name, "tap3");
    }
}
