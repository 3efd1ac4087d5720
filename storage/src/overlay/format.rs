//! The bytes of an overlay file.
//!
//! ```text
//!   0            4 KiB        1 MiB          33 MiB
//!   │ header A   │ header B   │ bitmap       │ data: cluster n lies at 33 MiB + n · cluster_bytes
//! ```
//!
//! The file is sparse: the bitmap's area has room for every size that the image can grow to, and a cluster
//! that is not present is a hole. A header is rewritten into the place of the older one, so that a crash in the
//! middle leaves the newer one: the valid header of the higher sequence number counts.

#[cfg(test)]
mod tests;

use std::ops::Range;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::backend::{Access, Discard, Geometry};
use crate::blocking::Blocking;
use crate::likeness::Likeness;
use crate::request::Failure;

/// The size of one of the two headers.
pub const HEADER_BYTES: usize = 4096;

/// Where the bitmap starts.
pub const BITMAP_OFFSET_BYTES: u64 = 1 << 20;

/// As long as the bitmap can become.
pub const BITMAP_BYTES_MAX: u64 = 32 << 20;

/// Where the data starts.
pub const DATA_OFFSET_BYTES: u64 = BITMAP_OFFSET_BYTES + BITMAP_BYTES_MAX;

/// The cluster of all images that are not very large: a page, so that a write of a page copies nothing from the base.
pub const CLUSTER_BYTES_MIN: u64 = 4096;

/// A change of part of a cluster has to read and write all of it.
pub const CLUSTER_BYTES_MAX: u64 = 1 << 20;

/// As many clusters as the bitmap has bits.
pub const CLUSTERS_MAX: u64 = BITMAP_BYTES_MAX * 8;

const MAGIC: [u8; 8] = *b"CORACLE\xd0";
const VERSION: u32 = 1;
const SECTOR_BYTES: u64 = 512;

/// The longest name of a base, in bytes.
pub const BASE_PATH_BYTES_MAX: usize = HEADER_BYTES - 72;

/// A header as it lies in the file.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HeaderBytes {
    magic: [u8; 8],
    version: U32,
    /// CRC32C of all 4096 bytes, this field taken as 0.
    crc: U32,
    sequence: U64,
    size_bytes: U64,
    cluster_bytes: U64,
    base_size_bytes: U64,
    base_shown_bytes: U64,
    base_fingerprint: U32,
    state: U32,
    reserved: U32,
    base_path_len: U32,
    base_path: [u8; BASE_PATH_BYTES_MAX],
}

/// Whether an overlay can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It can.
    Usable,
    /// Its clusters are on their way into its base: only a commit may go on.
    Committing,
}

/// What an overlay file says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Counts rewrites: its lowest bit chooses the place.
    pub sequence: u64,
    /// How large the image is.
    pub size_bytes: u64,
    /// A power of two from 4096 to 1 MiB.
    pub cluster_bytes: u64,
    /// How much of the base can be seen; what is beyond reads as zeros even if the base is longer.
    pub base_shown_bytes: u64,
    /// The base that the overlay belongs to.
    pub base: BaseIdentity,
    /// Whether it can be used.
    pub state: State,
}

/// What is known of a base.
///
/// Device, inode and time would refuse a copy of the base on another host, or one that was restored from a
/// backup. Size and a checksum of samples tell another image, and one that was mounted for writing: every
/// file system then changes its superblock, which the samples cover. They do not tell every change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseIdentity {
    /// As configured when the overlay was made; only messages use it, a base may be moved.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// CRC32C of samples: see [`crate::likeness::Likeness`].
    pub fingerprint: u32,
}

impl BaseIdentity {
    /// Who `base` is, which was opened as `path`.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn of(path: &str, base: &mut Blocking) -> Result<Self, Failure> {
        let Likeness {
            size_bytes,
            fingerprint,
        } = Likeness::of(base)?;
        Ok(Self {
            path: path.to_owned(),
            size_bytes,
            fingerprint,
        })
    }
}

/// Why a header is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Another kind of file.
    #[error("it does not begin as an overlay file does")]
    Magic,
    /// Another version's.
    #[error("its format is version {0}, and this program knows version {VERSION}")]
    Version(u32),
    /// Damaged.
    #[error("both copies of its header are damaged")]
    Checksum,
    /// The checksum is right, and what it covers is impossible.
    #[error("its header is not one that this program writes: {0}")]
    Impossible(&'static str),
}

impl Header {
    /// The header of a new overlay of `size_bytes` on all of `base`; `None` if that is more than the format can hold.
    pub fn new(size_bytes: u64, base: BaseIdentity) -> Option<Self> {
        Some(Self {
            sequence: 0,
            size_bytes,
            cluster_bytes: cluster_bytes_for(size_bytes)?,
            base_shown_bytes: base.size_bytes,
            base,
            state: State::Usable,
        })
    }

    /// Its bytes; `None` if the base's name is too long.
    pub fn encode(&self) -> Option<Box<[u8]>> {
        let mut base_path = [0; BASE_PATH_BYTES_MAX];
        base_path
            .get_mut(..self.base.path.len())?
            .copy_from_slice(self.base.path.as_bytes());
        let mut bytes = HeaderBytes {
            magic: MAGIC,
            version: VERSION.into(),
            crc: 0.into(),
            sequence: self.sequence.into(),
            size_bytes: self.size_bytes.into(),
            cluster_bytes: self.cluster_bytes.into(),
            base_size_bytes: self.base.size_bytes.into(),
            base_shown_bytes: self.base_shown_bytes.into(),
            base_fingerprint: self.base.fingerprint.into(),
            state: u32::from(self.state == State::Committing).into(),
            reserved: 0.into(),
            base_path_len: u32::try_from(self.base.path.len()).ok()?.into(),
            base_path,
        };
        bytes.crc = crc32c::crc32c(bytes.as_bytes()).into();
        Some(bytes.as_bytes().into())
    }

    /// The header that counts, of the first 8 KiB of a file.
    ///
    /// # Errors
    ///
    /// When neither of the two is one.
    pub fn decode(both: &[u8; 2 * HEADER_BYTES]) -> Result<Self, HeaderError> {
        let (halves, _) = both.as_chunks::<HEADER_BYTES>();
        let mut valid: Option<Self> = None;
        // A file of another kind is told from a damaged one by either magic.
        let mut refusal = HeaderError::Magic;
        for half in halves {
            match Self::decode_one(half) {
                Ok(header)
                    if valid
                        .as_ref()
                        .is_none_or(|other| other.sequence < header.sequence) =>
                {
                    valid = Some(header);
                }
                Ok(_) | Err(HeaderError::Magic) => {}
                Err(error) => refusal = error,
            }
        }
        valid.ok_or(refusal)
    }

    /// Where its bytes belong in the file.
    pub fn offset_bytes(&self) -> u64 {
        (self.sequence % 2) * HEADER_BYTES as u64
    }

    /// The geometry of clusters.
    pub(super) fn shape(&self) -> Shape {
        Shape {
            size_bytes: self.size_bytes,
            cluster_bytes: self.cluster_bytes,
            shown_bytes: self.base_shown_bytes,
        }
    }

    fn decode_one(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        let mut raw = HeaderBytes::read_from_bytes(bytes).map_err(|_| HeaderError::Magic)?;
        if raw.magic != MAGIC {
            return Err(HeaderError::Magic);
        }
        let crc = std::mem::take(&mut raw.crc);
        if crc.get() != crc32c::crc32c(raw.as_bytes()) {
            return Err(HeaderError::Checksum);
        }
        if raw.version.get() != VERSION {
            return Err(HeaderError::Version(raw.version.get()));
        }
        let path = usize::try_from(raw.base_path_len.get())
            .ok()
            .and_then(|len| raw.base_path.get(..len))
            .and_then(|path| std::str::from_utf8(path).ok())
            .ok_or(HeaderError::Impossible("the name of its base"))?;
        let header = Self {
            sequence: raw.sequence.get(),
            size_bytes: raw.size_bytes.get(),
            cluster_bytes: raw.cluster_bytes.get(),
            base_shown_bytes: raw.base_shown_bytes.get(),
            base: BaseIdentity {
                path: path.to_owned(),
                size_bytes: raw.base_size_bytes.get(),
                fingerprint: raw.base_fingerprint.get(),
            },
            state: match raw.state.get() {
                0 => State::Usable,
                1 => State::Committing,
                _ => return Err(HeaderError::Impossible("its state")),
            },
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), HeaderError> {
        let cluster_bytes = self.cluster_bytes;
        if !cluster_bytes.is_power_of_two()
            || !(CLUSTER_BYTES_MIN..=CLUSTER_BYTES_MAX).contains(&cluster_bytes)
        {
            return Err(HeaderError::Impossible("the size of its clusters"));
        }
        if !is_size(self.size_bytes) || self.size_bytes > CLUSTERS_MAX * cluster_bytes {
            return Err(HeaderError::Impossible("its size"));
        }
        let base_bytes = self.base.size_bytes;
        if !is_size(base_bytes) || self.base_shown_bytes > base_bytes.min(self.size_bytes) {
            return Err(HeaderError::Impossible("the size of its base"));
        }
        // The next rewrite counts on.
        if self.sequence == u64::MAX {
            return Err(HeaderError::Impossible("its sequence number"));
        }
        Ok(())
    }
}

fn is_size(bytes: u64) -> bool {
    bytes >= SECTOR_BYTES && bytes.is_multiple_of(SECTOR_BYTES)
}

/// The smallest cluster with which an image of `size_bytes` can still double.
fn cluster_bytes_for(size_bytes: u64) -> Option<u64> {
    let mut cluster_bytes = CLUSTER_BYTES_MIN;
    while size_bytes.checked_mul(2)? > CLUSTERS_MAX * cluster_bytes {
        cluster_bytes *= 2;
        if cluster_bytes > CLUSTER_BYTES_MAX {
            return None;
        }
    }
    Some(cluster_bytes)
}

/// How an image is cut into clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) size_bytes: u64,
    pub(super) cluster_bytes: u64,
    /// Beyond this the base is not looked at.
    pub(super) shown_bytes: u64,
}

impl Shape {
    /// The cluster that a byte lies in.
    pub(super) fn cluster_of(&self, offset_bytes: u64) -> u64 {
        // A power of two, which the compiler cannot know.
        offset_bytes >> self.cluster_bytes.trailing_zeros()
    }

    /// The clusters that a range, which is not empty, touches.
    pub(super) fn touched(&self, bytes: &Range<u64>) -> Range<u64> {
        self.cluster_of(bytes.start)..self.cluster_of(bytes.end - 1) + 1
    }

    /// The bytes of a cluster; the last one may be cut off by the image's end.
    pub(super) fn bytes_of(&self, cluster: u64) -> Range<u64> {
        let start = self.start_of(cluster);
        start..(start + self.cluster_bytes).min(self.size_bytes)
    }

    /// Where a cluster starts.
    pub(super) fn start_of(&self, cluster: u64) -> u64 {
        cluster << self.cluster_bytes.trailing_zeros()
    }

    /// How many clusters there are.
    pub(super) fn cluster_count(&self) -> u64 {
        self.size_bytes.div_ceil(self.cluster_bytes)
    }

    /// As many bytes as this cluster size allows.
    pub(super) fn size_bytes_max(&self) -> u64 {
        CLUSTERS_MAX * self.cluster_bytes
    }

    /// What a device hears of an overlay of this shape: it likes whole clusters best.
    pub(super) fn geometry(&self, base: Geometry) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            logical_block_bytes: base.logical_block_bytes,
            physical_block_bytes: u32::try_from(self.cluster_bytes)
                .expect("a cluster has at most a mebibyte"),
            access: Access::ReadWrite,
            discard: Discard::Supported,
        }
    }
}
