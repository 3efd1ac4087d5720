//! The directory of a jail, made on the host before anybody is in it.
//!
//! What is there already may be hostile: an earlier monitor owned it, and a process of that user may still run. So every
//! directory is taken over first, and given to the monitor's user when nothing is left to be done in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Uid, chownat, fchmod, fchown, flock, mkdirat,
    mknodat, unlinkat,
};

use crate::cgroup::CgroupError;
use crate::ledger::{self, Kind, Ledger, Made};
use crate::place;
use crate::plan::{FOLDERS, Gift, Node, Plan, Standing, above};

/// A jail that is ready to be entered.
#[derive(Debug)]
pub(crate) struct Jail {
    /// Its root.
    pub(crate) root: OwnedFd,
    /// The monitor's program. It is executed by this descriptor: what has its name in the jail may be another's by then.
    pub(crate) monitor: File,
}

/// Mode of the monitor's own directories.
const FOLDER_MODE: Mode = Mode::RWXU;
/// How often a directory that jails share may vanish while ours is made in it.
const ATTEMPTS_MAX: u32 = 100;

/// Makes the jail, and its cgroups.
///
/// # Errors
///
/// When something of it cannot be made; the ledger has the rest.
pub(crate) fn build(plan: &Plan, ledger: &Ledger) -> Result<Jail, JailError> {
    let maker = Maker {
        plan,
        ledger,
        root_path: plan.root(),
    };
    let root = maker.root()?;
    maker.begin(&root)?;
    maker.take(&root).map_err(failed(&maker.root_path))?;
    let monitor = maker.monitor(&root)?;
    for folder in FOLDERS {
        maker.folder(&root, Path::new(folder))?;
    }
    for node in &plan.nodes {
        maker.node(&root, *node)?;
    }
    for gift in &plan.gifts {
        for above in above(&gift.name) {
            // One that is there for somebody else stays as it is.
            if !FOLDERS.iter().any(|folder| *above == **folder) {
                maker.folder(&root, &above)?;
            }
        }
        maker.placeholder(&root, gift)?;
    }
    for gift in &plan.gifts {
        above(&gift.name)
            .iter()
            .try_for_each(|folder| maker.give(&root, folder))?;
    }
    for folder in FOLDERS.iter().rev() {
        maker.give(&root, Path::new(folder))?;
    }
    maker.give(&root, Path::new(""))?;
    if let Some(socket) = plan.socket() {
        // The monitor makes it; one that is there before is not its.
        let path = maker.root_path.join(socket);
        ledger.expect(&path).map_err(failed(&path))?;
    }
    for group in &plan.groups {
        group.make(ledger)?;
    }
    flock(&root, FlockOperation::Unlock).map_err(|error| failed(&maker.root_path)(error.into()))?;
    Ok(Jail { root, monitor })
}

/// Writes the number of a process into the jail, for launchers.
///
/// # Errors
///
/// When there is such a file, or it cannot be written.
pub(crate) fn write_pid(plan: &Plan, ledger: &Ledger, jail: &Jail, pid: &str) -> Result<(), JailError> {
    let name = plan.pid_file();
    let path = plan.root().join(&name);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    ledger
        .make(&path, || {
            let mut file = File::from(place::open(&jail.root, &name, flags, mode)?);
            io::Write::write_all(&mut file, pid.as_bytes())?;
            Ok(Made::New)
        })
        .map_err(failed(&path))
}

struct Maker<'a> {
    plan: &'a Plan,
    ledger: &'a Ledger,
    root_path: PathBuf,
}

impl Maker<'_> {
    /// The root, and the two directories above.
    fn root(&self) -> Result<OwnedFd, JailError> {
        let base = self.plan.base.as_fd();
        let above = self.plan.above_root();
        let mut attempt = 0;
        loop {
            // Whoever leaves the shared directory last removes it, perhaps just now.
            let made = self
                .directory(base, &self.plan.exec_name)
                .and_then(|()| self.directory(base, &above))
                .and_then(|()| self.directory(base, &self.root_path))
                .and_then(|()| place::directory(base, &self.root_path));
            match made {
                Err(error) if error.kind() == io::ErrorKind::NotFound && attempt < ATTEMPTS_MAX => {
                    attempt += 1
                }
                other => return other.map_err(failed(&self.root_path)),
            }
        }
    }

    fn directory(&self, base: impl AsFd, path: &Path) -> io::Result<()> {
        self.ledger.make(path, || {
            let (parent, name) = place::parent(&base, path)?;
            let mode = FOLDER_MODE | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
            match mkdirat(&parent, name, mode) {
                Ok(()) => {
                    if path == self.plan.exec_name {
                        ledger::mark(place::directory(&parent, name)?);
                    }
                    Ok(Made::New)
                }
                Err(rustix::io::Errno::EXIST) => Ok(Made::Found),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Nobody but us makes or renames anything in a directory from here on.
    fn take(&self, directory: impl AsFd) -> io::Result<()> {
        if self.plan.standing == Standing::Root {
            fchown(&directory, Some(Uid::ROOT), Some(Gid::ROOT))?;
        }
        Ok(fchmod(&directory, FOLDER_MODE)?)
    }

    /// A directory in the jail becomes the monitor's.
    fn give(&self, root: &OwnedFd, path: &Path) -> Result<(), JailError> {
        let whole = self.root_path.join(path);
        if self.plan.standing == Standing::Rootless {
            return Ok(());
        }
        let (uid, gid) = self.owner();
        let directory = place::directory(root, path).map_err(failed(&whole))?;
        fchown(directory, uid, gid).map_err(|error| failed(&whole)(error.into()))
    }

    fn folder(&self, root: &OwnedFd, path: &Path) -> Result<(), JailError> {
        let whole = self.root_path.join(path);
        let made = self.ledger.make(&whole, || {
            let (parent, name) = place::parent(root, path)?;
            match mkdirat(&parent, name, FOLDER_MODE) {
                Ok(()) => Ok(Made::New),
                Err(rustix::io::Errno::EXIST) => Ok(Made::Found),
                Err(error) => Err(error.into()),
            }
        });
        made.and_then(|()| self.take(place::directory(root, path)?))
            .map_err(failed(&whole))
    }

    /// Nobody else makes this jail, and nobody is in it: what an earlier one has left would be refused later, too, but by then
    /// one that runs would have lost its directories.
    fn begin(&self, root: &OwnedFd) -> Result<(), JailError> {
        flock(root, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => JailError::IsThere {
                path: self.root_path.clone(),
            },
            other => failed(&self.root_path)(other.into()),
        })?;
        for item in self.plan.items() {
            let Ok(path) = item.path.strip_prefix(&self.root_path) else {
                continue;
            };
            if item.kind != Kind::File || path == self.plan.exec_name {
                continue;
            }
            // Whatever keeps a directory from being looked into is told of where it is made.
            let found = place::parent(root, path).and_then(|(parent, name)| place::identity(parent, name));
            if matches!(found, Ok(Some(_))) {
                return Err(JailError::IsThere { path: item.path });
            }
        }
        Ok(())
    }

    /// The monitor's program: the host's own file, and an empty one in its place; or a copy where that is wanted, or needed.
    /// Either is a new file each time, so that nobody has the old one open for writing, or by another name.
    ///
    /// A copy is dearer than all the rest of a jail, and makes each machine larger by what it is long.
    fn monitor(&self, root: &OwnedFd) -> Result<File, JailError> {
        let name = &self.plan.exec_name;
        let whole = self.root_path.join(name);
        let is_shared = self.plan.shares_exec().map_err(failed(&whole))?;
        let made = self.ledger.make(&whole, || {
            match unlinkat(root, name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            let mut file = File::from(place::open(
                root,
                name,
                flags,
                Mode::from_raw_mode(self.plan.exec_mode),
            )?);
            if !is_shared {
                // Each jail of a supervisor copies from the start.
                rustix::fs::seek(&self.plan.exec, rustix::fs::SeekFrom::Start(0))?;
                io::copy(&mut &self.plan.exec, &mut file)?;
            }
            if self.plan.standing == Standing::Root {
                let (uid, gid) = self.owner();
                fchown(&file, uid, gid)?;
            }
            Ok(Made::New)
        });
        made.map_err(failed(&whole))?;
        let opened = if is_shared {
            self.plan.exec.try_clone()
        } else {
            // Nobody but us has the directory yet.
            place::open(root, name, OFlags::RDONLY, Mode::empty()).map(File::from)
        };
        opened.map_err(failed(&whole))
    }

    /// A device node, or an empty file for one of the host's to be mounted on.
    fn node(&self, root: &OwnedFd, node: Node) -> Result<(), JailError> {
        let whole = self.root_path.join(node.path);
        let made = self.ledger.make(&whole, || {
            let (parent, name) = place::parent(root, Path::new(node.path))?;
            let mode = Mode::RUSR | Mode::WUSR;
            if self.plan.standing == Standing::Rootless {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                place::open(&parent, name, flags, mode)?;
                return Ok(Made::New);
            }
            mknodat(&parent, name, FileType::CharacterDevice, mode, node.device)?;
            let (uid, gid) = self.owner();
            chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
            Ok(Made::New)
        });
        made.map_err(failed(&whole))
    }

    /// Something empty for a file of the host to be mounted on.
    fn placeholder(&self, root: &OwnedFd, gift: &Gift) -> Result<(), JailError> {
        let whole = self.root_path.join(&gift.name);
        let made = self.ledger.make(&whole, || {
            let (parent, name) = place::parent(root, &gift.name)?;
            if gift.is_directory {
                mkdirat(&parent, name, FOLDER_MODE)?;
            } else {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                place::open(&parent, name, flags, Mode::RUSR)?;
            }
            Ok(Made::New)
        });
        made.map_err(failed(&whole))
    }

    fn owner(&self) -> (Option<Uid>, Option<Gid>) {
        let request = &self.plan.request;
        (Some(Uid::from_raw(request.uid)), Some(Gid::from_raw(request.gid)))
    }
}

/// Whether the file system of a jail lets device nodes work; the kernel would only say so to the monitor.
///
/// # Errors
///
/// When it does not, or cannot be asked.
pub(crate) fn takes_nodes(plan: &Plan, jail: &Jail) -> Result<(), JailError> {
    let flags = rustix::fs::fstatvfs(&jail.root).map_err(|error| failed(&plan.root())(error.into()))?;
    let is_nodev = flags.f_flag.contains(rustix::fs::StatVfsMountFlags::NODEV);
    if is_nodev && plan.standing == Standing::Root {
        return Err(JailError::Nodev {
            path: plan.request.base.clone(),
        });
    }
    Ok(())
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> JailError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::AlreadyExists => JailError::IsThere { path },
        _ => JailError::Make { path, source },
    }
}

/// Why there is no jail.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    /// Something cannot be made.
    #[error("cannot make {} in --chroot-base-dir; it has to be a directory that you may write", path.display())]
    Make {
        /// Relative to the base.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Somebody made it before.
    #[error(
        "{} in --chroot-base-dir is there already: a machine of this --id runs, or an earlier jail has left it, or --file gives \
         something of that name; look which, and then remove it, or take another --id or NAME",
        path.display()
    )]
    IsThere {
        /// Relative to the base.
        path: PathBuf,
    },
    /// Nodes would not work.
    #[error("--chroot-base-dir {} is mounted nodev, where no /dev/kvm works; choose another", path.display())]
    Nodev {
        /// As asked.
        path: PathBuf,
    },
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}
