//! The first process of a guest, started from an initial RAM disk: for images that know nothing of an agent.
//!
//! ```text
//! process 1: /dev, /proc, /sys ──fork──► the agent, which serves; asked for a root it mounts that and moves into it
//!     │                                      │
//!     └─ takes in whoever has no parent      └─ ends: the machine does, too
//! ```
#![expect(
    unsafe_code,
    reason = "it forks before there is any other thread, and waits for children that are not its own"
)]

use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use thiserror::Error;

/// How long a disk may take to be found.
const DISK_WAIT: Duration = Duration::from_secs(5);
const DISK_LOOK: Duration = Duration::from_millis(5);
const ROOT: &str = "/newroot";
/// What the agent has mounted itself, and takes along.
const TAKEN: [&str; 3] = ["dev", "proc", "sys"];

static IS_FIRST: AtomicBool = AtomicBool::new(false);
static HAS_ROOT: Mutex<bool> = Mutex::new(false);

/// Why a disk is not the root.
#[derive(Debug, Error)]
pub(super) enum RootError {
    #[error("this agent is not the first process of its guest: it has the root that it was started in")]
    NotFirst,
    #[error("it has its root already")]
    Twice,
    #[error("there is no disk {0}")]
    NoDisk(String),
    #[error(
        "{device} has none of the file systems that this kernel has ({kinds}): an image with partitions needs the device of one, \
         such as /dev/vda1"
    )]
    NoFileSystem { device: String, kinds: String },
    #[error("cannot {what}")]
    Failed {
        what: String,
        #[source]
        source: io::Error,
    },
}

/// Makes this process one that can serve, if it is the first; the first goes on in a child then.
///
/// # Errors
///
/// When there is no child.
pub(super) fn begin() -> io::Result<()> {
    if std::process::id() != 1 {
        return Ok(());
    }
    // What is missing is missed by whoever needs it, and a console may be all that can say so.
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        if let Err(error) = fs::create_dir_all(at).and_then(|()| mounted(kind, at, kind)) {
            eprintln!("coracle-agent: cannot mount {at}: {error}");
        }
    }
    // SAFETY: there is no other thread.
    match unsafe { libc::fork() } {
        0 => {
            IS_FIRST.store(true, Ordering::Relaxed);
            Ok(())
        }
        -1 => Err(io::Error::last_os_error()),
        child => reap_until(child),
    }
}

fn reap_until(child: i32) -> ! {
    loop {
        // SAFETY: no status is asked for.
        let ended = unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) };
        if ended == child {
            rustix::fs::sync();
            // SAFETY: it takes no memory.
            unsafe { libc::reboot(libc::RB_AUTOBOOT) };
            // A kernel that cannot do that must not lose its first process either.
            thread::sleep(Duration::MAX);
        }
    }
}

/// Mounts `device` and moves this process, all of it, into it.
///
/// # Errors
///
/// When it is no root, or there is one already.
pub(super) fn enter(device: &str) -> Result<(), RootError> {
    if !IS_FIRST.load(Ordering::Relaxed) {
        return Err(RootError::NotFirst);
    }
    let mut has_root = HAS_ROOT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if *has_root {
        return Err(RootError::Twice);
    }
    let failed = |what: String| move |source: io::Error| RootError::Failed { what, source };
    let begun = Instant::now();
    while !Path::new(device).exists() {
        if begun.elapsed() > DISK_WAIT {
            return Err(RootError::NoDisk(device.to_owned()));
        }
        thread::sleep(DISK_LOOK);
    }
    fs::create_dir_all(ROOT).map_err(failed(format!("make {ROOT}")))?;
    mount_root(device)?;
    for name in TAKEN {
        let place = format!("{ROOT}/{name}");
        // A read-only image that lacks it goes without.
        let _ = fs::create_dir(&place);
        if let Err(errno) = mount_move(format!("/{name}"), &place) {
            eprintln!("coracle-agent: the image has no place for /{name}: {errno}");
        }
    }
    let moved = rustix::process::chdir(ROOT)
        .and_then(|()| mount_move(".", "/"))
        .and_then(|()| rustix::process::chroot("."))
        .and_then(|()| rustix::process::chdir("/"));
    moved.map_err(|errno| failed(format!("move into {device}"))(errno.into()))?;
    *has_root = true;
    for (kind, at) in [("devpts", "/dev/pts"), ("tmpfs", "/dev/shm")] {
        // Terminals and shared memory are what few commands need.
        let _ = fs::create_dir(at).and_then(|()| mounted(kind, at, kind));
    }
    Ok(())
}

fn mount_root(device: &str) -> Result<(), RootError> {
    let kinds = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let kinds: Vec<&str> = kinds.lines().filter_map(|line| line.strip_prefix('\t')).collect();
    for kind in &kinds {
        match mounted(device, ROOT, kind) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
            Err(source) => {
                let what = format!("mount {device} as {kind}");
                return Err(RootError::Failed { what, source });
            }
        }
    }
    Err(RootError::NoFileSystem {
        device: device.to_owned(),
        kinds: kinds.join(", "),
    })
}

fn mounted(source: &str, at: &str, kind: &str) -> io::Result<()> {
    let options: Option<&CStr> = None;
    Ok(mount(source, at, kind, MountFlags::empty(), options)?)
}
