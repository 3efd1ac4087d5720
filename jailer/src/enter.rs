//! The way into a jail, for the process that will be the monitor: cgroups, namespaces, the root, limits, and less and less
//! rights. What the host's names are needed for comes before the root is changed.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{Resource, Rlimit, chdir, fchdir, getrlimit, pivot_root, setrlimit};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::cgroup::CgroupError;
use crate::cli::{Limits, Request};
use crate::jail::{self, Jail, JailError};
use crate::ledger::Ledger;
use crate::mount::{self, attach, copied};
use crate::place;
use crate::plan::{Plan, Standing, host_path, opened_without_links};
use crate::privileges::{self, PrivilegeError};

/// Descriptors of a monitor that is given no limit.
const NO_FILE_DEFAULT: u64 = 2048;

/// Enters the jail. Afterwards this process sees nothing of the host, and may do what the monitor may.
///
/// # Errors
///
/// When a step is refused; the process is of no use then.
pub(crate) fn enter(plan: &Plan, ledger: &Ledger, jail: &Jail, has_user_ns: bool) -> Result<(), EnterError> {
    let request = &plan.request;
    let null = request.daemonize.then(|| {
        let null = File::options().read(true).write(true).open("/dev/null");
        null.map_err(step("open /dev/null"))
    });
    let null = null.transpose()?;
    let pid = fs::read_link("/proc/self").map_err(step("read /proc/self"))?;
    jail::write_pid(plan, ledger, jail, &pid.to_string_lossy())?;
    for group in &plan.groups {
        group.enter()?;
    }
    if plan.standing == Standing::Rootless {
        become_root_of_a_user_namespace(request, has_user_ns)?;
    }
    if let Some(netns) = &plan.netns {
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|source| {
            EnterError::Netns {
                path: request.netns.clone().unwrap_or_default(),
                source: source.into(),
            }
        })?;
    }
    change_root(plan, jail)?;
    limit(request.limits)?;
    if let Some(null) = null {
        rustix::stdio::dup2_stdin(&null).map_err(step("replace standard input"))?;
        rustix::stdio::dup2_stdout(&null).map_err(step("replace standard output"))?;
        rustix::stdio::dup2_stderr(&null).map_err(step("replace standard error"))?;
    }
    Ok(privileges::drop_all(plan.standing, request.uid, request.gid)?)
}

/// All rights over what is made from here on, and none over the host.
fn become_root_of_a_user_namespace(request: &Request, has_it: bool) -> Result<(), EnterError> {
    if !has_it {
        unshare(UnshareFlags::NEWUSER).map_err(|source| EnterError::UserNamespace { source })?;
    }
    let own = |id: u32| format!("{id} {id} 1");
    // Whoever maps a group may not let it be left: files that deny something to a group would be readable.
    for (file, content) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", own(request.uid)),
        ("/proc/self/gid_map", own(request.gid)),
    ] {
        fs::write(file, content).map_err(|source| EnterError::UserNamespace { source })?;
    }
    Ok(())
}

/// The jail's directory becomes the root, with what it is given mounted in it, and nothing of the host is left.
fn change_root(plan: &Plan, jail: &Jail) -> Result<(), EnterError> {
    // What is opened on the host is of the host's mounts: root takes copies of them from there, an ordinary user may
    // only do so in its own namespace, and so has to open it again there.
    let is_root = plan.standing == Standing::Root;
    let early = if is_root {
        let mounts = mounts(plan, jail, &copied)?;
        mount::enter_smallest_namespace().map_err(step("go back to the host's mount namespace"))?;
        Some(mounts)
    } else {
        None
    };
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS)
        .map_err(step("make mount, IPC and UTS namespaces"))?;
    // Or what is unmounted here would be unmounted on the host.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(step("keep mounts to this namespace"))?;
    let Mounts { root, inside } = match early {
        Some(mounts) => mounts,
        None => mounts(plan, jail, &|source: &OwnedFd| copied(&again(source)?))?,
    };
    // On top of the old root, so that no name beneath that is looked up.
    attach(&root, CWD, "/").map_err(step("mount the jail"))?;
    fchdir(&root).map_err(step("enter the jail"))?;
    pivot_root(".", ".").map_err(step("change the root to the jail"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("leave the old root"))?;
    chdir("/").map_err(step("enter the new root"))?;
    for (name, mount) in &inside {
        let refused = |source| EnterError::Show {
            name: name.clone(),
            source,
        };
        let at = place::open(CWD, name, OFlags::PATH, Mode::empty()).map_err(refused)?;
        attach(mount, &at, "").map_err(|error| refused(error.into()))?;
    }
    if is_root {
        jail::takes_nodes(plan, jail)?;
    }
    Ok(())
}

/// Mounts that are nowhere yet.
struct Mounts {
    root: OwnedFd,
    /// And where each is to be, relative to the root.
    inside: Vec<(PathBuf, OwnedFd)>,
}

fn mounts(
    plan: &Plan,
    jail: &Jail,
    copy: &dyn Fn(&OwnedFd) -> io::Result<OwnedFd>,
) -> Result<Mounts, EnterError> {
    let root = copy(&jail.root).map_err(step("mount the jail"))?;
    let mut inside = Vec::new();
    if plan.standing == Standing::Rootless {
        for node in &plan.nodes {
            let path = Path::new("/").join(node.path);
            let mount = opened_without_links(&path)
                .and_then(|node| copied(&node))
                .map_err(|source| EnterError::Show { name: path, source })?;
            inside.push((node.path.into(), mount));
        }
    }
    for gift in &plan.gifts {
        let mount = copy(&gift.source).map_err(|source| EnterError::Show {
            name: gift.name.clone(),
            source,
        })?;
        inside.push((gift.name.clone(), mount));
    }
    Ok(Mounts { root, inside })
}

/// The same file opened in this mount namespace, or an error if another has its name now.
fn again(source: &OwnedFd) -> io::Result<OwnedFd> {
    let path = host_path(source)?;
    let opened = opened_without_links(&path)?;
    let identity =
        |descriptor: &OwnedFd| rustix::fs::fstat(descriptor).map(|stat| (stat.st_dev, stat.st_ino));
    if identity(&opened)? != identity(source)? {
        return Err(io::Error::other(format!(
            "{} is another file now",
            path.display()
        )));
    }
    Ok(opened)
}

fn limit(limits: Limits) -> Result<(), EnterError> {
    let set = |resource, what, value: u64| {
        let both = Rlimit {
            current: Some(value),
            maximum: Some(value),
        };
        setrlimit(resource, both).map_err(|source| EnterError::Limit {
            what,
            value,
            source: source.into(),
        })
    };
    if let Some(bytes) = limits.file_size {
        set(Resource::Fsize, "fsize", bytes)?;
    }
    let no_file = limits.no_file.unwrap_or_else(|| {
        let most = getrlimit(Resource::Nofile).maximum;
        most.map_or(NO_FILE_DEFAULT, |most| most.min(NO_FILE_DEFAULT))
    });
    set(Resource::Nofile, "no-file", no_file)
}

#[expect(unsafe_code, reason = "rustix counts unshare among the calls that need care")]
fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: no other thread shares what becomes this one's own, and no descriptor does.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> EnterError {
    move |source| EnterError::Step {
        what,
        source: source.into(),
    }
}

/// Why a jail is not entered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnterError {
    /// A step is refused.
    #[error("cannot {what}")]
    Step {
        /// Which.
        what: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// No user namespace.
    #[error(
        "without root a jail is made by a user namespace, which this host refuses; see user.max_user_namespaces, or be root"
    )]
    UserNamespace {
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// No such network.
    #[error("cannot join --netns {}; it has to be a network namespace, and without root one of your own", path.display())]
    Netns {
        /// As asked.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Something cannot be shown.
    #[error("cannot show {} in the jail", name.display())]
    Show {
        /// Relative to the root.
        name: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A limit above the one in force.
    #[error(
        "cannot set --resource-limit {what}={value}; only a process with CAP_SYS_RESOURCE raises its own limit"
    )]
    Limit {
        /// Which.
        what: &'static str,
        /// As asked.
        value: u64,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The jail itself.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Rights that cannot be given away.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
}
