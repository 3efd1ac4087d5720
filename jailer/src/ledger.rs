//! What was made for a jail, known to each of the jailer's processes, and taken away again.
//!
//! ```text
//! free ──intend──▶ intended ──made──▶ made ──▶ removed (free)
//!                     └── it was there already ──▶ free
//! ```
//!
//! The states are in memory that the processes share: whoever is left removes what the others made, also what a process
//! made just before it was killed.

#![expect(unsafe_code, reason = "memory that processes share is mapped")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, XattrFlags, fgetxattr, fsetxattr, unlinkat};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use crate::place::{self, Identity};

/// What can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file, node or anything else with a name that is no directory.
    File,
    /// A directory of this jail.
    Directory,
    /// A directory that jails share: whoever leaves it empty removes it, if a jailer made it.
    Shared,
    /// The socket of the API, which the monitor makes.
    Socket,
}

/// One thing that may be made; a relative path is beneath the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    /// What it is.
    pub(crate) kind: Kind,
    /// Where.
    pub(crate) path: PathBuf,
}

/// The list, and the state of each item.
#[derive(Debug)]
pub(crate) struct Ledger {
    base: OwnedFd,
    items: Vec<Item>,
    /// As many as items; none where nobody removes anything.
    states: Option<&'static [Slot]>,
}

/// State and identity of one item.
#[derive(Debug)]
#[repr(C)]
struct Slot {
    state: AtomicU64,
    inode: AtomicU64,
    born_ns: AtomicU64,
    kind: AtomicU64,
}

const FREE: u64 = 0;
const INTENDED: u64 = 1;
const MADE: u64 = 2;

/// Says of a directory that a jailer made it. Only root can write the first; the second is for ordinary users.
const MARKS: [&str; 2] = ["trusted.coracle.jailer", "user.coracle.jailer"];

/// How long the kernel may take to let go of a cgroup whose last process has ended.
const CGROUP_BUSY_MAX: Duration = Duration::from_secs(5);

impl Ledger {
    /// A ledger in memory that processes forked later share.
    ///
    /// # Errors
    ///
    /// When there is no memory.
    pub(crate) fn shared(base: OwnedFd, items: Vec<Item>) -> io::Result<Self> {
        let bytes = items.len() * size_of::<Slot>();
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice, which aliases nothing.
        let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes.max(1), flags, MapFlags::SHARED) }?;
        let first = NonNull::new(mapped.cast::<Slot>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: so many slots were mapped, zeros are valid atomics, and the mapping stays until the process ends.
        let slots = unsafe { std::slice::from_raw_parts(first.as_ptr(), items.len()) };
        Ok(Self {
            base,
            items,
            states: Some(slots),
        })
    }

    /// A ledger that remembers nothing.
    pub(crate) fn forgetful(base: OwnedFd) -> Self {
        Self {
            base,
            items: vec![],
            states: None,
        }
    }

    /// Makes something by its path: `make` says whether it has made it, or found it.
    ///
    /// # Errors
    ///
    /// Those of `make`; and when what was made cannot be found.
    pub(crate) fn make(&self, path: &Path, make: impl FnOnce() -> io::Result<Made>) -> io::Result<()> {
        let Some((item, slot)) = self.slot(path) else {
            return make().map(drop);
        };
        // What is there already is not intended, so that a process that is killed here has not made it.
        let before = self.identity(item)?;
        if before.is_none() {
            slot.state.store(INTENDED, Ordering::SeqCst);
        }
        match make() {
            Ok(Made::New) => {
                let identity = self.identity(item)?.ok_or(io::ErrorKind::NotFound)?;
                slot.note(identity);
                Ok(())
            }
            Ok(Made::Found) => {
                slot.forget_intention();
                Ok(())
            }
            Err(error) => {
                // A later step of making it may have failed; what somebody else has made is not ours.
                let half = match error.kind() {
                    io::ErrorKind::AlreadyExists => None,
                    _ if before.is_none() => self.identity(item)?,
                    _ => None,
                };
                match half {
                    Some(identity) => slot.note(identity),
                    None => slot.forget_intention(),
                }
                Err(error)
            }
        }
    }

    /// Says that the item at this path is made by somebody else from now on, if there is nothing yet.
    ///
    /// # Errors
    ///
    /// When nobody can tell whether there is.
    pub(crate) fn expect(&self, path: &Path) -> io::Result<()> {
        if let Some((item, slot)) = self.slot(path)
            && self.identity(item)?.is_none()
        {
            slot.state.store(INTENDED, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Removes what was made, in the opposite order. What cannot be removed is told at the end, when the rest is gone.
    ///
    /// # Errors
    ///
    /// The first of them.
    pub(crate) fn remove(&self) -> Result<(), LedgerError> {
        let mut first = Ok(());
        for (item, slot) in self.items.iter().zip(self.states.unwrap_or_default()).rev() {
            let removed = self.remove_one(item, slot).map_err(|source| LedgerError {
                path: item.path.clone(),
                source,
            });
            first = first.and(removed);
        }
        first
    }

    /// Removes the sockets in a directory that was made for the jail which nobody listens on any more: a monitor that is killed
    /// leaves that of its vsock device, and the next one could not make its own.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub(crate) fn remove_dead_sockets(&self, path: &Path) -> io::Result<()> {
        let is_made = |slot: &Slot| slot.state.load(Ordering::SeqCst) == MADE;
        if !self.slot(path).is_some_and(|(_, slot)| is_made(slot)) {
            return Ok(());
        }
        let directory = place::directory(&self.base, path)?;
        let here = format!("/proc/self/fd/{}", directory.as_raw_fd());
        for entry in std::fs::read_dir(&here)? {
            let name = PathBuf::from(entry?.file_name());
            let found = place::identity(&directory, &name)?;
            let is_socket = found.is_some_and(|found| u32::from(found.kind) == libc::S_IFSOCK);
            let is_dead = || match UnixStream::connect(Path::new(&here).join(&name)) {
                Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
                Ok(_) => false,
            };
            if is_socket && is_dead() {
                unlinkat(&directory, &name, AtFlags::empty())?;
            }
        }
        Ok(())
    }

    fn remove_one(&self, item: &Item, slot: &Slot) -> io::Result<()> {
        let state = slot.state.load(Ordering::SeqCst);
        if state == FREE && item.kind != Kind::Shared {
            return Ok(());
        }
        let (parent, name) = match self.parent(item) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let Some(now) = place::identity(&parent, name)? else {
            slot.state.store(FREE, Ordering::SeqCst);
            return Ok(());
        };
        let is_ours = match item.kind {
            // By its name only: they go when they are empty, whatever became of them.
            Kind::Directory => true,
            Kind::Shared => state != FREE || is_marked(&parent, name),
            Kind::Socket => u32::from(now.kind) == libc::S_IFSOCK,
            Kind::File => state == INTENDED || slot.identity() == now,
        };
        if !is_ours {
            return Ok(());
        }
        let removed = match item.kind {
            Kind::File | Kind::Socket => unlinkat(&parent, name, AtFlags::empty()).map_err(io::Error::from),
            Kind::Directory | Kind::Shared if item.path.is_absolute() => remove_cgroup(&item.path, item.kind),
            Kind::Directory | Kind::Shared => match unlinkat(&parent, name, AtFlags::REMOVEDIR) {
                // What somebody else put there stays, and the directory with it.
                Err(rustix::io::Errno::NOTEMPTY | rustix::io::Errno::EXIST) => Ok(()),
                other => other.map_err(io::Error::from),
            },
        };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        slot.state.store(FREE, Ordering::SeqCst);
        Ok(())
    }

    fn identity(&self, item: &Item) -> io::Result<Option<Identity>> {
        match self.parent(item) {
            Ok((parent, name)) => place::identity(&parent, name),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where an item is. Nobody but root changes paths of cgroups, so these are as they are.
    fn parent<'a>(&self, item: &'a Item) -> io::Result<(OwnedFd, &'a Path)> {
        if !item.path.is_absolute() {
            return place::parent(&self.base, &item.path);
        }
        let above = item.path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let name = item.path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        Ok((std::fs::File::open(above)?.into(), Path::new(name)))
    }

    fn slot(&self, path: &Path) -> Option<(&Item, &Slot)> {
        let mut both = self.items.iter().zip(self.states?);
        both.find(|(item, _)| item.path == path)
    }
}

/// What came of making something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// It is new.
    New,
    /// It was there already.
    Found,
}

impl Slot {
    fn forget_intention(&self) {
        // One that was made at an earlier attempt stays made.
        let _ = self
            .state
            .compare_exchange(INTENDED, FREE, Ordering::SeqCst, Ordering::SeqCst);
    }

    fn note(&self, identity: Identity) {
        self.inode.store(identity.inode, Ordering::SeqCst);
        self.born_ns.store(identity.born_ns, Ordering::SeqCst);
        self.kind.store(identity.kind.into(), Ordering::SeqCst);
        self.state.store(MADE, Ordering::SeqCst);
    }

    fn identity(&self) -> Identity {
        Identity {
            inode: self.inode.load(Ordering::SeqCst),
            born_ns: self.born_ns.load(Ordering::SeqCst),
            kind: u16::try_from(self.kind.load(Ordering::SeqCst)).unwrap_or_default(),
        }
    }
}

/// Marks a directory that jails share as made by a jailer. Without marks, only its maker removes it.
pub(crate) fn mark(directory: impl AsFd) {
    for mark in MARKS {
        if fsetxattr(directory.as_fd(), mark, b"1", XattrFlags::empty()).is_ok() {
            return;
        }
    }
}

fn is_marked(parent: &OwnedFd, name: &Path) -> bool {
    let Ok(directory) = place::directory(parent, name) else {
        return false;
    };
    let mut value = [0; 1];
    MARKS
        .iter()
        .any(|mark| fgetxattr(&directory, *mark, &mut value[..]).is_ok())
}

/// Ends whatever is left in a cgroup of this jail, and removes it.
fn remove_cgroup(path: &Path, kind: Kind) -> io::Result<()> {
    let deadline = Instant::now() + CGROUP_BUSY_MAX;
    loop {
        match std::fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                // Others are in a cgroup that is shared.
                if kind == Kind::Shared {
                    return Ok(());
                }
                if Instant::now() > deadline {
                    return Err(error);
                }
            }
            other => return other,
        }
        let processes = std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        let processes = processes
            .lines()
            .filter_map(|line| rustix::process::Pid::from_raw(line.parse().ok()?));
        for process in processes {
            // One that is gone meanwhile is what is wanted.
            let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What could not be removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot remove {}, which was made for the jail; remove it yourself", path.display())]
pub(crate) struct LedgerError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn item(kind: Kind, path: &str) -> Item {
        Item {
            kind,
            path: path.into(),
        }
    }

    fn ledger(base: &Path, items: Vec<Item>) -> Ledger {
        Ledger::shared(File::open(base).expect("it is there").into(), items).expect("there is memory")
    }

    fn written(base: &Path, path: &str) -> io::Result<Made> {
        fs::write(base.join(path), "x")?;
        Ok(Made::New)
    }

    fn directory(base: &Path, path: &str) -> io::Result<Made> {
        match fs::create_dir(base.join(path)) {
            Ok(()) => Ok(Made::New),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Made::Found),
            Err(error) => Err(error),
        }
    }

    #[test]
    fn what_was_made_goes_and_what_others_made_stays() {
        let base = tempfile::tempdir().expect("a directory");
        let base = base.path();
        fs::create_dir(base.join("old")).expect("a directory");
        let items = vec![
            item(Kind::Directory, "old"),
            item(Kind::Directory, "new"),
            item(Kind::Directory, "full"),
            item(Kind::File, "new/a"),
            item(Kind::File, "full/b"),
        ];
        let ledger = ledger(base, items);
        for name in ["old", "new", "full"] {
            ledger
                .make(Path::new(name), || directory(base, name))
                .expect("it is made");
        }
        ledger
            .make(Path::new("new/a"), || written(base, "new/a"))
            .expect("it is made");
        ledger
            .make(Path::new("full/b"), || written(base, "full/b"))
            .expect("it is made");
        fs::write(base.join("full/snapshot"), "keep").expect("a file");
        ledger.remove().expect("nothing is in the way");
        assert!(base.join("old").is_dir());
        assert!(!base.join("new").exists());
        assert!(!base.join("full/b").exists());
        assert_eq!(
            fs::read_to_string(base.join("full/snapshot")).expect("it stays"),
            "keep"
        );
        ledger.remove().expect("twice is as good as once");
    }

    #[test]
    fn a_file_that_took_the_place_of_one_that_was_made_stays() {
        let base = tempfile::tempdir().expect("a directory");
        let base = base.path();
        let ledger = ledger(base, vec![item(Kind::File, "a")]);
        ledger
            .make(Path::new("a"), || written(base, "a"))
            .expect("it is made");
        // The old one stays open, so that its inode is not used again.
        let old = File::open(base.join("a")).expect("it is there");
        fs::remove_file(base.join("a")).expect("it is there");
        fs::write(base.join("a"), "a snapshot").expect("a file");
        ledger.remove().expect("nothing is removed");
        drop(old);
        assert_eq!(
            fs::read_to_string(base.join("a")).expect("it stays"),
            "a snapshot"
        );
    }

    #[test]
    fn what_a_killed_process_was_about_to_make_goes() {
        let base = tempfile::tempdir().expect("a directory");
        let base = base.path();
        let ledger = ledger(base, vec![item(Kind::File, "a"), item(Kind::Socket, "s")]);
        ledger.expect(Path::new("a")).expect("it can be looked for");
        ledger.expect(Path::new("s")).expect("it can be looked for");
        fs::write(base.join("a"), "").expect("a file");
        fs::write(base.join("s"), "no socket").expect("a file");
        ledger.remove().expect("nothing is in the way");
        assert!(!base.join("a").exists());
        assert!(base.join("s").exists());
        // What was there before is not expected.
        fs::write(base.join("a"), "").expect("a file");
        ledger.expect(Path::new("a")).expect("it can be looked for");
        ledger.remove().expect("nothing is in the way");
        assert!(base.join("a").exists());
    }

    #[test]
    fn a_shared_directory_is_removed_by_whoever_leaves_it_last() {
        let base = tempfile::tempdir().expect("a directory");
        let base = base.path();
        let make = |ledger: &Ledger, own: &'static str| {
            let shared = || {
                let made = directory(base, "shared")?;
                if made == Made::New {
                    mark(File::open(base.join("shared"))?);
                }
                Ok(made)
            };
            ledger.make(Path::new("shared"), shared).expect("it is made");
            ledger
                .make(Path::new(own), || directory(base, own))
                .expect("it is made");
        };
        let items = |own| vec![item(Kind::Shared, "shared"), item(Kind::Directory, own)];
        let (first, second) = (ledger(base, items("shared/1")), ledger(base, items("shared/2")));
        make(&first, "shared/1");
        make(&second, "shared/2");
        first.remove().expect("nothing is in the way");
        assert!(base.join("shared/2").is_dir());
        second.remove().expect("nothing is in the way");
        assert!(!base.join("shared").exists());
        // One that a user has made is the user's.
        fs::create_dir(base.join("shared")).expect("a directory");
        make(&first, "shared/1");
        first.remove().expect("nothing is in the way");
        assert!(base.join("shared").is_dir());
    }

    #[test]
    fn a_failed_step_has_made_nothing() {
        let base = tempfile::tempdir().expect("a directory");
        let base = base.path();
        let ledger = ledger(base, vec![item(Kind::File, "a")]);
        let failed = ledger.make(Path::new("a"), || Err(io::ErrorKind::AlreadyExists.into()));
        assert!(failed.is_err());
        fs::write(base.join("a"), "somebody else's").expect("a file");
        ledger.remove().expect("nothing is removed");
        assert!(base.join("a").exists());
        fs::remove_file(base.join("a")).expect("it is there");
        // But one whose owner could not be changed is there, and goes.
        let half = ledger.make(Path::new("a"), || {
            fs::write(base.join("a"), "")?;
            Err(io::ErrorKind::PermissionDenied.into())
        });
        assert!(half.is_err());
        ledger.remove().expect("nothing is in the way");
        assert!(!base.join("a").exists());
    }
}
