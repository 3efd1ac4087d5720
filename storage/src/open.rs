//! From the path in a drive's configuration to an image that can be used; the only place that
//! tells one kind of image from another.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use rustix::fs::OFlags;

use crate::backend::{Access, Backend, Discard, Geometry};
use crate::raw::Raw;

/// Opens the image that `path` names, for `access`.
///
/// # Errors
///
/// What is wrong with the image, and what to do about it.
pub fn open(path: &str, access: Access) -> Result<Box<dyn Backend>, OpenError> {
    match path.split_once("://") {
        Some((scheme, _)) if scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
            Err(OpenError::Scheme {
                path: path.to_owned(),
                scheme: scheme.to_owned(),
            })
        }
        _ => Ok(Box::new(open_raw(path, access)?)),
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Not a path on this host.
    #[error("image `{path}`: `{scheme}://` is not built into this version; use a file or a block device")]
    Scheme {
        /// As configured.
        path: String,
        /// What stands before `://`.
        scheme: String,
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

fn open_raw(path: &str, access: Access) -> Result<Raw, OpenError> {
    // O_NONBLOCK: opening a FIFO must not wait for its other end.
    let file = OpenOptions::new()
        .read(true)
        .write(access == Access::ReadWrite)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| refusal(path, access, error))?;
    let host = |source: io::Error| OpenError::Host {
        path: path.to_owned(),
        source,
    };
    let size_bytes = match kind_of(&file).map_err(host)? {
        Kind::Regular { size_bytes } | Kind::BlockDevice { size_bytes } => size_bytes,
        Kind::Other(kind) => {
            return Err(OpenError::NotAnImage {
                path: path.to_owned(),
                kind,
            });
        }
    };
    check_size(path, size_bytes)?;
    // With O_NONBLOCK io_uring would answer EAGAIN where it should hand over to a worker.
    rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|errno| host(errno.into()))?;
    let geometry = Geometry {
        size_bytes,
        // The page cache takes any sector. An image that was partitioned in sectors of 512 would
        // become unreadable if a device of 4096 announced its own.
        logical_block_bytes: 512,
        physical_block_bytes: physical_block_bytes(&file),
        access,
        discard: Discard::Supported,
    };
    Ok(Raw::new(file, geometry))
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

/// What the medium likes best, as far as it says so; block devices and files both tell by `st_blksize`.
fn physical_block_bytes(file: &File) -> u32 {
    let told = file.metadata().map_or(0, |metadata| metadata.blksize());
    match u32::try_from(told) {
        Ok(bytes @ 512..=65536) if bytes.is_power_of_two() => bytes,
        _ => 4096,
    }
}

fn refusal(path: &str, access: Access, error: io::Error) -> OpenError {
    let path = path.to_owned();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => OpenError::Missing { path },
        Some(libc::EACCES | libc::EPERM) => OpenError::Denied {
            path,
            wanted: match access {
                Access::ReadOnly => "for reading",
                Access::ReadWrite => "for reading and writing",
            },
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
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
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::*;

    fn refused(path: &str) -> OpenError {
        open(path, Access::ReadWrite).err().expect("the image is refused")
    }

    fn file_of(size_bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size_bytes).unwrap();
        file
    }

    fn path_of(file: &tempfile::NamedTempFile) -> &str {
        file.path().to_str().unwrap()
    }

    #[test]
    fn a_file_of_whole_sectors_is_opened_with_its_size() {
        let file = file_of(3 * 512);
        let image = open(path_of(&file), Access::ReadOnly).unwrap();
        assert_eq!(image.geometry().size_bytes, 3 * 512);
        assert_eq!(image.geometry().access, Access::ReadOnly);
    }

    #[test]
    fn an_image_smaller_than_a_sector_is_refused_with_the_remedy() {
        let file = file_of(511);
        let error = refused(path_of(&file));
        assert!(matches!(error, OpenError::TooSmall { size_bytes: 511, .. }));
        assert!(error.to_string().contains("truncate -s 64M"));
    }

    #[test]
    fn an_image_with_part_of_a_sector_at_its_end_is_refused_with_the_remedy() {
        let file = file_of(513);
        let error = refused(path_of(&file));
        assert!(matches!(error, OpenError::PartialSector { size_bytes: 513, .. }));
        assert!(
            error
                .to_string()
                .contains(&format!("truncate -s %512 {}", path_of(&file)))
        );
    }

    #[test]
    fn a_url_says_that_its_scheme_is_not_built_in() {
        for url in ["nfs://server/export/a.img", "iscsi://server/target/0"] {
            let error = refused(url);
            assert!(matches!(error, OpenError::Scheme { .. }), "{error}");
            assert!(error.to_string().contains(url));
        }
        assert!(matches!(refused("/tmp/odd://name"), OpenError::Missing { .. }));
    }

    #[test]
    fn what_is_no_image_is_refused_by_what_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        assert!(matches!(
            refused(path),
            OpenError::NotAnImage {
                kind: "a directory",
                ..
            }
        ));
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        assert!(matches!(
            refused(fifo.to_str().unwrap()),
            OpenError::NotAnImage { kind: "a FIFO", .. }
        ));
        assert!(matches!(
            refused("/dev/null"),
            OpenError::NotAnImage {
                kind: "a character device",
                ..
            }
        ));
        assert!(matches!(
            refused(&format!("{path}/absent")),
            OpenError::Missing { .. }
        ));
    }

    #[test]
    fn an_opened_image_may_block_so_that_io_uring_hands_slow_operations_over() {
        let file = file_of(512);
        let image = open(path_of(&file), Access::ReadWrite).unwrap();
        let fd = *image.files().first().unwrap();
        let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let flags = flags
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .unwrap();
        let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
        assert_eq!(flags & libc::O_NONBLOCK, 0);
    }
}
