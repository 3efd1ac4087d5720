//! The header of a tail: what says that a unit was formatted, how, and that it is this unit.
//!
//! It carries the unit's own name ([`crate::iscsi::scsi::designator`]), which a guest is not told. The guest of a unit
//! that is not formatted can write where a header would be, and what it writes is not taken for one unless it has guessed
//! the name; the guest of a formatted unit does not reach the header at all. The name also tells a unit from its copy.

use std::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Tail;

/// What is looked at of the header's piece: the smallest block, so that no crash tears it.
pub const HEADER_BYTES: usize = 512;

/// The longest name of a unit.
pub const IDENTITY_BYTES_MAX: usize = 256;

const MAGIC: [u8; 16] = *b"CORACLE LUN TAIL";
const VERSION: u32 = 1;

/// A header as it lies in the unit.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HeaderBytes {
    magic: [u8; 16],
    version: U32,
    /// CRC32C of all 512 bytes, this field taken as 0.
    crc: U32,
    capacity_bytes: U64,
    guest_bytes: U64,
    block_bytes: U32,
    identity_len: U16,
    reserved: U16,
    id: [u8; 16],
    identity: [u8; IDENTITY_BYTES_MAX],
    unused: [u8; 192],
}

/// A value drawn when a unit is formatted, by which one formatting is told from the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatId(pub [u8; 16]);

impl fmt::Display for FormatId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// What a formatted unit says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where everything is.
    tail: Tail,
    /// Whose header this is: what [`crate::iscsi::scsi::designator::Designator::identity`] gives.
    identity: Vec<u8>,
    /// Which formatting it is from.
    id: FormatId,
}

/// Why a header is not one, or not one of this unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Damaged.
    #[error("the header of the unit's reserved tail is damaged")]
    Checksum,
    /// Another version's.
    #[error("the unit's reserved tail has format version {0}, and this program knows version {VERSION}")]
    Version(u32),
    /// The checksum is right, and what it covers is impossible.
    #[error("the header of the unit's reserved tail is not one that this program writes: {0}")]
    Impossible(&'static str),
    /// The unit is a copy, or its guest has tried to forge a header.
    #[error("the reserved tail belongs to another unit: this one is a copy of it, or was given another name")]
    OtherUnit,
    /// The header stands where none of its unit would.
    #[error(
        "the reserved tail was made for a unit of {formatted_bytes} bytes in blocks of {formatted_block_bytes}, \
         and this one is of another size"
    )]
    OtherSize {
        /// The size of the unit that was formatted.
        formatted_bytes: u64,
        /// And of its blocks.
        formatted_block_bytes: u32,
    },
}

impl Header {
    /// The header of a unit that is formatted now. `None` if `identity` is empty or too long to be written down.
    pub fn new(tail: Tail, identity: &[u8], id: FormatId) -> Option<Self> {
        (1..=IDENTITY_BYTES_MAX).contains(&identity.len()).then(|| Self {
            tail,
            identity: identity.to_vec(),
            id,
        })
    }

    /// Reads what is at [`Tail::header`] of the unit that `tail` was laid out for, and whose name is `identity`; `None`
    /// if the unit was not formatted.
    ///
    /// # Errors
    ///
    /// When it was, and the tail must not be used; nor may the guest be shown it then.
    pub fn of_unit(tail: Tail, identity: &[u8], bytes: &[u8]) -> Result<Option<Self>, HeaderError> {
        let Some(header) = Self::parse(bytes)? else {
            return Ok(None);
        };
        // First of all: whatever else a forged header says is of no interest.
        if header.identity != identity {
            return Err(HeaderError::OtherUnit);
        }
        if header.tail != tail {
            return Err(HeaderError::OtherSize {
                formatted_bytes: header.tail.capacity_bytes,
                formatted_block_bytes: header.tail.block_bytes,
            });
        }
        Ok(Some(header))
    }

    /// Reads the bytes of any unit's header; `None` if they do not begin as one.
    ///
    /// # Errors
    ///
    /// When they do, and are none that can be used.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, HeaderError> {
        if !bytes.starts_with(&MAGIC) {
            return Ok(None);
        }
        let (mut raw, _) = HeaderBytes::read_from_prefix(bytes).map_err(|_| HeaderError::Checksum)?;
        let crc = std::mem::take(&mut raw.crc);
        if crc.get() != crc32c::crc32c(raw.as_bytes()) {
            return Err(HeaderError::Checksum);
        }
        if raw.version.get() != VERSION {
            return Err(HeaderError::Version(raw.version.get()));
        }
        let tail = Tail::layout(raw.capacity_bytes.get(), raw.block_bytes.get())
            .filter(|tail| tail.guest_bytes == raw.guest_bytes.get())
            .ok_or(HeaderError::Impossible("its sizes"))?;
        let identity = raw.identity.get(..usize::from(raw.identity_len.get()));
        let header = identity
            .and_then(|identity| Self::new(tail, identity, FormatId(raw.id)))
            .ok_or(HeaderError::Impossible("the name of its unit"))?;
        raw.crc = crc;
        if header.bytes().as_bytes() != raw.as_bytes() {
            return Err(HeaderError::Impossible("what should be zeros"));
        }
        Ok(Some(header))
    }

    /// What is written to [`Tail::header`].
    pub fn encode(&self) -> Vec<u8> {
        let mut piece = self.bytes().as_bytes().to_vec();
        piece.resize(self.tail.piece_len(), 0);
        piece
    }

    /// Where everything is.
    pub fn tail(&self) -> Tail {
        self.tail
    }

    /// Which formatting it is from.
    pub fn id(&self) -> FormatId {
        self.id
    }

    fn bytes(&self) -> HeaderBytes {
        let mut identity = [0; IDENTITY_BYTES_MAX];
        for (to, from) in identity.iter_mut().zip(&self.identity) {
            *to = *from;
        }
        let identity_len = u16::try_from(self.identity.len()).expect("a header's name is not too long");
        let mut bytes = HeaderBytes {
            magic: MAGIC,
            version: VERSION.into(),
            crc: 0.into(),
            capacity_bytes: self.tail.capacity_bytes.into(),
            guest_bytes: self.tail.guest_bytes.into(),
            block_bytes: self.tail.block_bytes.into(),
            identity_len: identity_len.into(),
            reserved: 0.into(),
            id: self.id.0,
            identity,
            unused: [0; 192],
        };
        bytes.crc = crc32c::crc32c(bytes.as_bytes()).into();
        bytes
    }
}

const _: () = assert!(size_of::<HeaderBytes>() == HEADER_BYTES, "a header is a block");
