//! The state of a machine outside its memory: a header that can be read without knowing any of it, then sections.
//!
//! ```text
//!   header, 64 bytes: magic, format, architecture, count, length, who wrote it, CRC32C
//!   section, count times: 64 bytes of name, version, length, CRC32C of all of it; then the body
//!   zeros up to a multiple of 512 bytes
//! ```
//!
//! Every byte is covered by a checksum or has to be zero. A section that is missing is an error, and so is one that
//! nobody has asked for: there is nothing of a machine that may be lost. Snapshots and migrations have the same sections.

mod error;
mod header;
#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::error::StateError;
use self::header::SectionHeader;
pub use self::header::{FORMAT_VERSION, HEADER_BYTES, Header, SECTION_NAME_BYTES_MAX};

/// Longest state, in bytes: that of a machine with 1 TiB of memory, whose table has 96 MiB, and as much again.
pub const STATE_BYTES_MAX: usize = 192 << 20;
/// Most sections.
pub const SECTIONS_MAX: u32 = 256;
/// A state is a whole number of these: every storage takes it as it is.
pub const STATE_ALIGN_BYTES: usize = 512;

/// The body of a section: plain data, which no other part of the program uses for anything else.
pub trait Body: Serialize + DeserializeOwned {
    /// What it is written as. One more than before whenever the type changes.
    const VERSION: u32;

    /// Reads a body that was written as `version`: this one, or the one before.
    ///
    /// # Errors
    ///
    /// `Ok(None)` for a version that is not known; or what is wrong with the bytes.
    fn read(version: u32, bytes: &[u8]) -> Result<Option<Self>, postcard::Error> {
        if version != Self::VERSION {
            return Ok(None);
        }
        whole(bytes).map(Some)
    }
}

/// Reads a body that takes all of `bytes`.
///
/// # Errors
///
/// What is wrong with them.
pub fn whole<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, postcard::Error> {
    match postcard::take_from_bytes(bytes)? {
        (body, []) => Ok(body),
        _ => Err(postcard::Error::DeserializeBadEncoding),
    }
}

/// A state that is being written.
#[derive(Debug, Default)]
pub struct Sections {
    bytes: Vec<u8>,
    count: u32,
}

impl Sections {
    /// Adds a section.
    ///
    /// # Panics
    ///
    /// When the name is too long, or there are too many: both are the caller's own.
    pub fn add<T: Body>(&mut self, name: &str, body: &T) {
        let body = postcard::to_stdvec(body).expect("plain data can be written");
        self.add_written(name, T::VERSION, &body);
    }

    /// Adds a section whose body is written already.
    ///
    /// # Panics
    ///
    /// As [`Self::add`].
    pub fn add_written(&mut self, name: &str, version: u32, body: &[u8]) {
        assert!(
            self.count < SECTIONS_MAX,
            "a machine has fewer sections than that"
        );
        let header = SectionHeader::new(name, version, body);
        self.bytes.extend_from_slice(header.bytes());
        self.bytes.extend_from_slice(body);
        self.count += 1;
    }

    /// The whole state.
    pub fn finish(self) -> Vec<u8> {
        let header = Header::new(self.count, HEADER_BYTES + self.bytes.len());
        let mut state = header.bytes();
        state.extend_from_slice(&self.bytes);
        state.resize(state.len().next_multiple_of(STATE_ALIGN_BYTES), 0);
        state
    }
}

/// A state that is being read: sections that wait to be taken.
#[derive(Debug)]
pub struct State<'a> {
    sections: Vec<Waiting<'a>>,
}

#[derive(Debug)]
struct Waiting<'a> {
    name: String,
    version: u32,
    body: &'a [u8],
}

impl<'a> State<'a> {
    /// Reads a state and checks all of its sums; what is in the sections is not looked at yet.
    ///
    /// # Errors
    ///
    /// What is wrong, by the name of the section.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, StateError> {
        let header = Header::parse(bytes)?;
        header.check()?;
        let length = usize::try_from(header.length_bytes).map_err(|_| StateError::Long)?;
        let (state, padding) = bytes.split_at_checked(length).ok_or(StateError::Short {
            section: None,
            missing_bytes: header.length_bytes.saturating_sub(bytes.len() as u64),
        })?;
        let expected = length.next_multiple_of(STATE_ALIGN_BYTES) - length;
        if padding.len() != expected || padding.iter().any(|byte| *byte != 0) {
            return Err(StateError::Trailing);
        }
        let mut rest = state.get(HEADER_BYTES..).unwrap_or_default();
        let mut sections: Vec<Waiting<'a>> = Vec::new();
        for _ in 0..header.section_count {
            let (section, body, behind) = SectionHeader::parse(rest)?;
            let name = section.name()?;
            if sections.iter().any(|other| other.name == name) {
                return Err(StateError::Twice { section: name });
            }
            sections.push(Waiting {
                name,
                version: section.version(),
                body,
            });
            rest = behind;
        }
        if !rest.is_empty() {
            return Err(StateError::Trailing);
        }
        Ok(Self { sections })
    }

    /// Takes the section `name`.
    ///
    /// # Errors
    ///
    /// When it is not there, was written by a version that is not known, or does not hold what it should.
    pub fn take<T: Body>(&mut self, name: &str) -> Result<T, StateError> {
        self.take_if_there(name)?.ok_or_else(|| StateError::Missing {
            section: name.to_owned(),
        })
    }

    /// The same, for a section that not every machine has.
    ///
    /// # Errors
    ///
    /// As [`Self::take`], but for one that is not there.
    pub fn take_if_there<T: Body>(&mut self, name: &str) -> Result<Option<T>, StateError> {
        let Some(at) = self.sections.iter().position(|section| section.name == name) else {
            return Ok(None);
        };
        let Waiting { name, version, body } = self.sections.remove(at);
        match T::read(version, body) {
            Ok(Some(body)) => Ok(Some(body)),
            Ok(None) => Err(StateError::Version {
                section: name,
                version,
                known: T::VERSION,
            }),
            Err(source) => Err(StateError::Body {
                section: name,
                source,
            }),
        }
    }

    /// The names, versions and lengths of the sections that wait, in their order.
    pub fn sections(&self) -> impl Iterator<Item = (&str, u32, usize)> {
        self.sections
            .iter()
            .map(|section| (section.name.as_str(), section.version, section.body.len()))
    }

    /// The whole state once more, with another body in the section `name`.
    ///
    /// # Panics
    ///
    /// When there is no such section, or it was taken: whoever asks has found it there.
    pub fn with<T: Body>(&self, name: &str, body: &T) -> Vec<u8> {
        assert!(
            self.sections.iter().any(|section| section.name == name),
            "only what is there is replaced"
        );
        let mut sections = Sections::default();
        for section in &self.sections {
            if section.name == name {
                sections.add(name, body);
            } else {
                sections.add_written(&section.name, section.version, section.body);
            }
        }
        sections.finish()
    }

    /// Ends the reading.
    ///
    /// # Errors
    ///
    /// A section that nobody has taken.
    pub fn finish(self) -> Result<(), StateError> {
        match self.sections.into_iter().next() {
            None => Ok(()),
            Some(section) => Err(StateError::Unknown {
                section: section.name,
            }),
        }
    }
}
