//! The two fixed headers, as they lie in the file.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{SECTIONS_MAX, STATE_BYTES_MAX, StateError};

/// The format of what stands around the sections.
pub const FORMAT_VERSION: u32 = 1;
/// Longest name of a section, in bytes.
pub const SECTION_NAME_BYTES_MAX: usize = 40;
/// The header, in bytes.
pub const HEADER_BYTES: usize = 64;
pub(super) const SECTION_HEADER_BYTES: usize = 64;

const IDENTITY_BYTES: usize = SECTION_NAME_BYTES_MAX + size_of::<U32>();

const MAGIC: [u8; 8] = *b"CORACLES";
/// EM_X86_64.
const ARCHITECTURE: u32 = 62;
const WRITTEN_BY_BYTES: usize = 24;

/// What can be said about a state without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The format of what follows.
    pub format: u32,
    /// The number of the machine's architecture in ELF files.
    pub architecture: u32,
    /// How many sections there are.
    pub section_count: u32,
    /// The length of all of it, this header included, without the zeros at the end.
    pub length_bytes: u64,
    /// The version of the program.
    pub written_by: String,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    format: U32,
    architecture: U32,
    section_count: U32,
    zero: U32,
    length_bytes: U64,
    written_by: [u8; WRITTEN_BY_BYTES],
    also_zero: U32,
    crc32c: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES, "as drawn");

impl Header {
    pub(super) fn new(section_count: u32, length_bytes: usize) -> Self {
        Self {
            format: FORMAT_VERSION,
            architecture: ARCHITECTURE,
            section_count,
            length_bytes: length_bytes as u64,
            written_by: concat!("coracle ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut raw = RawHeader {
            magic: MAGIC,
            format: self.format.into(),
            architecture: self.architecture.into(),
            section_count: self.section_count.into(),
            zero: 0.into(),
            length_bytes: self.length_bytes.into(),
            written_by: padded(&self.written_by),
            also_zero: 0.into(),
            crc32c: 0.into(),
        };
        raw.crc32c = raw.sum().into();
        raw.as_bytes().to_vec()
    }

    /// Reads the header at the beginning of `bytes`, whatever format follows.
    ///
    /// # Errors
    ///
    /// When there is none, or it is damaged.
    pub fn parse(bytes: &[u8]) -> Result<Self, StateError> {
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return Err(StateError::Magic);
        };
        if raw.magic != MAGIC {
            return Err(StateError::Magic);
        }
        if raw.crc32c.get() != raw.sum() || raw.zero.get() != 0 || raw.also_zero.get() != 0 {
            return Err(StateError::Header);
        }
        Ok(Self {
            format: raw.format.get(),
            architecture: raw.architecture.get(),
            section_count: raw.section_count.get(),
            length_bytes: raw.length_bytes.get(),
            written_by: unpadded(&raw.written_by).ok_or(StateError::Header)?,
        })
    }

    /// Whether what follows can be read here.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn check(&self) -> Result<(), StateError> {
        if self.format != FORMAT_VERSION {
            return Err(StateError::Format {
                found: self.format,
                known: FORMAT_VERSION,
                written_by: self.written_by.clone(),
            });
        }
        if self.architecture != ARCHITECTURE {
            return Err(StateError::Architecture {
                found: self.architecture,
                known: ARCHITECTURE,
            });
        }
        if self.section_count > SECTIONS_MAX {
            return Err(StateError::Sections {
                found: self.section_count,
            });
        }
        if self.length_bytes > STATE_BYTES_MAX as u64 {
            return Err(StateError::Long);
        }
        Ok(())
    }
}

impl RawHeader {
    fn sum(&self) -> u32 {
        let (covered, _) = self.as_bytes().split_at(HEADER_BYTES - size_of::<U32>());
        crc32c::crc32c(covered)
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct SectionHeader {
    name: [u8; SECTION_NAME_BYTES_MAX],
    version: U32,
    zero: U64,
    length_bytes: U64,
    crc32c: U32,
}

const _: () = assert!(size_of::<SectionHeader>() == SECTION_HEADER_BYTES, "as drawn");

impl SectionHeader {
    pub(super) fn new(name: &str, version: u32, body: &[u8]) -> Self {
        assert!(
            name.len() <= SECTION_NAME_BYTES_MAX && is_name(name),
            "a section has a name that can be read back"
        );
        let mut header = Self {
            name: padded(name),
            version: version.into(),
            zero: 0.into(),
            length_bytes: (body.len() as u64).into(),
            crc32c: 0.into(),
        };
        header.crc32c = header.sum(body).into();
        header
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }

    /// Cuts a section off `bytes`: its header, its body and what is behind it.
    pub(super) fn parse(bytes: &[u8]) -> Result<(&Self, &[u8], &[u8]), StateError> {
        let Ok((header, rest)) = Self::ref_from_prefix(bytes) else {
            return Err(StateError::Short {
                section: None,
                missing_bytes: SECTION_HEADER_BYTES.saturating_sub(bytes.len()) as u64,
            });
        };
        let length = usize::try_from(header.length_bytes.get()).unwrap_or(usize::MAX);
        let Some((body, behind)) = rest.split_at_checked(length) else {
            return Err(StateError::Short {
                section: Some(header.shown_name()),
                missing_bytes: length.saturating_sub(rest.len()) as u64,
            });
        };
        if header.crc32c.get() != header.sum(body) || header.zero.get() != 0 {
            return Err(StateError::Damaged {
                section: header.shown_name(),
            });
        }
        Ok((header, body, behind))
    }

    /// Whether `bytes` begin with the header of a section of that name, as far as one can tell without its body.
    pub(super) fn is_named(bytes: &[u8], name: &str) -> bool {
        let header = Self::ref_from_prefix(bytes).ok();
        header.is_some_and(|(header, _)| header.name == padded(name))
    }

    /// What an encrypted body is bound to: a section's name and version, as they stand in its header.
    pub(super) fn identity(name: &str, version: u32) -> [u8; IDENTITY_BYTES] {
        let mut identity = padded(name);
        let behind = identity.iter_mut().skip(SECTION_NAME_BYTES_MAX);
        behind
            .zip(version.to_le_bytes())
            .for_each(|(to, from)| *to = from);
        identity
    }

    /// The same of this section.
    pub(super) fn own_identity(&self) -> [u8; IDENTITY_BYTES] {
        let (identity, _) = self
            .as_bytes()
            .split_first_chunk()
            .expect("a header is longer than its first fields");
        *identity
    }

    pub(super) fn version(&self) -> u32 {
        self.version.get()
    }

    pub(super) fn name(&self) -> Result<String, StateError> {
        unpadded(&self.name)
            .filter(|name| is_name(name))
            .ok_or_else(|| StateError::Damaged {
                section: self.shown_name(),
            })
    }

    /// The name for a message, whatever it holds.
    pub(super) fn shown_name(&self) -> String {
        let end = self.name.iter().position(|byte| *byte == 0);
        let name = self
            .name
            .get(..end.unwrap_or(self.name.len()))
            .unwrap_or_default();
        name.escape_ascii().to_string()
    }

    fn sum(&self, body: &[u8]) -> u32 {
        let (covered, _) = self.as_bytes().split_at(SECTION_HEADER_BYTES - size_of::<U32>());
        crc32c::crc32c_append(crc32c::crc32c(covered), body)
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic())
}

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut padded = [0; N];
    for (to, from) in padded.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    padded
}

/// The text before the zeros, if there is nothing else.
fn unpadded(padded: &[u8]) -> Option<String> {
    let end = padded.iter().position(|byte| *byte == 0).unwrap_or(padded.len());
    let (text, zeros) = padded.split_at(end);
    let is_padding = zeros.iter().all(|byte| *byte == 0);
    let text = std::str::from_utf8(text).ok()?;
    (is_padding && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')).then(|| text.to_owned())
}
