//! The side that has the image: it is read while its guest writes it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::open::Hold;

/// An image that is read beside its disk's own descriptors.
#[derive(Debug)]
pub struct Original {
    file: File,
    path: String,
    size_bytes: u64,
    /// Whether the host can tell holes.
    has_holes: bool,
}

/// A part of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// It may have something else than zeros.
    Data(Range<u64>),
    /// It reads as zeros, and takes no space.
    Hole(Range<u64>),
}

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read image `{path}` to copy it")]
pub struct OriginalError {
    path: String,
    #[source]
    source: io::Error,
}

impl Original {
    /// The image that `hold` has and `path` names, as a disk of that size.
    ///
    /// # Errors
    ///
    /// When it cannot be opened once more.
    pub fn open(path: &str, hold: &Hold, size_bytes: u64) -> Result<Self, OriginalError> {
        let opened = hold.reader(path).and_then(|file| {
            let is_device = file.metadata()?.file_type().is_block_device();
            Ok((file, !is_device))
        });
        let (file, has_holes) = opened.map_err(|source| failed(path, source))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            size_bytes,
            has_holes,
        })
    }

    /// How long the disk is.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// How much space it takes at most, as far as the host knows.
    ///
    /// # Errors
    ///
    /// When the host does not say.
    pub fn data_bytes(&self) -> Result<u64, OriginalError> {
        if !self.has_holes {
            return Ok(self.size_bytes);
        }
        let metadata = self
            .file
            .metadata()
            .map_err(|source| failed(&self.path, source))?;
        Ok(metadata.blocks().saturating_mul(512).min(self.size_bytes))
    }

    /// The first part of `range`, which is not empty: what the host says now. What is written meanwhile may be told for a hole.
    ///
    /// # Errors
    ///
    /// When the host does not say.
    pub fn first_part(&self, range: &Range<u64>) -> Result<Part, OriginalError> {
        if !self.has_holes {
            return Ok(Part::Data(range.clone()));
        }
        let data = match self.seek(SeekFrom::Data(range.start))? {
            Some(data) if data < range.end => data,
            _ => return Ok(Part::Hole(range.clone())),
        };
        if data > range.start {
            return Ok(Part::Hole(range.start..data));
        }
        let hole = self.seek(SeekFrom::Hole(range.start))?.unwrap_or(range.end);
        // It may have been freed between the two looks.
        let end = if hole > range.start {
            hole.min(range.end)
        } else {
            range.end
        };
        Ok(Part::Data(range.start..end))
    }

    /// Fills `bytes` from `offset_bytes` on.
    ///
    /// # Errors
    ///
    /// When the host does not give it.
    pub fn read(&self, bytes: &mut [u8], offset_bytes: u64) -> Result<(), OriginalError> {
        let read = self.file.read_exact_at(bytes, offset_bytes);
        read.map_err(|source| failed(&self.path, source))
    }

    fn seek(&self, to: SeekFrom) -> Result<Option<u64>, OriginalError> {
        match rustix::fs::seek(&self.file, to) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(failed(&self.path, errno.into())),
        }
    }
}

fn failed(path: &str, source: io::Error) -> OriginalError {
    let path = path.to_owned();
    OriginalError { path, source }
}
