//! An overlay file outside a machine: created, read, and given another header.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, OFlags};
use rustix::io::Errno;

use super::bitmap::{Bitmap, IsSynced};
use super::format::{BITMAP_OFFSET_BYTES, DATA_OFFSET_BYTES, HEADER_BYTES, Header, HeaderError};
use crate::lease::{Lease, LeaseError, Terms};

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
        let file = rustix::fs::memfd_create("coracle-overlay", MemfdFlags::CLOEXEC)
            .map_err(|errno| host("create", "memory", errno.into()))?;
        Self::initialize(file.into(), header, "memory")
    }

    /// An overlay that is gone with its last descriptor, on the file system that `path` lies on. The name
    /// is taken away at once: whatever ends the process, nothing stays.
    ///
    /// # Errors
    ///
    /// When something of that name is there already, or what the host says.
    pub fn temporary(path: &str, header: Header) -> Result<Self, FileError> {
        let file = create_new(path)?;
        fs::remove_file(path).map_err(|error| host("unlink", path, error))?;
        Self::initialize(file, header, path)
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
        Self::of(open_file(path)?, path)
    }

    /// An overlay that is there; if `terms` want a lease it is had before the first look at the file.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or who has it.
    pub fn open_leased(path: &str, terms: &Terms<'_>) -> Result<(Self, Option<Lease>), FileError> {
        let file = Arc::new(open_file(path)?);
        let lease = match terms.role() {
            Some(role) => {
                let mut lease = Lease::acquire(&file, path, role, terms)?;
                lease.settle()?;
                Some(lease)
            }
            None => None,
        };
        Ok((Self::sharing(file, path)?, lease))
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

/// Which parts of an image an overlay file has, as its owner outside a machine sees it.
pub struct Clusters {
    bitmap: Bitmap,
    shape: super::format::Shape,
}

impl Clusters {
    /// Those of `overlay`.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn read(overlay: &OverlayFile) -> io::Result<Self> {
        let shape = overlay.header.shape();
        Ok(Self {
            bitmap: Bitmap::new(shape.cluster_count(), &overlay.read_bits()?),
            shape,
        })
    }

    /// The image from its start to its end in runs of bytes, each with whether the overlay has it.
    pub fn runs(&self) -> impl Iterator<Item = (bool, Range<u64>)> {
        let count = self.shape.cluster_count();
        let mut at = 0;
        std::iter::from_fn(move || {
            (at < count).then(|| {
                let (present, end) = self.bitmap.run(&(at..count));
                let bytes = self.shape.start_of(at)..self.shape.bytes_of(end - 1).end;
                at = end;
                (present, bytes)
            })
        })
    }

    /// How many clusters the overlay has.
    pub fn present_count(&self) -> u64 {
        let present = self.runs().filter(|(present, _)| *present);
        present
            .map(|(_, bytes)| self.shape.touched(&bytes))
            .map(|clusters| clusters.end - clusters.start)
            .sum()
    }

    /// Notes that the overlay has the clusters of `bytes`.
    pub fn add(&mut self, bytes: &Range<u64>) {
        self.bitmap.set(&self.shape.touched(bytes), IsSynced::No);
    }

    /// Writes down what was added. Its data is on the medium before the bits are, and both are when this returns.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn persist(&mut self, overlay: &OverlayFile) -> io::Result<()> {
        overlay.file.sync_data()?;
        let staged = self.bitmap.stage();
        for blocks in &staged.runs {
            let words = self.bitmap.staged(blocks);
            let bytes = zerocopy::IntoBytes::as_bytes(words);
            let offset_bytes = BITMAP_OFFSET_BYTES + (blocks.start * super::bitmap::BLOCK_BYTES) as u64;
            overlay.file.write_all_at(bytes, offset_bytes)?;
        }
        overlay.file.sync_data()
    }
}

fn open_file(path: &str) -> Result<File, FileError> {
    // O_NONBLOCK: opening a FIFO must not wait for its other end.
    OpenOptions::new()
        .read(true)
        .write(true)
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

/// A name is on the medium when its directory is.
pub fn sync_directory_of(path: &str) -> io::Result<()> {
    let directory = match Path::new(path).parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

fn host(what: &'static str, path: &str, source: io::Error) -> FileError {
    FileError::Host {
        what,
        path: path.to_owned(),
        source,
    }
}
