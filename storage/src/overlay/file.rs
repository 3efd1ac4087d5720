//! An overlay file outside a machine: created, read, and given another header.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, OFlags};
use rustix::io::Errno;

use super::MEMORY;
use super::format::{BITMAP_OFFSET_BYTES, DATA_OFFSET_BYTES, HEADER_BYTES, Header, HeaderError};
use crate::backend::Access;
use crate::iscsi::shown;
use crate::lease::{Lease, LeaseError, Terms};
use crate::open::{directory_of, is_remote};

/// An overlay file, and what it says about itself.
#[derive(Debug)]
pub struct OverlayFile {
    file: Arc<File>,
    header: Header,
}

/// Why a file cannot be used as an overlay.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Nothing there.
    #[error("there is no overlay `{path}`")]
    Missing {
        /// As given.
        path: String,
    },
    /// Something there.
    #[error(
        "`{path}` exists already: set `keep` if it is an overlay to go on with, else remove it or name another file"
    )]
    Exists {
        /// As given.
        path: String,
    },
    /// Another kind of file.
    #[error("`{path}` is not an overlay that can be used")]
    NotAnOverlay {
        /// As given.
        path: String,
        /// What is wrong with it.
        #[source]
        source: HeaderError,
    },
    /// A directory, a device …
    #[error("`{path}` is not a regular file: an overlay lives in one")]
    NotAFile {
        /// As given.
        path: String,
    },
    /// Its end is missing.
    #[error(
        "overlay `{path}` is cut off: it has {size_bytes} bytes and needs {needed_bytes}; restore it from a copy"
    )]
    Truncated {
        /// As given.
        path: String,
        /// How long it is.
        size_bytes: u64,
        /// How long it has to be.
        needed_bytes: u64,
    },
    /// Somebody else has it.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// Its base has a name that the header has no room for.
    #[error("the path of the base has {0} bytes: an overlay file has room for {max}", max = super::format::BASE_PATH_BYTES_MAX)]
    BasePathTooLong(usize),
    /// The host says no.
    #[error("cannot {what} overlay `{path}`")]
    Host {
        /// What was tried.
        what: &'static str,
        /// As given.
        path: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// The owner reads and writes; what a guest writes is nobody else's.
const MODE: u32 = 0o600;

impl OverlayFile {
    /// An overlay that is gone with its last descriptor, in memory.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn in_memory(header: Header) -> Result<Self, FileError> {
        Self::initialize(memory_file()?, header, MEMORY)
    }

    /// An overlay that is gone with its last descriptor, on the file system that `path` lies on. It has no name
    /// there: whatever ends the process, nothing stays.
    ///
    /// # Errors
    ///
    /// As [`check_absent`], or what the host says.
    pub fn temporary(path: &str, header: Header) -> Result<Self, FileError> {
        Self::initialize(temporary_file(path)?, header, path)
    }

    /// A new overlay that stays. It has its name when it is complete and on the medium.
    ///
    /// # Errors
    ///
    /// When something of that name is there already, or what the host says.
    pub fn create(path: &str, header: Header) -> Result<Self, FileError> {
        // A rename would replace what came into being meanwhile; a link does not.
        let draft = draft_of(path);
        let draft = draft.to_string_lossy();
        let overlay = Self::initialize(create_new(&draft)?, header, &draft);
        let named = overlay.and_then(|overlay| {
            overlay
                .file
                .sync_all()
                .map_err(|error| host("write", path, error))?;
            fs::hard_link(&*draft, path).map_err(|error| refused_creation(path, error))?;
            Ok(overlay)
        });
        let removed = fs::remove_file(&*draft).map_err(|error| host("unlink", &draft, error));
        let overlay = named?;
        removed?;
        sync_directory_of(path).map_err(|error| host("sync the directory of", path, error))?;
        Ok(overlay)
    }

    /// An overlay that is there.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn open(path: &str) -> Result<Self, FileError> {
        Self::of(open_file(path, Access::ReadWrite)?, path)
    }

    /// An overlay that is there; if `terms` want a lease it is had before the first look at the file.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or who has it.
    pub fn open_leased(path: &str, terms: &Terms<'_>) -> Result<(Self, Option<Lease>), FileError> {
        Self::under_lease(open_file(path, Access::ReadWrite)?, path, terms)
    }

    /// The same for whoever only reads it.
    ///
    /// # Errors
    ///
    /// As [`Self::open_leased`].
    pub(super) fn read_leased(path: &str, terms: &Terms<'_>) -> Result<(Self, Option<Lease>), FileError> {
        Self::under_lease(open_file(path, Access::ReadOnly)?, path, terms)
    }

    fn under_lease(file: File, path: &str, terms: &Terms<'_>) -> Result<(Self, Option<Lease>), FileError> {
        let file = Arc::new(file);
        let mut lease = match terms.role() {
            Some(role) => Some(Lease::acquire(&file, path, role, terms)?),
            None => None,
        };
        // After the lease: if something fails, the file is closed first.
        let overlay = Self::sharing(file, path)?;
        if let Some(lease) = &mut lease {
            lease.settle()?;
        }
        Ok((overlay, lease))
    }

    /// Says whether a lease on `terms` could be had now, and changes nothing.
    ///
    /// # Errors
    ///
    /// Who has it.
    pub fn check_lease(&self, path: &str, terms: &Terms<'_>) -> Result<(), FileError> {
        if let Some(role) = terms.role() {
            Lease::check(&self.file, path, role, terms)?;
        }
        Ok(())
    }

    /// The overlay in `file`, which messages call `path`.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn of(file: File, path: &str) -> Result<Self, FileError> {
        Self::sharing(Arc::new(file), path)
    }

    fn sharing(file: Arc<File>, path: &str) -> Result<Self, FileError> {
        let metadata = file.metadata().map_err(|error| host("open", path, error))?;
        if !metadata.is_file() {
            return Err(FileError::NotAFile {
                path: path.to_owned(),
            });
        }
        // With O_NONBLOCK io_uring would answer EAGAIN where it should hand over to a worker.
        rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|errno| host("open", path, errno.into()))?;
        let mut headers = [0; 2 * HEADER_BYTES];
        let not_an_overlay = |source| FileError::NotAnOverlay {
            path: path.to_owned(),
            source,
        };
        match file.read_exact_at(&mut headers, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(not_an_overlay(HeaderError::Magic));
            }
            Err(error) => return Err(host("read", path, error)),
        }
        let header = Header::decode(&headers).map_err(not_an_overlay)?;
        let needed_bytes = DATA_OFFSET_BYTES + header.size_bytes;
        if metadata.len() < needed_bytes {
            return Err(FileError::Truncated {
                path: path.to_owned(),
                size_bytes: metadata.len(),
                needed_bytes,
            });
        }
        Ok(Self { file, header })
    }

    /// What it says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file and its header.
    pub fn into_parts(self) -> (Arc<File>, Header) {
        (self.file, self.header)
    }

    /// Its bitmap, as far as the image reaches: whole little-endian words of 64 bits.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn read_bits(&self) -> io::Result<Vec<u8>> {
        let words = self.header.shape().cluster_count().div_ceil(64);
        let mut bits = vec![0; usize::try_from(words * 8).expect("the format has a limit")];
        self.file.read_exact_at(&mut bits, BITMAP_OFFSET_BYTES)?;
        Ok(bits)
    }

    /// Makes `header`, with the sequence number that follows, the one that counts. It does when this returns.
    ///
    /// # Errors
    ///
    /// What the host says; the old header counts then, or the new one.
    pub fn replace_header(&mut self, header: Header) -> io::Result<()> {
        let header = Header {
            sequence: self.header.sequence + 1,
            ..header
        };
        let bytes = header.encode().ok_or(ErrorKind::InvalidFilename)?;
        self.file.write_all_at(&bytes, header.offset_bytes())?;
        self.file.sync_data()?;
        self.header = header;
        Ok(())
    }

    /// Forgets all clusters: the image shows its base again. Done when this returns.
    ///
    /// # Errors
    ///
    /// What the host says; some clusters are forgotten then, and others are not.
    pub fn empty(&mut self) -> io::Result<()> {
        let bits = self.read_bits()?;
        self.file
            .write_all_at(&vec![0; bits.len()], BITMAP_OFFSET_BYTES)?;
        self.file.sync_data()?;
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, hole, DATA_OFFSET_BYTES, self.header.size_bytes) {
            // The space is not given back, and nobody reads it.
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn initialize(file: File, header: Header, path: &str) -> Result<Self, FileError> {
        let bytes = header
            .encode()
            .ok_or(FileError::BasePathTooLong(header.base.path.len()))?;
        file.set_len(DATA_OFFSET_BYTES + header.size_bytes)
            .and_then(|()| file.write_all_at(&bytes, header.offset_bytes()))
            .map_err(|error| host("write", path, error))?;
        Ok(Self {
            file: Arc::new(file),
            header,
        })
    }
}

/// A file that is gone with its last descriptor, in memory.
pub(super) fn memory_file() -> Result<File, FileError> {
    let file = rustix::fs::memfd_create("coracle-overlay", MemfdFlags::CLOEXEC);
    Ok(file.map_err(|errno| host("create", MEMORY, errno.into()))?.into())
}

/// A file that is gone with its last descriptor, on the file system that `path` lies on.
pub(super) fn temporary_file(path: &str) -> Result<File, FileError> {
    check_absent(path)?;
    let unnamed = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(MODE)
        .open(directory_of(path));
    match unnamed {
        Ok(file) => Ok(file),
        // Not every file system can: then it has its name for a moment.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
            let file = create_new(path)?;
            fs::remove_file(path).map_err(|error| host("unlink", path, error))?;
            Ok(file)
        }
        Err(error) => Err(refused_creation(path, error)),
    }
}

fn open_file(path: &str, access: Access) -> Result<File, FileError> {
    check_local(path)?;
    // O_NONBLOCK: opening a FIFO must not wait for its other end.
    OpenOptions::new()
        .read(true)
        .write(access == Access::ReadWrite)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => FileError::Missing {
                path: path.to_owned(),
            },
            ErrorKind::IsADirectory => FileError::NotAFile {
                path: path.to_owned(),
            },
            _ => host("open", path, error),
        })
}

fn create_new(path: &str) -> Result<File, FileError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(path)
        .map_err(|error| refused_creation(path, error))
}

fn refused_creation(path: &str, error: io::Error) -> FileError {
    match error.kind() {
        ErrorKind::AlreadyExists => FileError::Exists {
            path: path.to_owned(),
        },
        _ => host("create", path, error),
    }
}

/// The name of an overlay that is not complete yet; another process has another one.
fn draft_of(path: &str) -> PathBuf {
    format!("{path}.{}.draft", std::process::id()).into()
}

/// Checks that there is nothing of the name `path`, which a temporary overlay would not be seen to replace.
///
/// # Errors
///
/// When there is.
pub fn check_absent(path: &str) -> Result<(), FileError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Err(FileError::Exists {
            path: path.to_owned(),
        }),
        Err(_) => Ok(()),
    }
}

/// Checks that `path` does not name an image of a network.
///
/// # Errors
///
/// When it does: an overlay has a size and a name of its own choice.
pub(super) fn check_local(path: &str) -> Result<(), FileError> {
    if is_remote(path) {
        return Err(FileError::NotAFile { path: shown(path) });
    }
    Ok(())
}

/// Makes sure that the name `path` is on the medium, which it is when its directory is.
///
/// # Errors
///
/// What the host says.
pub fn sync_directory_of(path: &str) -> io::Result<()> {
    File::open(directory_of(path))?.sync_all()
}

fn host(what: &'static str, path: &str, source: io::Error) -> FileError {
    FileError::Host {
        what,
        path: path.to_owned(),
        source,
    }
}
