//! The state of a machine outside its memory: a header that can be read without knowing any of it, then sections.
//!
//! ```text
//!   header, 64 bytes: magic, format, architecture, count, length, who wrote it, CRC32C
//!   section, count times: 64 bytes of name, version, length, CRC32C of all of it; then the body
//!     the first may be `encryption`: then the bodies of the others are encrypted, each with a tag behind it
//!     the last may be `signature`: of every byte before it
//!   zeros up to a multiple of 512 bytes
//! ```
//!
//! Every byte is covered by a checksum or has to be zero. A section that is missing is an error, and so is one that
//! nobody has asked for: there is nothing of a machine that may be lost. Snapshots and migrations have the same sections.

mod encryption;
mod error;
mod header;
mod signature;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

use serde::Serialize;
use serde::de::DeserializeOwned;

use self::encryption::{ENCRYPTION, Place};
pub use self::error::StateError;
pub use self::header::{FORMAT_VERSION, HEADER_BYTES, Header, SECTION_NAME_BYTES_MAX};
use self::header::{SECTION_HEADER_BYTES, SectionHeader};
use self::signature::{SIGNATURE_SECTION_BYTES, Signature};
use crate::keys::{CIPHER_BYTES, Protection, PublicKey, ReadingKeys, SnapshotCipher, TAG_BYTES};

/// Longest state, in bytes: that of a machine with 1 TiB of memory, whose table has 800 MiB at most, and then some.
pub const STATE_BYTES_MAX: usize = 896 << 20;
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
pub struct Sections(Vec<Written>);

#[derive(Debug)]
struct Written {
    name: String,
    version: u32,
    body: Vec<u8>,
}

impl Sections {
    /// Adds a section.
    ///
    /// # Panics
    ///
    /// When the name is too long, or there are too many: both are the caller's own.
    pub fn add<T: Body>(&mut self, name: &str, body: &T) {
        let body = postcard::to_stdvec(body).expect("plain data can be written");
        self.push(name, T::VERSION, body);
    }

    /// Adds a section whose body is written already.
    ///
    /// # Panics
    ///
    /// As [`Self::add`].
    pub fn add_written(&mut self, name: &str, version: u32, body: &[u8]) {
        self.push(name, version, body.to_vec());
    }

    fn push(&mut self, name: &str, version: u32, body: Vec<u8>) {
        assert!(
            self.0.len() < SECTIONS_MAX as usize - OWN_SECTIONS,
            "a machine has fewer sections than that"
        );
        self.0.push(Written {
            name: name.to_owned(),
            version,
            body,
        });
    }

    /// The whole state, with checksums and no more.
    pub fn finish(self) -> Vec<u8> {
        self.finish_with(&Protection::default())
    }

    /// The whole state, encrypted and then signed, as `protection` says.
    pub fn finish_with(self, protection: &Protection) -> Vec<u8> {
        let cipher = protection.cipher.as_ref();
        let signing = protection.signing.as_ref();
        let count = self.0.len() + usize::from(cipher.is_some()) + usize::from(signing.is_some());
        let count = u32::try_from(count).expect("there are few, as was checked when they came");
        let body_bytes = |section: &Written| section.body.len() + cipher.map_or(0, |_| TAG_BYTES);
        let length = HEADER_BYTES
            + cipher.map_or(0, |_| SECTION_HEADER_BYTES + CIPHER_BYTES)
            + self
                .0
                .iter()
                .map(|section| SECTION_HEADER_BYTES + body_bytes(section))
                .sum::<usize>()
            + signing.map_or(0, |_| SIGNATURE_SECTION_BYTES);
        let mut state = Vec::with_capacity(length.next_multiple_of(STATE_ALIGN_BYTES));
        state.extend_from_slice(&Header::new(count, length).bytes());
        if let Some(cipher) = cipher {
            put(&mut state, ENCRYPTION, encryption::VERSION, &cipher.saved());
        }
        let key = cipher.map(SnapshotCipher::sections);
        for (number, mut section) in (u32::from(cipher.is_some())..).zip(self.0) {
            if let Some(key) = &key {
                let place = Place { number, count };
                encryption::seal(key, place, &section.name, section.version, &mut section.body);
            }
            put(&mut state, &section.name, section.version, &section.body);
        }
        if let Some(signing) = signing {
            signature::sign(&mut state, signing);
        }
        assert!(state.len() == length, "the header says how long the state is");
        state.resize(length.next_multiple_of(STATE_ALIGN_BYTES), 0);
        state
    }
}

/// Those that are about the others.
const OWN_SECTIONS: usize = 2;

fn put(state: &mut Vec<u8>, name: &str, version: u32, body: &[u8]) {
    let header = SectionHeader::new(name, version, body);
    state.extend_from_slice(header.bytes());
    state.extend_from_slice(body);
}

/// A state that is being read: sections that wait to be taken.
#[derive(Debug)]
pub struct State<'a> {
    sections: Vec<Waiting<'a>>,
    signer: Option<PublicKey>,
    cipher: Option<SnapshotCipher>,
}

#[derive(Debug)]
struct Waiting<'a> {
    name: String,
    version: u32,
    body: Cow<'a, [u8]>,
}

impl<'a> State<'a> {
    /// Reads a state: checks its signature and all of its sums, and decrypts it; what is in the sections is not looked at yet.
    ///
    /// Where there are trusted keys nothing behind the header is read before the signature is known to be that of one of them.
    /// Where there are none damage is named before the signature is checked.
    ///
    /// # Errors
    ///
    /// What is wrong, by the name of the section.
    pub fn parse(bytes: &'a [u8], keys: &ReadingKeys) -> Result<Self, StateError> {
        let header = Header::parse(bytes)?;
        header.check()?;
        let length = usize::try_from(header.length_bytes).map_err(|_| StateError::Long)?;
        let (state, padding) = bytes.split_at_checked(length).ok_or(StateError::Short {
            section: None,
            missing_bytes: header.length_bytes.saturating_sub(bytes.len() as u64),
        })?;
        let signature = Signature::of(state)?;
        signature::check_trusted(signature.as_ref(), &keys.trusted)?;
        if !keys.trusted.is_empty() {
            signature
                .iter()
                .try_for_each(|signature| signature.check(state))?;
        }
        let expected = length.next_multiple_of(STATE_ALIGN_BYTES) - length;
        if padding.len() != expected || padding.iter().any(|byte| *byte != 0) {
            return Err(StateError::Trailing);
        }
        let mut reading = Reading {
            keys,
            count: header.section_count,
            cipher: None,
            sections: Vec::new(),
        };
        let own = if signature.is_some() {
            SIGNATURE_SECTION_BYTES
        } else {
            0
        };
        let end = length.saturating_sub(own);
        let mut rest = state.get(HEADER_BYTES..end).unwrap_or_default();
        for number in 0..header
            .section_count
            .saturating_sub(u32::from(signature.is_some()))
        {
            rest = reading.section(number, rest)?;
        }
        if !rest.is_empty() {
            return Err(StateError::Trailing);
        }
        if keys.trusted.is_empty() {
            signature
                .iter()
                .try_for_each(|signature| signature.check(state))?;
        }
        if reading.cipher.is_none() && keys.encryption.is_some() {
            return Err(StateError::NotEncrypted);
        }
        Ok(Self {
            sections: reading.sections,
            signer: signature.map(|signature| signature.signer),
            cipher: reading.cipher,
        })
    }

    /// Who has signed it: all of it that there was to be taken.
    pub fn signer(&self) -> Option<PublicKey> {
        self.signer
    }

    /// What it was encrypted with.
    pub fn cipher(&self) -> Option<&SnapshotCipher> {
        self.cipher.as_ref()
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
        match T::read(version, &body) {
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

    /// All of its sections once more, with another body in the section `name`.
    ///
    /// # Panics
    ///
    /// When there is no such section, or it was taken: whoever asks has found it there.
    pub fn with<T: Body>(&self, name: &str, body: &T) -> Sections {
        assert!(
            self.sections.iter().any(|section| section.name == name),
            "only what is there is replaced"
        );
        let mut sections = Sections::default();
        for section in &self.sections {
            if section.name == name {
                sections.add(name, body);
            } else {
                sections.add_written(&section.name, section.version, &section.body);
            }
        }
        sections
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

/// Takes a state apart.
struct Reading<'a, 'k> {
    keys: &'k ReadingKeys,
    count: u32,
    cipher: Option<SnapshotCipher>,
    sections: Vec<Waiting<'a>>,
}

impl<'a> Reading<'a, '_> {
    /// Reads the section at the beginning of `bytes`, and returns what is behind it.
    fn section(&mut self, number: u32, bytes: &'a [u8]) -> Result<&'a [u8], StateError> {
        let (header, body, behind) = SectionHeader::parse(bytes)?;
        let name = header.name()?;
        if number == 0 && name == ENCRYPTION && header.version() == encryption::VERSION {
            self.cipher = Some(encryption::cipher(body, self.keys.encryption.as_ref())?);
            return Ok(behind);
        }
        if self.sections.iter().any(|other| other.name == name) {
            return Err(StateError::Twice { section: name });
        }
        let body = match &self.cipher {
            None => Cow::Borrowed(body),
            Some(cipher) => {
                let count = self.count;
                let place = Place { number, count };
                Cow::Owned(encryption::open(&cipher.sections(), place, header, body)?)
            }
        };
        self.sections.push(Waiting {
            name,
            version: header.version(),
            body,
        });
        Ok(behind)
    }
}
