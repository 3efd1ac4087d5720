//! An overlay and its base, leased as a machine would lease them: what is changed here is used by nobody else.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use coracle_storage::backend::Access;
use coracle_storage::blocking::Blocking;
use coracle_storage::lease::{Lease, Lock, Owner, Terms};
use coracle_storage::open::{self, Hold};
use coracle_storage::overlay::OverlayError;
use coracle_storage::overlay::clusters::Clusters;
use coracle_storage::overlay::file::OverlayFile;
use coracle_storage::overlay::format::{BaseIdentity, DATA_OFFSET_BYTES};
use coracle_storage::request::Failure;

use super::DiskError;

/// An image and its path.
pub(crate) struct Image {
    pub(crate) path: String,
    pub(crate) blocking: Blocking,
    /// After the image, which it outlives.
    _hold: Hold,
}

impl Image {
    /// The image `path`, under `lock`.
    ///
    /// # Errors
    ///
    /// Why it cannot be used, or who uses it.
    pub(crate) fn open(path: &str, access: Access, lock: Lock) -> Result<Self, DiskError> {
        let owner = Owner::of_this_process(OWNER);
        let open::Image { backend, hold } = open::open(path, access, &terms(lock, &owner))?;
        let blocking = Blocking::new(backend).map_err(|source| DiskError::Host {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            blocking,
            _hold: hold,
        })
    }

    /// Its size.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.blocking.geometry().size_bytes
    }

    /// Who it is.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub(crate) fn identity(&mut self) -> Result<BaseIdentity, DiskError> {
        let identity = BaseIdentity::of(&self.path, &mut self.blocking);
        Ok(identity.map_err(|source| OverlayError::BaseUnreadable {
            path: self.path.clone(),
            source,
        })?)
    }

    /// Fills `buffer` from `offset_bytes` on; what lies beyond `shown_bytes` is zeros.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub(crate) fn read(
        &mut self,
        offset_bytes: u64,
        shown_bytes: u64,
        buffer: &mut [u8],
    ) -> Result<(), DiskError> {
        let shown = shown_bytes.saturating_sub(offset_bytes);
        let shown = usize::try_from(shown).unwrap_or(usize::MAX).min(buffer.len());
        let (inside, beyond) = buffer.split_at_mut(shown);
        beyond.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        let read = self.blocking.read_at(offset_bytes, inside);
        read.map_err(|source| self.unread(offset_bytes, source))
    }
}

impl Image {
    /// The first part of `bytes` that may hold something else than zeros; an empty one if there is none.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub(crate) fn find_data(&mut self, bytes: Range<u64>) -> Result<Range<u64>, DiskError> {
        let offset_bytes = bytes.start;
        let found = self.blocking.find_data(bytes);
        found.map_err(|source| self.unread(offset_bytes, source))
    }

    /// Writes `bytes` from `offset_bytes` on.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub(crate) fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let written = self.blocking.write_at(offset_bytes, bytes);
        written.map_err(|source| self.unwritten(offset_bytes, source))
    }

    /// Makes a range zeros.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub(crate) fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), DiskError> {
        let zeroed = self.blocking.zero_at(offset_bytes, len_bytes);
        zeroed.map_err(|source| self.unwritten(offset_bytes, source))
    }

    /// Returns when all that was written is on the medium.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub(crate) fn flush(&mut self) -> Result<(), DiskError> {
        let flushed = self.blocking.flush();
        flushed.map_err(|source| DiskError::Flush {
            path: self.path.clone(),
            source,
        })
    }

    fn unread(&self, offset_bytes: u64, source: Failure) -> DiskError {
        DiskError::Read {
            path: self.path.clone(),
            offset_bytes,
            source,
        }
    }

    fn unwritten(&self, offset_bytes: u64, source: Failure) -> DiskError {
        DiskError::Write {
            path: self.path.clone(),
            offset_bytes,
            source,
        }
    }
}

/// An overlay file, what it has, and its path.
pub(crate) struct Overlay {
    pub(crate) path: String,
    pub(crate) file: OverlayFile,
    pub(crate) clusters: Clusters,
    /// After the file, which it outlives.
    _lease: Option<Lease>,
}

impl Overlay {
    /// The overlay `path`, under `lock`.
    ///
    /// # Errors
    ///
    /// Why it cannot be used, or who uses it.
    pub(crate) fn open(path: &str, lock: Lock) -> Result<Self, DiskError> {
        let owner = Owner::of_this_process(OWNER);
        let (file, lease) = OverlayFile::open_leased(path, &terms(lock, &owner))?;
        let clusters = Clusters::read(&file);
        let clusters = clusters.map_err(|source| DiskError::Host {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            file,
            clusters,
            _lease: lease,
        })
    }

    /// Its base for reading, which is at `moved_to` if it has another path now; checked to be the right one.
    ///
    /// # Errors
    ///
    /// Why it cannot be used.
    pub(crate) fn base(&self, moved_to: Option<&str>) -> Result<Image, DiskError> {
        let header = self.file.header();
        header.check_usable(&self.path)?;
        let mut base = Image::open(
            moved_to.unwrap_or(&header.base.path),
            Access::ReadOnly,
            Lock::Shared,
        )?;
        header.check_base(&self.path, &base.identity()?)?;
        Ok(base)
    }

    /// The runs of the image, each with whether the overlay has it.
    pub(crate) fn runs(&self) -> Vec<(bool, Range<u64>)> {
        self.clusters.runs().collect()
    }

    /// Fills `buffer` from clusters that the overlay has.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub(crate) fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let read = self
            .file
            .file()
            .read_exact_at(buffer, DATA_OFFSET_BYTES + offset_bytes);
        read.map_err(|source| self.host(source))
    }

    /// An error of the host about the overlay.
    pub(crate) fn host(&self, source: io::Error) -> DiskError {
        DiskError::Host {
            path: self.path.clone(),
            source,
        }
    }
}

/// Who has an image meanwhile, to whoever else wants it.
pub(crate) const OWNER: &str = "coraclectl-disk";

fn terms(lock: Lock, owner: &Owner) -> Terms<'_> {
    Terms::new(lock, owner)
}
