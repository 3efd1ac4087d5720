//! A request with everything opened and looked at: nothing after this sees a path of the host.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Dev, Mode, OFlags, ResolveFlags, StatVfsMountFlags, fstatvfs, makedev, openat2};

use crate::cgroup::{self, CgroupError, Group};
use crate::cli::{CliError, Request, Source, is_beneath_root};
use crate::ledger::{Item, Kind};

/// A jail to be.
#[derive(Debug)]
pub(crate) struct Plan {
    /// What was asked for.
    pub(crate) request: Request,
    /// What this process may do.
    pub(crate) standing: Standing,
    /// The monitor.
    pub(crate) exec: File,
    /// What its file is called.
    pub(crate) exec_name: PathBuf,
    /// Its permissions.
    pub(crate) exec_mode: u32,
    /// Where jails are made.
    pub(crate) base: OwnedFd,
    /// The network namespace to join.
    pub(crate) netns: Option<OwnedFd>,
    /// Files to be shown.
    pub(crate) gifts: Vec<Gift>,
    /// Cgroups to be made and entered.
    pub(crate) groups: Vec<Group>,
    /// Device nodes.
    pub(crate) nodes: Vec<Node>,
    /// Where records go.
    pub(crate) record: Option<File>,
}

/// What this process may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Everything.
    Root,
    /// What an ordinary user may, in a user namespace.
    Rootless,
}

/// A file of the host that is shown in the jail.
#[derive(Debug)]
pub(crate) struct Gift {
    /// Opened as a path only: no lock and no lease of a file depends on such a descriptor.
    pub(crate) source: OwnedFd,
    /// Whether it is a directory.
    pub(crate) is_directory: bool,
    /// Where, relative to the root.
    pub(crate) name: PathBuf,
}

/// A device node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// Where, relative to the root.
    pub(crate) path: &'static str,
    /// Which device.
    pub(crate) device: Dev,
}

/// Directories of the jail that the monitor owns.
pub(crate) const FOLDERS: [&str; 3] = ["dev", "dev/net", "run"];

const MISC_MAJOR: u32 = 10;
const USERFAULTFD: &str = "dev/userfaultfd";
/// The socket of a monitor that is told of no other.
const API_SOCKET: &str = "/run/firecracker.socket";

impl Plan {
    /// Opens all that the request names; what it names by descriptors is among `given`.
    ///
    /// # Errors
    ///
    /// When something of it is not there, or is not for this user.
    pub(crate) fn open(request: Request, given: &[Given]) -> Result<Self, PlanError> {
        let standing = Standing::of_this_process();
        standing.allows(&request)?;
        let refused = |what, path: Option<&Path>| {
            let path = path.map(Path::to_owned);
            move |source| PlanError::Open { what, path, source }
        };
        let exec_file = Some(request.exec_file.as_path());
        let exec = File::open(&request.exec_file).map_err(refused("--exec-file", exec_file))?;
        let metadata = exec.metadata().map_err(refused("--exec-file", exec_file))?;
        let exec_mode = metadata.permissions().mode() & 0o777;
        if !metadata.is_file() || exec_mode & 0o111 == 0 {
            return Err(PlanError::NoProgram {
                path: request.exec_file,
            });
        }
        // The last part of what was opened, wherever a link has led.
        let exec_name = last_part(&exec).map_err(refused("--exec-file", exec_file))?;
        let base = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(&request.base)
            .map_err(|source| PlanError::Base {
                path: request.base.clone(),
                source,
            })?;
        let netns = request.netns.as_ref().map(File::open);
        let netns = netns
            .transpose()
            .map_err(refused("--netns", request.netns.as_deref()))?;
        let mounts =
            match request.cgroups.is_empty() && request.cgroup_version == crate::cli::CgroupVersion::V1 {
                true => String::new(),
                false => fs::read_to_string("/proc/mounts").map_err(refused("/proc/mounts", None))?,
            };
        let groups = cgroup::planned(&request, &exec_name, &mounts)?;
        let record = request.supervision.as_ref().and_then(|s| s.record.as_ref());
        let record_path = record.map(PathBuf::as_path);
        let record = record_path
            .map(appended)
            .transpose()
            .map_err(refused("--record", record_path))?;
        Ok(Self {
            gifts: gifts(&request, given)?,
            nodes: nodes(standing),
            standing,
            exec,
            exec_name,
            exec_mode,
            base: base.into(),
            netns: netns.map(OwnedFd::from),
            groups,
            record,
            request,
        })
    }

    /// Whether the monitor is executed as it lies on the host: its user may do that now, and nobody wants a copy.
    pub(crate) fn shares_exec(&self) -> io::Result<bool> {
        if self.request.copy_exec {
            return Ok(false);
        }
        let metadata = self.exec.metadata()?;
        let class = if metadata.uid() == self.request.uid {
            0o100
        } else if metadata.gid() == self.request.gid {
            0o010
        } else {
            0o001
        };
        let mount = fstatvfs(&self.exec)?.f_flag;
        Ok(metadata.mode() & class != 0 && !mount.contains(StatVfsMountFlags::NOEXEC))
    }

    /// The root of the jail, relative to the base.
    pub(crate) fn root(&self) -> PathBuf {
        self.above_root().join("root")
    }

    /// The directory of this machine.
    pub(crate) fn above_root(&self) -> PathBuf {
        self.exec_name.join(&self.request.id)
    }

    /// The file that gets the number of the process, relative to the root.
    pub(crate) fn pid_file(&self) -> PathBuf {
        let mut name = self.exec_name.clone().into_os_string();
        name.push(".pid");
        name.into()
    }

    /// Where the monitor will have its API, relative to the root; it may have none.
    pub(crate) fn socket(&self) -> Option<PathBuf> {
        let words = &self.request.arguments;
        if words.iter().any(|word| word == "--no-api") {
            return None;
        }
        let inline = words.iter().find_map(|word| {
            word.as_bytes()
                .strip_prefix(b"--api-sock=")
                .map(OsStr::from_bytes)
        });
        let next = words.iter().skip_while(|word| *word != "--api-sock").nth(1);
        let path = inline
            .or(next.map(OsString::as_os_str))
            .unwrap_or(OsStr::new(API_SOCKET));
        let path: PathBuf = Path::new(path)
            .components()
            .filter(|part| !matches!(part, Component::CurDir | Component::RootDir))
            .collect();
        is_beneath_root(&path).then_some(path)
    }

    /// Everything that may be made, in the order in which it is.
    pub(crate) fn items(&self) -> Vec<Item> {
        let root = self.root();
        let item = |kind, path: PathBuf| Item { kind, path };
        let mut items = vec![
            item(Kind::Shared, self.exec_name.clone()),
            item(Kind::Directory, self.above_root()),
            item(Kind::Directory, root.clone()),
            item(Kind::File, root.join(&self.exec_name)),
        ];
        items.extend(FOLDERS.map(|folder| item(Kind::Directory, root.join(folder))));
        items.extend(
            self.nodes
                .iter()
                .map(|node| item(Kind::File, root.join(node.path))),
        );
        for gift in &self.gifts {
            for above in above(&gift.name) {
                items.push(item(Kind::Directory, root.join(above)));
            }
            let kind = if gift.is_directory {
                Kind::Directory
            } else {
                Kind::File
            };
            items.push(item(kind, root.join(&gift.name)));
        }
        items.push(item(Kind::File, root.join(self.pid_file())));
        items.extend(self.socket().map(|socket| item(Kind::Socket, root.join(socket))));
        items.extend(self.groups.iter().flat_map(Group::items));
        items
    }
}

/// The directories that a relative path is in, outermost first.
pub(crate) fn above(path: &Path) -> Vec<PathBuf> {
    let mut above: Vec<PathBuf> = path
        .ancestors()
        .skip(1)
        .filter(|above| !above.as_os_str().is_empty())
        .map(Path::to_owned)
        .collect();
    above.reverse();
    above
}

impl Standing {
    fn of_this_process() -> Self {
        if rustix::process::geteuid().is_root() {
            Self::Root
        } else {
            Self::Rootless
        }
    }

    /// Whether the user and group are ones that this process can run a monitor as.
    fn allows(self, request: &Request) -> Result<(), PlanError> {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        let wanted = [
            ("uid", request.uid, uid.as_raw()),
            ("gid", request.gid, gid.as_raw()),
        ];
        for (flag, wanted, own) in wanted {
            if self == Self::Rootless && wanted != own {
                return Err(PlanError::SomebodyElse { flag, wanted, own });
            }
        }
        Ok(())
    }
}

fn nodes(standing: Standing) -> Vec<Node> {
    let mut nodes = vec![
        ("dev/kvm", makedev(MISC_MAJOR, 232)),
        ("dev/net/tun", makedev(MISC_MAJOR, 200)),
        ("dev/urandom", makedev(1, 9)),
    ];
    if let Some(minor) = userfaultfd_minor() {
        nodes.push((USERFAULTFD, makedev(MISC_MAJOR, minor)));
    }
    // Who cannot make nodes shows those of the host, if it has them.
    nodes.retain(|(path, _)| standing == Standing::Root || Path::new("/").join(path).exists());
    nodes
        .into_iter()
        .map(|(path, device)| Node { path, device })
        .collect()
}

/// The kernel chooses it anew at each start.
fn userfaultfd_minor() -> Option<u32> {
    let devices = fs::read_to_string("/proc/misc").ok()?;
    devices.lines().find_map(|line| {
        let (minor, name) = line.trim().split_once(' ')?;
        (name == "userfaultfd").then(|| minor.parse().ok())?
    })
}

/// What was handed in as a descriptor, opened as a path.
#[derive(Debug)]
pub(crate) struct Given {
    number: i32,
    file: OwnedFd,
}

/// The files of inherited descriptors, which are closed: they themselves would keep locks alive, and be open in every later
/// process.
///
/// # Errors
///
/// One of the numbers is not open.
pub(crate) fn given(numbers: &[i32]) -> Result<Vec<Given>, PlanError> {
    let refused = |number| move |source| PlanError::Fd { number, source };
    // All before the first is opened, which may get the number of one that is not there.
    for number in numbers {
        fs::symlink_metadata(format!("/proc/self/fd/{number}")).map_err(refused(*number))?;
    }
    let opened = numbers.iter().map(|&number| {
        let file = as_a_path(number).map_err(refused(number))?;
        Ok(Given { number, file })
    });
    let opened = opened.collect::<Result<Vec<_>, PlanError>>()?;
    for number in numbers {
        close(*number);
    }
    Ok(opened)
}

fn gifts(request: &Request, given: &[Given]) -> Result<Vec<Gift>, PlanError> {
    let mut gifts: Vec<Gift> = Vec::new();
    for shown in &request.files {
        let source = match &shown.source {
            Source::Path(path) => opened_without_links(path).map_err(|source| PlanError::Shown {
                path: path.clone(),
                source,
            })?,
            Source::Fd(number) => {
                let given = given.iter().find(|given| given.number == *number);
                let file = given.map_or(Err(io::ErrorKind::NotFound.into()), |given| {
                    given.file.try_clone()
                });
                file.map_err(|source| PlanError::Fd {
                    number: *number,
                    source,
                })?
            }
        };
        let refused = |source| PlanError::Open {
            what: "/proc/self/fd",
            path: None,
            source,
        };
        let metadata = fs::metadata(own_path(source.as_fd())).map_err(refused)?;
        let name = match &shown.name {
            Some(name) => name.clone(),
            None => last_part(&source).map_err(refused)?,
        };
        if gifts.iter().any(|gift| gift.name == name) {
            return Err(PlanError::Twice { name });
        }
        gifts.push(Gift {
            source,
            is_directory: metadata.is_dir(),
            name,
        });
    }
    Ok(gifts)
}

/// Opens a file that no link leads to: whoever may write a directory on the way cannot choose another.
pub(crate) fn opened_without_links(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(openat2(
        CWD,
        path,
        flags,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    )?)
}

/// The file of an inherited descriptor, opened as a path.
fn as_a_path(number: i32) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let path = format!("/proc/self/fd/{number}");
    Ok(openat2(CWD, path, flags, Mode::empty(), ResolveFlags::empty())?)
}

/// Closes a descriptor that was inherited for `--fd`; named twice, it is closed already.
#[expect(
    unsafe_code,
    reason = "a descriptor that is known by its number becomes one that is owned"
)]
fn close(number: i32) {
    if Path::new(&format!("/proc/self/fd/{number}")).exists() {
        // SAFETY: it is open, came from the caller of this program, and nothing here owns it.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
}

fn own_path(descriptor: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}

/// Where the file of a descriptor is on this host.
///
/// # Errors
///
/// When /proc is not there.
pub(crate) fn host_path(descriptor: impl AsFd) -> io::Result<PathBuf> {
    fs::read_link(own_path(descriptor.as_fd()))
}

fn last_part(descriptor: impl AsFd) -> io::Result<PathBuf> {
    let path = host_path(descriptor)?;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(PathBuf::from(name))
}

fn appended(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    // A second name would let whoever made it choose the file that is written to.
    if file.metadata()?.is_file() && file.metadata()?.nlink() > 1 {
        return Err(io::Error::other(
            "the file has a second name; give one that has not",
        ));
    }
    Ok(file)
}

/// What to do about a link on the way.
fn of_links(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ELOOP) => "; a symbolic link on the way is refused: give the path that it leads to",
        _ => "",
    }
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    /// Something cannot be opened.
    #[error("cannot open {what}{}", path.as_ref().map(|path| format!(" {}", path.display())).unwrap_or_default())]
    Open {
        /// What.
        what: &'static str,
        /// As asked.
        path: Option<PathBuf>,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The directory of all jails is not there.
    #[error("cannot open --chroot-base-dir {}; make that directory first, or name another", path.display())]
    Base {
        /// As asked, or /srv/jailer.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The monitor is none.
    #[error("--exec-file {} is no program; give a file that may be executed", path.display())]
    NoProgram {
        /// As asked.
        path: PathBuf,
    },
    /// A file that cannot be shown.
    #[error("cannot open --file {}{}", path.display(), of_links(source))]
    Shown {
        /// As asked.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A descriptor that is not open.
    #[error(
        "--fd {number} is not open; the process that starts the jailer has to leave it open, and not close-on-exec"
    )]
    Fd {
        /// As asked.
        number: i32,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Two files of one name.
    #[error("two files are to be `{}` in the jail; give each a NAME of its own", name.display())]
    Twice {
        /// The name.
        name: PathBuf,
    },
    /// Another user, without the right to become that.
    #[error(
        "--{flag} {wanted} cannot be honoured without root: an ordinary user's jail runs as that user, --{flag} {own}"
    )]
    SomebodyElse {
        /// The flag.
        flag: &'static str,
        /// As asked.
        wanted: u32,
        /// What can be had.
        own: u32,
    },
    /// No such cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The words.
    #[error(transparent)]
    Words(#[from] CliError),
}
