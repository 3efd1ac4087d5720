//! What an overlay file has, for its owner outside a machine.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use zerocopy::IntoBytes;

use super::bitmap::{BLOCK_BYTES, Bitmap, IsSynced};
use super::file::OverlayFile;
use super::format::{BITMAP_OFFSET_BYTES, Shape};

/// Which parts of an image an overlay file has, as its owner outside a machine sees it.
pub struct Clusters {
    bitmap: Bitmap,
    shape: Shape,
}

impl Clusters {
    /// Those of `overlay`.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn read(overlay: &OverlayFile) -> io::Result<Self> {
        let shape = overlay.header().shape();
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
        overlay.file().sync_data()?;
        let staged = self.bitmap.stage();
        for blocks in &staged.runs {
            let words = self.bitmap.staged(blocks);
            let bytes = words.as_bytes();
            let offset_bytes = BITMAP_OFFSET_BYTES + (blocks.start * BLOCK_BYTES) as u64;
            overlay.file().write_all_at(bytes, offset_bytes)?;
        }
        overlay.file().sync_data()
    }
}
