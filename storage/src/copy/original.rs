//! The side that has the image: it is read while its guest writes it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::open::Hold;
use crate::overlay::copy::View;
use crate::overlay::file::OverlayFile;
use crate::overlay::format::DATA_OFFSET_BYTES;

/// An image that is read beside its disk's own descriptors.
#[derive(Debug)]
pub struct Original {
    file: File,
    path: String,
    size_bytes: u64,
    /// Whether the host can tell holes.
    has_holes: bool,
    layout: Layout,
}

/// Where in the file the sectors of the disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// In their places.
    Plain,
    /// In the clusters of a kept overlay, behind what tells which of them there are.
    Overlay { cluster_bytes: u64 },
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
            layout: Layout::Plain,
        })
    }

    /// The file of the overlay of which `view` is, and which `path` names.
    ///
    /// # Errors
    ///
    /// When it cannot be opened once more, is none, or `path` names another file by now.
    pub fn of_overlay(path: &str, view: &View) -> Result<Self, OriginalError> {
        let opened = view.reader(path).and_then(|file| {
            let overlay = OverlayFile::of(file.try_clone()?, path).map_err(io::Error::other)?;
            let size_bytes = file.metadata()?.len();
            Ok((file, size_bytes, overlay.header().cluster_bytes))
        });
        let (file, size_bytes, cluster_bytes) = opened.map_err(|source| failed(path, source))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            size_bytes,
            has_holes: true,
            layout: Layout::Overlay { cluster_bytes },
        })
    }

    /// Where in the file a change of this range of the disk may have changed something at once.
    pub fn places(&self, changed: &Range<u64>) -> Range<u64> {
        match self.layout {
            Layout::Plain => changed.clone(),
            // Who changes a part of a cluster writes all of it.
            Layout::Overlay { cluster_bytes } => {
                let first = changed.start / cluster_bytes * cluster_bytes;
                let end = changed.end.next_multiple_of(cluster_bytes);
                DATA_OFFSET_BYTES + first..DATA_OFFSET_BYTES + end
            }
        }
    }

    /// What of the file changes at any time: it is to be looked at when nothing does, after a flush.
    pub fn ledger(&self) -> Range<u64> {
        match self.layout {
            Layout::Plain => 0..0,
            Layout::Overlay { .. } => 0..DATA_OFFSET_BYTES,
        }
    }

    /// How much of that takes space, in bytes.
    ///
    /// # Errors
    ///
    /// When the host does not say.
    pub fn ledger_bytes(&self) -> Result<u64, OriginalError> {
        let (mut left, mut bytes) = (self.ledger(), 0);
        while !left.is_empty() {
            left.start = match self.first_part(&left)? {
                Part::Hole(part) => part.end,
                Part::Data(part) => {
                    bytes += part.end - part.start;
                    part.end
                }
            };
        }
        Ok(bytes)
    }

    /// How long the file is, or the disk.
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
