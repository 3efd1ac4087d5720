//! Paths beneath a directory, through which nobody who owns a part of them leads elsewhere.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};

/// Opens a path beneath `directory`: no `..` that leads above it, and no symbolic link anywhere.
///
/// # Errors
///
/// The kernel's: `EXDEV` for a path that leads out, `ELOOP` for a link.
pub(crate) fn open(directory: impl AsFd, path: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok(openat2(directory, path, flags | OFlags::CLOEXEC, mode, resolve)?)
}

/// Opens a directory beneath another, or that itself.
///
/// # Errors
///
/// As [`open`].
pub(crate) fn directory(above: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    open(above, path, OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty())
}

/// The directory that a path beneath `above` is in, and its last part.
///
/// # Errors
///
/// As [`open`], or when the path has no last part.
pub(crate) fn parent(above: impl AsFd, path: &Path) -> io::Result<(OwnedFd, &Path)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let parent = directory(above, path.parent().unwrap_or(Path::new("")))?;
    Ok((parent, Path::new(name)))
}

/// What a name in a directory is now: enough to know it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Number of the inode.
    pub(crate) inode: u64,
    /// When it was made, in nanoseconds, where the file system knows; inode numbers are used again.
    pub(crate) born_ns: u64,
    /// What kind of file, as in `st_mode`.
    pub(crate) kind: u16,
}

/// What `name` in `directory` is, without following it; `None` if there is nothing.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn identity(directory: impl AsFd, name: &Path) -> io::Result<Option<Identity>> {
    let wanted = StatxFlags::INO | StatxFlags::TYPE | StatxFlags::BTIME;
    match statx(
        directory,
        name,
        AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH,
        wanted,
    ) {
        Ok(found) => Ok(Some(Identity {
            inode: found.stx_ino,
            born_ns: found
                .stx_btime
                .tv_sec
                .cast_unsigned()
                .wrapping_mul(1_000_000_000)
                .wrapping_add(found.stx_btime.tv_nsec.into()),
            kind: found.stx_mode & 0o170_000,
        })),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_and_ways_out_are_refused() {
        let place = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(place.path().join("base/real")).expect("a directory");
        fs::write(place.path().join("base/real/file"), "").expect("a file");
        fs::write(place.path().join("outside"), "").expect("a file");
        symlink("real", place.path().join("base/link")).expect("a link");
        symlink("real/file", place.path().join("base/file")).expect("a link");
        symlink("/", place.path().join("base/root")).expect("a link");
        let base = File::open(place.path().join("base")).expect("it is there");
        let error = |path: &str| {
            let opened = open(&base, Path::new(path), OFlags::RDONLY, Mode::empty());
            opened.err().and_then(|error| error.raw_os_error())
        };
        assert_eq!(error("real/file"), None);
        for path in ["link/file", "file", "root/etc", "link"] {
            assert_eq!(error(path), Some(libc::ELOOP), "{path}");
        }
        for path in ["../outside", "/etc/passwd", "real/../../outside"] {
            assert_eq!(error(path), Some(libc::EXDEV), "{path}");
        }
        let parent = parent(&base, Path::new("link/new")).expect_err("it leads by a link");
        assert_eq!(parent.raw_os_error(), Some(libc::ELOOP));
        // What a link is, not what it leads to.
        let link = identity(&base, Path::new("file"))
            .expect("it can be looked at")
            .expect("it is there");
        assert_eq!(u32::from(link.kind), libc::S_IFLNK);
        assert_eq!(
            identity(&base, Path::new("none")).expect("it can be looked for"),
            None
        );
    }
}
