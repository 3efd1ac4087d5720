//! Mounts that are made apart, and put into a namespace afterwards.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// A copy of the mount that a descriptor is of, from its file downwards.
///
/// # Errors
///
/// The kernel's: `EINVAL` for one of another mount namespace.
pub(crate) fn copied(source: &OwnedFd) -> io::Result<OwnedFd> {
    cloned(source, OpenTreeFlags::AT_RECURSIVE)
}

fn cloned(source: impl AsFd, more: OpenTreeFlags) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | more;
    Ok(open_tree(source, "", flags)?)
}

/// A copy of the mount that a file is of, with that alone: nobody writes through it, whoever owns the file, and it makes
/// nobody another user.
///
/// # Errors
///
/// As [`copied`]; `ENOSYS` before Linux 5.12.
#[expect(unsafe_code, reason = "no crate here has mount_setattr")]
pub(crate) fn copied_read_only(source: &File) -> io::Result<OwnedFd> {
    let mount = cloned(source, OpenTreeFlags::empty())?;
    let set = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is a string and `set` as large as it is said to be; both outlive the call, which only reads them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const set,
            size_of_val(&set),
        )
    };
    match done {
        0 => Ok(mount),
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
