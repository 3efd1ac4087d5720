//! The image that a disk benchmark loads: full of data, and in the page cache.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crate::Outcome;
use crate::seed::Seed;

/// How large it is.
pub const MIB: u64 = 1024;

/// The seed of its content.
const SEED: u64 = 1;

/// How much is read at a time to have it all in the page cache.
const CHUNK_BYTES: usize = 1 << 20;

/// How much of an image is written at a time. It shows for as long as the image is cached: ext4 keeps what was
/// written together in large folios, and looks at each block of a folio to change one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pieces {
    /// Pages, as `cp` and most guests leave an image behind.
    Pages,
    /// MiBs, as `dd bs=1M` does.
    Mebibytes,
}

impl Pieces {
    fn bytes(self) -> usize {
        match self {
            Self::Pages => 4096,
            Self::Mebibytes => 1 << 20,
        }
    }
}

/// An image in a file, which goes with it.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
}

impl Image {
    /// Makes an image in `directory`: no hole in it, and all of it read once.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub fn new(directory: &Path, pieces: Pieces) -> Outcome<Self> {
        // One name for every run of the benchmark: one that was broken off leaves no more than one image behind.
        let image = Self {
            path: directory.join("coracle-bench-disk.img"),
        };
        image
            .fill(pieces)
            .map_err(|e| format!("cannot make the image {}: {e}", image.path.display()))?;
        image.warm()?;
        Ok(image)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes out what a run has left in the page cache, so that the next one does not wait for it.
    ///
    /// # Errors
    ///
    /// When the medium fails.
    pub fn settle(&self) -> Outcome {
        Ok(File::open(&self.path)?.sync_all()?)
    }

    fn fill(&self, pieces: Pieces) -> std::io::Result<()> {
        let mut random = Seed::from(SEED);
        let mut file = BufWriter::with_capacity(pieces.bytes(), File::create(&self.path)?);
        for _ in 0..(MIB << 20) / 8 {
            file.write_all(&random.draw().to_le_bytes())?;
        }
        file.into_inner()?.sync_all()
    }

    fn warm(&self) -> Outcome {
        let mut file = File::open(&self.path)?;
        let mut chunk = vec![0; CHUNK_BYTES];
        while file.read(&mut chunk)? > 0 {}
        Ok(())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = std::fs::remove_file(&self.path);
    }
}
