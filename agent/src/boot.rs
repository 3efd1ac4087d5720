//! The first process of a guest, started from an initial RAM disk: for images that know nothing of an agent.
//!
//! ```text
//! process 1: /dev, /proc, /sys ──fork──► the agent, which serves; asked for a root it mounts that and moves into it
//!     │                                      │
//!     └─ takes in whoever has no parent      └─ ends: the machine does, too
//! ```
#![expect(
    unsafe_code,
    reason = "it forks before there is any other thread, waits for children that are not its own, and asks the kernel for \
              what has no safe form"
)]

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use coracle_agent::wire::{Root, SEED_BYTES};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::time::{ClockId, Timespec, clock_settime};
use thiserror::Error;

/// How long a disk may take to be found.
const DISK_WAIT: Duration = Duration::from_secs(5);
const DISK_LOOK: Duration = Duration::from_millis(1);
/// A disk of no more is none yet: one that holds the place of another, which the guest has yet to hear of.
const PLACEHOLDER_SECTORS: u64 = 1;
/// Where the kernel says which disks there are, and what the names of the virtio disks begin with.
const DISKS: &str = "/sys/block";
const VIRTIO_DISK: &str = "vd";
/// `_IO(0x12, 95)` of linux/fs.h.
const BLKRRPART: libc::Ioctl = 0x125f;
/// `_IOW('R', 3, int [2])` and `_IO('R', 7)` of linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
const ROOT: &str = "/newroot";
/// What the agent has mounted itself, and takes along.
const TAKEN: [&str; 3] = ["dev", "proc", "sys"];

/// `struct rand_pool_info` of linux/random.h.
#[repr(C)]
struct Entropy {
    bits: i32,
    bytes: i32,
    seed: [u8; SEED_BYTES],
}

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
    #[error("its random numbers would be those of another guest: this kernel does not take a seed")]
    Seed(#[source] io::Error),
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

/// Mounts the root's device and moves this process, all of it, into it.
///
/// # Errors
///
/// When it is no root, or there is one already.
pub(super) fn enter(root: &Root) -> Result<(), RootError> {
    if !IS_FIRST.load(Ordering::Relaxed) {
        return Err(RootError::NotFirst);
    }
    let mut has_root = HAS_ROOT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if *has_root {
        return Err(RootError::Twice);
    }
    let device = root.device.as_str();
    let failed = |what: String| move |source: io::Error| RootError::Failed { what, source };
    let asked = Instant::now();
    let disk = disks().find(|disk| is_on(device, disk));
    if let Some(disk) = &disk {
        wait_while(|| is_placeholder(disk));
    }
    if !Path::new(device).exists()
        && let Some(disk) = &disk
    {
        // A disk that was put in the place of another has other partitions.
        find_partitions(disk);
    }
    if !wait_while(|| !Path::new(device).exists()) {
        return Err(RootError::NoDisk(device.to_owned()));
    }
    begin_anew(root, asked.elapsed())?;
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

/// Waits as long as something is so; false if that has taken too long.
fn wait_while(is_so: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while is_so() {
        if begun.elapsed() > DISK_WAIT {
            return false;
        }
        thread::sleep(DISK_LOOK);
    }
    true
}

/// Has the guest have random numbers of its own, and the time, which was told so long ago.
fn begin_anew(root: &Root, ago: Duration) -> Result<(), RootError> {
    let seeded = fs::File::open("/dev/urandom").and_then(|pool| {
        let bytes = i32::try_from(SEED_BYTES).expect("it is small");
        let seed = Entropy {
            bits: 8 * bytes,
            bytes,
            seed: root.seed,
        };
        // SAFETY: the kernel reads as many bytes of the structure as it says that it has.
        let added = unsafe { libc::ioctl(pool.as_raw_fd(), RNDADDENTROPY, &raw const seed) };
        // SAFETY: the request has no argument.
        let used = unsafe { libc::ioctl(pool.as_raw_fd(), RNDRESEEDCRNG) };
        if added == 0 && used == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    });
    match seeded {
        Err(source) if root.is_one_of_many => return Err(RootError::Seed(source)),
        Err(error) => eprintln!("coracle-agent: no seed for random numbers: {error}"),
        Ok(()) => {}
    }
    let now = Duration::from_nanos(root.unix_ns) + ago;
    let now = Timespec {
        tv_sec: now.as_secs().cast_signed(),
        tv_nsec: now.subsec_nanos().into(),
    };
    if let Err(errno) = clock_settime(ClockId::Realtime, now) {
        eprintln!("coracle-agent: cannot set the clock: {errno}");
    }
    Ok(())
}

/// The names of the virtio disks.
fn disks() -> impl Iterator<Item = String> {
    let entries = fs::read_dir(DISKS).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(VIRTIO_DISK))
}

/// Whether a device is a disk, or a partition of it.
fn is_on(device: &str, disk: &str) -> bool {
    let name = device
        .strip_prefix("/dev/")
        .and_then(|name| name.strip_prefix(disk));
    name.is_some_and(|partition| partition.bytes().all(|digit| digit.is_ascii_digit()))
}

fn is_placeholder(disk: &str) -> bool {
    let sectors = fs::read_to_string(format!("{DISKS}/{disk}/size"));
    sectors.is_ok_and(|sectors| holds_a_place(&sectors))
}

fn holds_a_place(sectors: &str) -> bool {
    let sectors = sectors.trim().parse::<u64>();
    sectors.is_ok_and(|sectors| sectors <= PLACEHOLDER_SECTORS)
}

/// Has the kernel look for the partitions of a disk again.
fn find_partitions(disk: &str) {
    let Ok(file) = fs::File::open(format!("/dev/{disk}")) else {
        return;
    };
    // SAFETY: the request has no argument. A disk that is in use, or has none, stays as it is.
    unsafe { libc::ioctl(file.as_raw_fd(), BLKRRPART) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_on_its_disk_and_no_other() {
        assert!(is_on("/dev/vda", "vda") && is_on("/dev/vda12", "vda"));
        assert!(!is_on("/dev/vdaa", "vda") && !is_on("/dev/vdb1", "vda") && !is_on("vda", "vda"));
    }

    #[test]
    fn a_disk_of_a_sector_holds_the_place_of_another() {
        assert!(holds_a_place("0\n") && holds_a_place("1\n"));
        assert!(!holds_a_place("2\n") && !holds_a_place("262144\n") && !holds_a_place(""));
    }
}
