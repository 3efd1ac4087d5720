//! The side that gets the image: a new file, which is there to stay only when all of it is.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::lease::{Claim, LeaseError, Owner};
use crate::open::directory_of;
use crate::open::is_remote;
use crate::overlay::file::sync_directory_of;

/// A copy that is being made.
///
/// ```text
///   create ──► filled: locked, so nobody takes it for an image ──sync──► whole ──open_up──► anybody's ──keep──► stays
///                └──────────────── dropped: what was made is gone, what was there is empty again ────┘
/// ```
///
/// A process that is killed leaves it as it is, without a lock.
#[derive(Debug)]
pub struct Duplicate {
    path: String,
    /// Dropped before the file is.
    claim: Option<Claim>,
    file: Arc<File>,
    size_bytes: u64,
    origin: Origin,
    /// Bytes that were written since the last sync.
    unsynced_bytes: u64,
    is_kept: bool,
    /// What the file system has refused; it is not asked again.
    punches: bool,
}

/// What was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Nothing,
    /// Somebody has made it, for us to fill.
    Empty,
}

/// Why a copy cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DuplicateError {
    /// Not a place for files.
    #[error(
        "a copy is a file of this host, and `{path}` is not: give the drive a path of this host by `overrides` \
         (`coraclectl receive --disk ID=PATH`)"
    )]
    Remote {
        /// As configured.
        path: String,
    },
    /// Somebody's file.
    #[error(
        "`{path}` is there already, and the copy would replace it: give the drive another path by `overrides` (`coraclectl \
         receive --disk ID=PATH`), or move that file away"
    )]
    There {
        /// As configured.
        path: String,
    },
    /// Not the size of a disk.
    #[error(
        "a disk has whole sectors of 512 bytes, and at least one: {size_bytes} bytes are no size for `{path}`"
    )]
    Size {
        /// As configured.
        path: String,
        /// As offered.
        size_bytes: u64,
    },
    /// Somebody else's file, or none, has its name.
    #[error(
        "`{path}` is no longer the copy that was begun there: somebody has removed, moved or replaced it; let it be until the \
         machine runs here, and migrate again"
    )]
    Replaced {
        /// As configured.
        path: String,
    },
    /// Too little space.
    #[error(
        "the file system of `{path}` has {available_mib} MiB left, and {needed_mib} MiB are to be copied there: free some, \
         or give the drive another path by `overrides` (`coraclectl receive --disk ID=PATH`)"
    )]
    Full {
        /// As configured.
        path: String,
        /// What is copied there, with all copies that were counted before.
        needed_mib: u64,
        /// What is left.
        available_mib: u64,
    },
    /// Somebody has the file.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// More than the image has.
    #[error("what is said of `{path}` lies beyond its {size_bytes} bytes")]
    Outside {
        /// As configured.
        path: String,
        /// As offered.
        size_bytes: u64,
    },
    /// What the host says.
    #[error("cannot {action} the copy `{path}`")]
    Host {
        /// What was tried.
        action: &'static str,
        /// As configured.
        path: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// The space that several copies need together.
#[derive(Debug, Default)]
pub struct Room {
    needed_bytes: BTreeMap<u64, u64>,
}

/// How much is written before it is put on the medium: whoever waits for the last of it does not wait for all of it.
const UNSYNCED_BYTES_MAX: u64 = 16 << 20;
const MIB: u64 = 1 << 20;

impl Room {
    /// Says whether a copy could be made at `path` of an image of `size_bytes`, `data_bytes` of which take space, beside those
    /// that were asked for before. Nothing is changed.
    ///
    /// # Errors
    ///
    /// Why it could not.
    pub fn check(&mut self, path: &str, size_bytes: u64, data_bytes: u64) -> Result<(), DuplicateError> {
        let path = || path.to_owned();
        if is_remote(&path()) {
            return Err(DuplicateError::Remote { path: path() });
        }
        if size_bytes < 512 || !size_bytes.is_multiple_of(512) {
            return Err(DuplicateError::Size {
                path: path(),
                size_bytes,
            });
        }
        match fs::symlink_metadata(path()) {
            Ok(there) if there.is_file() && there.len() == 0 => {}
            Ok(_) => return Err(DuplicateError::There { path: path() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(host("look for", &path(), source)),
        }
        let named = path();
        let directory: &Path = directory_of(&named);
        let device = fs::metadata(directory)
            .map_err(|source| host("look for the directory of", &path(), source))?
            .dev();
        let space = rustix::fs::statvfs(directory)
            .map_err(|errno| host("look for room for", &path(), errno.into()))?;
        let available_bytes = space.f_bavail.saturating_mul(space.f_frsize);
        let needed_bytes = self.needed_bytes.entry(device).or_default();
        *needed_bytes = needed_bytes.saturating_add(data_bytes.min(size_bytes));
        if *needed_bytes > available_bytes {
            return Err(DuplicateError::Full {
                path: path(),
                needed_mib: needed_bytes.div_ceil(MIB),
                available_mib: available_bytes / MIB,
            });
        }
        Ok(())
    }
}

impl Duplicate {
    /// Begins a copy of `size_bytes` zeros at `path`, where nothing is, or an empty file. Its leases will be recorded in files
    /// that are named after `at`, if that is given; `owner` says there that what was left behind under this name before is gone.
    ///
    /// # Errors
    ///
    /// When it cannot be made there; then what was there is as it was.
    pub fn create(
        path: &str,
        at: Option<&str>,
        size_bytes: u64,
        owner: &Owner,
    ) -> Result<Self, DuplicateError> {
        let (file, origin) = new_file(path)?;
        let file = Arc::new(file);
        let claim = Claim::take(&file, path, at, owner).inspect_err(|_| {
            if origin == Origin::Nothing && is_named(&file, path) {
                // If this fails, too, the first error is still the one to tell.
                let _ = fs::remove_file(path);
            }
        })?;
        let mut duplicate = Self {
            path: path.to_owned(),
            claim: Some(claim),
            file,
            size_bytes,
            origin,
            unsynced_bytes: 0,
            is_kept: false,
            punches: true,
        };
        // Looked at with the lock: whoever else was to fill it has it no more, or not yet.
        let there = duplicate
            .file
            .metadata()
            .map_err(|source| host("look at", path, source))?;
        if there.len() > 0 {
            duplicate.is_kept = true;
            return Err(DuplicateError::There {
                path: path.to_owned(),
            });
        }
        let sized = duplicate.file.set_len(size_bytes);
        sized.map_err(|source| host("make", path, source))?;
        Ok(duplicate)
    }

    /// How long the disk is.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Has `bytes` lie from `offset_bytes` on.
    ///
    /// # Errors
    ///
    /// When they do not lie within the image, or the host does not take them.
    pub fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), DuplicateError> {
        self.within(offset_bytes, bytes.len() as u64)?;
        let written = self.file.write_all_at(bytes, offset_bytes);
        written.map_err(|source| host("write", &self.path, source))?;
        self.unsynced_bytes += bytes.len() as u64;
        if self.unsynced_bytes >= UNSYNCED_BYTES_MAX {
            self.sync()?;
        }
        Ok(())
    }

    /// Has zeros lie there, which take no space if the file system can do without.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), DuplicateError> {
        let range = self.within(offset_bytes, len_bytes)?;
        if self.punches {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&self.file, flags, offset_bytes, len_bytes) {
                Ok(()) => {
                    self.unsynced_bytes = self.unsynced_bytes.max(1);
                    return Ok(());
                }
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.punches = false,
                Err(errno) => return Err(host("free a part of", &self.path, errno.into())),
            }
        }
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            self.write(at, ZEROS.get(..len).unwrap_or(&ZEROS))?;
            at += len as u64;
        }
        Ok(())
    }

    /// Puts everything that was written on the medium.
    ///
    /// # Errors
    ///
    /// When the host cannot.
    pub fn sync(&mut self) -> Result<(), DuplicateError> {
        if self.unsynced_bytes > 0 {
            let synced = self.file.sync_data();
            synced.map_err(|source| host("put on its medium", &self.path, source))?;
            self.unsynced_bytes = 0;
        }
        Ok(())
    }

    /// The same, and its size and its name: when it returns, the copy is there whatever happens to the host.
    ///
    /// # Errors
    ///
    /// When the host cannot, or the copy has its name no more, or records that cannot be read: it could not be opened as an
    /// image.
    pub fn finish(&mut self) -> Result<(), DuplicateError> {
        let synced = self.file.sync_all().and_then(|()| sync_directory_of(&self.path));
        synced.map_err(|source| host("put on its medium", &self.path, source))?;
        self.unsynced_bytes = 0;
        if is_named(&self.file, &self.path) {
            return Ok(self.claim.as_ref().map_or(Ok(()), Claim::check)?);
        }
        Err(DuplicateError::Replaced {
            path: self.path.clone(),
        })
    }

    /// Whether the records of the leases of both would be in one place, so that only one of them could be opened as an image.
    pub fn shares_records_with(&self, other: &Self) -> bool {
        match (&self.claim, &other.claim) {
            (Some(ours), Some(theirs)) => ours.shares_records_with(theirs),
            _ => false,
        }
    }

    /// Takes the lock down, so that it can be opened as an image.
    pub fn open_up(&mut self) {
        self.claim = None;
    }

    /// Has it stay when this is dropped.
    pub fn keep(&mut self) {
        self.is_kept = true;
    }

    /// As on a file system that has no holes.
    #[cfg(test)]
    pub(super) fn without_holes(&mut self) {
        self.punches = false;
    }

    fn within(&self, offset_bytes: u64, len_bytes: u64) -> Result<Range<u64>, DuplicateError> {
        let end = offset_bytes
            .checked_add(len_bytes)
            .filter(|end| *end <= self.size_bytes);
        match end {
            Some(end) if len_bytes > 0 => Ok(offset_bytes..end),
            _ => Err(DuplicateError::Outside {
                path: self.path.clone(),
                size_bytes: self.size_bytes,
            }),
        }
    }
}

impl Drop for Duplicate {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        let emptied = self.file.set_len(0);
        let removed = match self.origin {
            Origin::Empty => emptied,
            Origin::Nothing if is_named(&self.file, &self.path) => fs::remove_file(&self.path),
            Origin::Nothing => Ok(()),
        };
        if let Err(error) = removed {
            log::warn!("`{}` is a part of a copy and can be removed: {error}", self.path);
        }
    }
}

/// Whether `path` still names `file`.
fn is_named(file: &File, path: &str) -> bool {
    let id = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(named)) => id(&ours) == id(&named),
        _ => false,
    }
}

/// A file that nobody else has made, or one that is empty.
fn new_file(path: &str) -> Result<(File, Origin), DuplicateError> {
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    match options.clone().create_new(true).open(path) {
        Ok(file) => return Ok((file, Origin::Nothing)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(host("make", path, source)),
    }
    let there = || DuplicateError::There {
        path: path.to_owned(),
    };
    let file = options.open(path).map_err(|_| there())?;
    match file.metadata() {
        Ok(metadata) if metadata.is_file() && metadata.len() == 0 => Ok((file, Origin::Empty)),
        _ => Err(there()),
    }
}

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

fn host(action: &'static str, path: &str, source: io::Error) -> DuplicateError {
    DuplicateError::Host {
        action,
        path: path.to_owned(),
        source,
    }
}
