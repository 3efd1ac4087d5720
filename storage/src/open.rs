//! From the path in a drive's configuration to an image that can be used; the only place that
//! tells one kind of image from another.

mod hold;
mod places;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::backend::{Access, Backend, Discard, Geometry};
use crate::iscsi::{self, IscsiError, IscsiUrl};
use crate::lease::{self, Lease, LeaseError, Lock, Offer, Terms};
use crate::nfs::{self, NfsError, NfsUrl};
use crate::raw::Raw;

pub(crate) use self::hold::ImageId;
pub use self::places::{Need, Place, places};
pub(crate) use self::places::{beside, directory_of};

pub use self::hold::Hold;

/// An opened image, and what is to be kept for as long as it is in use.
pub struct Image {
    /// The image.
    pub backend: Box<dyn Backend>,
    /// What makes it ours.
    pub hold: Hold,
}

/// Opens the image that `path` names, for `access` and under a lease on `terms`.
///
/// # Errors
///
/// What is wrong with the image or who else has it, and what to do about it.
///
/// # Panics
///
/// When the terms do not fit the access: writing needs an exclusive lock, an exclusive lock writing.
pub fn open(path: &str, access: Access, terms: &Terms<'_>) -> Result<Image, OpenError> {
    let mut image = begin(path, access, terms)?;
    // If this fails the image is closed first, then the lease ends.
    image.hold.settle()?;
    Ok(image)
}

/// The same, while the record of the lease is still being made: nothing may be written before [`Hold::settle`].
///
/// # Errors
///
/// As [`open`].
///
/// # Panics
///
/// As [`open`].
pub fn begin(path: &str, access: Access, terms: &Terms<'_>) -> Result<Image, OpenError> {
    check_terms(access, terms);
    if IscsiUrl::is_url(path) {
        let iscsi::Opened { disk, name, lease } =
            iscsi::open(path, access, terms).map_err(|e| OpenError::of_unit(path, e))?;
        return Ok(Image {
            backend: Box::new(disk),
            hold: Hold::of_remote(ImageId::Unit(name), lease),
        });
    }
    if NfsUrl::is_url(path) {
        let nfs::Opened { disk, name, lease } =
            nfs::open(path, access, terms).map_err(|e| OpenError::of_nfs(path, e))?;
        return Ok(Image {
            backend: disk,
            hold: Hold::of_remote(ImageId::Export(name), lease),
        });
    }
    let opened = open_image(path, access, terms)?;
    let lease = match terms.role() {
        Some(role) => Some(Lease::acquire(&opened.file, path, role, terms)?),
        None => None,
    };
    Ok(Image {
        backend: Box::new(Raw::new(opened.file, opened.geometry)),
        hold: Hold::new(opened.id, lease),
    })
}

/// Says whether [`open`] would succeed now, and changes nothing.
///
/// # Errors
///
/// As [`open`].
///
/// # Panics
///
/// As [`open`].
pub fn check(path: &str, access: Access, terms: &Terms<'_>) -> Result<(), OpenError> {
    check_terms(access, terms);
    if IscsiUrl::is_url(path) {
        // Whoever asks does not want to wait for a network.
        return iscsi::check(path).map_err(|e| OpenError::of_unit(path, e));
    }
    if NfsUrl::is_url(path) {
        return nfs::check(path, access, terms.lock).map_err(|e| OpenError::of_nfs(path, e));
    }
    let opened = open_image(path, access, terms)?;
    match terms.role() {
        Some(role) => Ok(Lease::check(&opened.file, path, role, terms)?),
        None => Ok(()),
    }
}

/// A file that is mapped, and not read and written, and what is to be kept for as long as it is.
pub struct Mappable {
    /// The file, on a description of its own.
    pub file: Arc<File>,
    /// How long it is.
    pub size_bytes: u64,
    /// What makes it ours: to be dropped after the file.
    pub hold: Hold,
}

/// Opens the file of this host that `path` names for a mapping, for `access` and under a lease on `terms`, as that of an image;
/// its record is still being made: nothing may be written before [`Hold::settle`].
///
/// # Errors
///
/// As [`begin`]; and that it cannot be mapped.
///
/// # Panics
///
/// As [`begin`].
pub fn begin_mappable(path: &str, access: Access, terms: &Terms<'_>) -> Result<Mappable, OpenError> {
    let OpenedFile { file, size_bytes, id } = open_mappable(path, access, terms)?;
    let file = Arc::new(file);
    let lease = match terms.role() {
        Some(role) => Some(Lease::acquire(&file, path, role, terms)?),
        None => None,
    };
    Ok(Mappable {
        file,
        size_bytes,
        hold: Hold::new(id, lease),
    })
}

/// Says whether [`begin_mappable`] would succeed now, and changes nothing.
///
/// # Errors
///
/// As [`begin_mappable`].
///
/// # Panics
///
/// As [`begin_mappable`].
pub fn check_mappable(path: &str, access: Access, terms: &Terms<'_>) -> Result<(), OpenError> {
    let OpenedFile { file, .. } = open_mappable(path, access, terms)?;
    match terms.role() {
        Some(role) => Ok(Lease::check(&Arc::new(file), path, role, terms)?),
        None => Ok(()),
    }
}

fn open_mappable(path: &str, access: Access, terms: &Terms<'_>) -> Result<OpenedFile, OpenError> {
    check_terms(access, terms);
    let refused = |kind| OpenError::NotMappable {
        path: path.to_owned(),
        kind,
    };
    if is_remote(path) {
        return Err(refused("no path of this host"));
    }
    let opened = open_file(path, access, terms.lock)?;
    match (&opened.id, opened.size_bytes) {
        (ImageId::File { .. }, 1..) => Ok(opened),
        (ImageId::File { .. }, 0) => Err(refused("empty")),
        _ => Err(refused("a block device")),
    }
}

/// Says whether the image at `path` is the one that is offered: the newest record of its lease is the one that its owner named.
/// Nothing is changed.
///
/// # Errors
///
/// That it is another, or cannot be handed over at all.
pub fn check_offer(path: &str, terms: &Terms<'_>, offer: Offer) -> Result<(), OpenError> {
    if IscsiUrl::is_url(path) {
        return iscsi::check_offer(path, terms, offer).map_err(|e| OpenError::of_unit(path, e));
    }
    if NfsUrl::is_url(path) {
        return nfs::check_offer(path, terms, offer).map_err(|e| OpenError::of_nfs(path, e));
    }
    // Its owner still writes it, and has it for itself.
    let looking = Terms {
        lock: Lock::None,
        ..*terms
    };
    let opened = open_image(path, Access::ReadOnly, &looking)?;
    Ok(Lease::check_offer(&opened.file, path, terms, offer)?)
}

/// Whether `path` names an image of a network: opening it may take as long as its server does.
pub fn is_remote(path: &str) -> bool {
    scheme(path).is_some()
}

/// What stands before `://`, if `path` is no path on this host.
fn scheme(path: &str) -> Option<&str> {
    let (scheme, _) = path.split_once("://")?;
    let is_scheme = scheme.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_scheme.then_some(scheme)
}

/// How large the file or block device at `path` is now, in bytes.
///
/// # Errors
///
/// When it cannot be opened for reading, or no disk has that size.
pub fn size_bytes(path: &str) -> Result<u64, OpenError> {
    let OpenedFile { size_bytes, .. } = open_file(path, Access::ReadOnly, Lock::None)?;
    check_size(path, size_bytes)?;
    Ok(size_bytes)
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Not a path on this host.
    #[error(
        "image `{path}`: `{scheme}://` is not built into this version; use a file, a block device, an \
         iSCSI unit (iscsi://HOST/TARGET/LUN) or a file on an NFS server (nfs://HOST/EXPORT/IMAGE)"
    )]
    Scheme {
        /// As configured.
        path: String,
        /// What stands before `://`.
        scheme: String,
    },
    /// An image on an iSCSI target.
    #[error("image `{url}`")]
    Iscsi {
        /// As configured, without what could be a password.
        url: String,
        /// Why.
        #[source]
        source: Box<IscsiError>,
    },
    /// An image on an NFS server.
    #[error("image `{url}`")]
    Nfs {
        /// As configured.
        url: String,
        /// Why.
        #[source]
        source: Box<NfsError>,
    },
    /// Nothing there.
    #[error("there is no image `{path}`: create it first, or correct the path")]
    Missing {
        /// As configured.
        path: String,
    },
    /// Not for this user.
    #[error(
        "no permission to open image `{path}` {wanted}: give uid {uid} (gid {gid}) that access to it and to every \
         directory above it"
    )]
    Denied {
        /// As configured.
        path: String,
        /// The access that was asked for, in words.
        wanted: &'static str,
        /// Effective user.
        uid: u32,
        /// Effective group.
        gid: u32,
    },
    /// Neither a file nor a block device.
    #[error("`{path}` is {kind}: an image is a regular file or a block device")]
    NotAnImage {
        /// As configured.
        path: String,
        /// What it is, in words.
        kind: &'static str,
    },
    /// Nothing that the guest could have in its address space.
    #[error(
        "`{path}` is {kind}: what a guest has as memory is a regular file of this host with at least one byte, made for \
         example by `truncate -s 64M`"
    )]
    NotMappable {
        /// As configured.
        path: String,
        /// What it is, in words.
        kind: &'static str,
    },
    /// Writable image on read-only storage.
    #[error(
        "image `{path}` lies on a read-only file system: make the drive read-only, or remount the file system"
    )]
    ReadOnlyStorage {
        /// As configured.
        path: String,
    },
    /// Not even one sector.
    #[error(
        "image `{path}` is too small: it has {size_bytes} bytes, and a disk has at least one sector of 512; \
         grow it, for example with `truncate -s 64M`"
    )]
    TooSmall {
        /// As configured.
        path: String,
        /// Its size.
        size_bytes: u64,
    },
    /// Part of a sector at the end.
    #[error(
        "the size of image `{path}`, {size_bytes} bytes, is not a multiple of 512: round it up with \
         `truncate -s %512 {path}`"
    )]
    PartialSector {
        /// As configured.
        path: String,
        /// Its size.
        size_bytes: u64,
    },
    /// A descriptor that was handed in and cannot be opened anew.
    #[error(
        "`{path}` is a descriptor that was handed in, and this process cannot open what it refers to by itself, which a \
         lease needs: give uid {uid} (gid {gid}) access to the file, or name it by its path"
    )]
    HandedIn {
        /// As configured.
        path: String,
        /// Effective user.
        uid: u32,
        /// Effective group.
        gid: u32,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// Somebody else has it.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// Anything else the host says.
    #[error("cannot open image `{path}`")]
    Host {
        /// As configured.
        path: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// The unit in which virtio and this project count sizes, in bytes.
const SECTOR_BYTES: u64 = 512;

struct Opened {
    file: Arc<File>,
    id: ImageId,
    geometry: Geometry,
}

impl OpenError {
    /// What is wrong with the unit that `url` names.
    pub fn of_unit(url: &str, source: IscsiError) -> Self {
        Self::Iscsi {
            url: iscsi::shown(url),
            source: Box::new(source),
        }
    }
}

impl OpenError {
    /// What is wrong with the file that `url` names.
    pub fn of_nfs(url: &str, source: NfsError) -> Self {
        Self::Nfs {
            url: url.to_owned(),
            source: Box::new(source),
        }
    }
}

fn check_terms(access: Access, terms: &Terms<'_>) {
    let fits = match terms.lock {
        Lock::Exclusive => access == Access::ReadWrite,
        Lock::Shared => access == Access::ReadOnly,
        Lock::None => true,
    };
    assert!(fits, "a lock was chosen that does not fit the access");
}

fn open_image(path: &str, access: Access, terms: &Terms<'_>) -> Result<Opened, OpenError> {
    if let Some(scheme) = scheme(path) {
        return Err(OpenError::Scheme {
            path: path.to_owned(),
            scheme: scheme.to_owned(),
        });
    }
    let OpenedFile { file, size_bytes, id } = open_file(path, access, terms.lock)?;
    check_size(path, size_bytes)?;
    let geometry = Geometry {
        size_bytes,
        // The page cache takes any sector. An image that was partitioned in sectors of 512 would
        // become unreadable if a device of 4096 announced its own.
        logical_block_bytes: 512,
        physical_block_bytes: physical_block_bytes(&file),
        access,
        discard: Discard::Supported,
    };
    Ok(Opened {
        file: Arc::new(file),
        id,
        geometry,
    })
}

/// A file or a block device on an open file description of our own, also if `path` names a descriptor.
pub(crate) struct OpenedFile {
    pub(crate) file: File,
    id: ImageId,
    size_bytes: u64,
}

/// Opens a file or a block device; the latter for nobody else, if `lock` is exclusive.
pub(crate) fn open_file(path: &str, access: Access, lock: Lock) -> Result<OpenedFile, OpenError> {
    // Locks on one node of a device do not reach another; this does. Of a file it would mean nothing.
    let is_device = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let exclusive = if is_device && lock == Lock::Exclusive {
        libc::O_EXCL
    } else {
        0
    };
    let mut options = OpenOptions::new();
    // O_NONBLOCK: opening a FIFO must not wait for its other end.
    options
        .read(true)
        .write(access == Access::ReadWrite)
        .custom_flags(libc::O_NONBLOCK | exclusive);
    let file = lease::freed_soon(
        lease::FREED_MS_MAX,
        || options.open(path),
        |opened| matches!(opened, Err(error) if error.raw_os_error() == Some(libc::EBUSY)),
    )
    .map_err(|error| refusal(path, access, error))?;
    let host = |source: io::Error| OpenError::Host {
        path: path.to_owned(),
        source,
    };
    let metadata = file.metadata().map_err(host)?;
    if metadata.file_type().is_block_device() != is_device {
        return Err(host(io::Error::other("it was replaced while it was opened")));
    }
    let size_bytes = match kind_of(&file).map_err(host)? {
        Kind::Regular { size_bytes } | Kind::BlockDevice { size_bytes } => size_bytes,
        Kind::Other(kind) => {
            return Err(OpenError::NotAnImage {
                path: path.to_owned(),
                kind,
            });
        }
    };
    // With O_NONBLOCK io_uring would answer EAGAIN where it should hand over to a worker.
    rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|errno| host(errno.into()))?;
    Ok(OpenedFile {
        file,
        id: ImageId::of(&metadata),
        size_bytes,
    })
}

enum Kind {
    Regular { size_bytes: u64 },
    BlockDevice { size_bytes: u64 },
    Other(&'static str),
}

fn kind_of(file: &File) -> io::Result<Kind> {
    let metadata = file.metadata()?;
    let file_type = metadata.file_type();
    Ok(if file_type.is_file() {
        Kind::Regular {
            size_bytes: metadata.len(),
        }
    } else if file_type.is_block_device() {
        Kind::BlockDevice {
            size_bytes: rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?,
        }
    } else if file_type.is_dir() {
        Kind::Other("a directory")
    } else if file_type.is_fifo() {
        Kind::Other("a FIFO")
    } else if file_type.is_char_device() {
        Kind::Other("a character device")
    } else {
        Kind::Other("neither a file nor a device")
    })
}

fn check_size(path: &str, size_bytes: u64) -> Result<(), OpenError> {
    let path = || path.to_owned();
    if size_bytes < SECTOR_BYTES {
        return Err(OpenError::TooSmall {
            path: path(),
            size_bytes,
        });
    }
    if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(OpenError::PartialSector {
            path: path(),
            size_bytes,
        });
    }
    Ok(())
}

/// What the medium likes best, as far as it says so: a block device by its physical block, a file by `st_blksize`.
fn physical_block_bytes(file: &File) -> u32 {
    let told = rustix::fs::ioctl_blkpbszget(file).unwrap_or_else(|_not_a_device| {
        let block_bytes = file.metadata().map_or(0, |metadata| metadata.blksize());
        u32::try_from(block_bytes).unwrap_or(0)
    });
    match told {
        512..=65536 if told.is_power_of_two() => told,
        _ => 4096,
    }
}

fn refusal(path: &str, access: Access, error: io::Error) -> OpenError {
    let is_handed_in = ["/dev/fd/", "/proc/self/fd/"]
        .iter()
        .any(|place| path.starts_with(place));
    let path = path.to_owned();
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    match error.raw_os_error() {
        // The descriptor is there, or this would be ENOENT.
        Some(libc::EACCES | libc::EPERM) if is_handed_in => OpenError::HandedIn {
            path,
            uid,
            gid,
            source: error,
        },
        Some(libc::EBUSY) => LeaseError::Device { path }.into(),
        Some(libc::ENOENT | libc::ENOTDIR) => OpenError::Missing { path },
        Some(libc::EACCES | libc::EPERM) => OpenError::Denied {
            path,
            wanted: match access {
                Access::ReadOnly => "for reading",
                Access::ReadWrite => "for reading and writing",
            },
            uid,
            gid,
        },
        Some(libc::EISDIR) => OpenError::NotAnImage {
            path,
            kind: "a directory",
        },
        // A socket, or a device without a driver.
        Some(libc::ENXIO | libc::ENODEV) => OpenError::NotAnImage {
            path,
            kind: "something that cannot be opened as a file",
        },
        Some(libc::EROFS) => OpenError::ReadOnlyStorage { path },
        _ => OpenError::Host { path, source: error },
    }
}

#[cfg(test)]
mod tests;
