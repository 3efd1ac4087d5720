//! Mounts that are made apart and put into a namespace afterwards, and the namespace that they are put into.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;

use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// `struct mnt_ns_info`.
#[repr(C)]
#[derive(Default)]
struct NamespaceInfo {
    size: u32,
    mounts: u32,
    id: u64,
}

/// `NS_MNT_GET_NEXT`, since Linux 6.12: opens the mount namespace that was made next after a given one.
const NS_MNT_GET_NEXT: libc::Ioctl = 0x8010_b70b;

/// A copy of the mount that a descriptor is of, from its file downwards. Whatever is mounted beneath the original later is not
/// beneath the copy, nor the other way round.
///
/// # Errors
///
/// The kernel's: `EINVAL` for one of another mount namespace, `ENOSYS` before Linux 5.12.
pub(crate) fn copied(source: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let mount = open_tree(source, "", flags)?;
    keep_to_itself(&mount)?;
    Ok(mount)
}

/// A copy of a shared mount is one of its peers; nor is one of those taken for a root.
#[expect(unsafe_code, reason = "no crate here has mount_setattr")]
fn keep_to_itself(mount: &OwnedFd) -> io::Result<()> {
    let set = libc::mount_attr {
        attr_set: 0,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is a string and `set` as large as it is said to be; both outlive the call, which only reads them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const set,
            size_of_val(&set),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts a mount where a path leads, or on what the descriptor is of if the path is empty.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn attach(mount: &OwnedFd, at: impl AsFd, path: &str) -> rustix::io::Result<()> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if path.is_empty() {
        flags |= MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    }
    move_mount(mount, "", at, path, flags)
}

/// Enters the mount namespace of the kernel's own thread `kdevtmpfs`, where there is a single mount, if it can be found.
///
/// A new mount namespace is a copy of its maker's. The host's may have hundreds of mounts, which would be copied and removed
/// for every jail while all others that are made wait, so root makes a jail's from the smallest there is: the second since
/// the system was started. An ordinary user may not enter it.
///
/// # Errors
///
/// When this process is in a wrong namespace and cannot go back.
pub(crate) fn enter_smallest_namespace() -> io::Result<()> {
    let Ok((smallest, own, devices)) = smallest_namespace() else {
        return Ok(());
    };
    let mounts = Some(LinkNameSpaceType::Mount);
    if move_into_link_name_space(smallest.as_fd(), mounts).is_err() {
        return Ok(());
    }
    // Whatever else is found by these numbers, as in a container, may be somebody's.
    if std::fs::metadata("/").is_ok_and(|root| root.dev() == devices) {
        return Ok(());
    }
    Ok(move_into_link_name_space(own.as_fd(), mounts)?)
}

/// That namespace, the one of this process, and the file system of `/dev`, which is the root of the first.
#[expect(unsafe_code, reason = "no crate here has this ioctl")]
fn smallest_namespace() -> io::Result<(OwnedFd, File, u64)> {
    let first = File::open("/proc/2/ns/mnt")?;
    let mut info = NamespaceInfo {
        size: u32::try_from(size_of::<NamespaceInfo>()).unwrap_or_default(),
        ..NamespaceInfo::default()
    };
    // SAFETY: the kernel writes no more than `info.size` bytes there, and `info` is so large and lives on.
    let opened = unsafe { libc::ioctl(first.as_raw_fd(), NS_MNT_GET_NEXT, &raw mut info) };
    if opened < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has made this descriptor for this call, and nobody else knows its number.
    let next = unsafe { OwnedFd::from_raw_fd(opened) };
    if info.mounts != 1 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let devices = std::fs::metadata("/dev")?.dev();
    Ok((next, File::open("/proc/self/ns/mnt")?, devices))
}
