//! What protects the chunks of a memory file: whoever writes one sums it up, or encrypts it; whoever reads one checks it, or
//! decrypts it.
//!
//! | kind | the sum of a chunk | what it is for |
//! |---|---|---|
//! | `Crc32c` | CRC32C, 4 bytes | damage |
//! | `Blake3` | BLAKE3, 32 bytes, keyed by the memory's id | a signed state: nobody else makes such a chunk |
//! | `Aes256Gcm` | tag, 16 bytes | encryption |
//! | `Blake3Aes256Gcm` | BLAKE3 of what is encrypted, and the tag | both: not even who has the key makes another chunk |
//!
//! All but the first are bound to the chunk's number and to the pages that the file has of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::pages::runs;
use super::table::MemoryId;
use super::{CHUNK_BYTES, CHUNK_PAGES, PAGE_BYTES};
use crate::keys::{DataKey, Protection, PublicKey, SigningKey, SnapshotCipher, TAG_BYTES};

/// How the chunks of a memory file are protected, as its table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SealKind {
    /// By a checksum.
    Crc32c,
    /// By a hash.
    Blake3,
    /// They are encrypted.
    Aes256Gcm,
    /// They are encrypted, and what comes of it has a hash.
    Blake3Aes256Gcm,
}

/// The same, with the keys that it takes.
#[derive(Clone, Debug)]
pub enum Seal {
    /// By a checksum.
    Crc32c,
    /// By a hash.
    Blake3(HashKey),
    /// They are encrypted.
    Aes256Gcm(DataKey),
    /// They are encrypted, and what comes of it has a hash.
    Blake3Aes256Gcm(HashKey, DataKey),
}

/// What makes the hashes of one memory those of no other.
#[derive(Clone, Copy, Debug)]
pub struct HashKey([u8; HASH_BYTES]);

/// What a chunk adds up to: as many bytes as its kind has, then zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sum([u8; SUM_BYTES_MAX]);

/// A chunk, and which of its pages are meant.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) chunk: usize,
    pub(super) mask: u16,
}

/// A chunk that is not what was written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Broken;

const CRC_BYTES: usize = 4;
const HASH_BYTES: usize = blake3::OUT_LEN;
const SUM_BYTES_MAX: usize = HASH_BYTES + TAG_BYTES;

impl fmt::Display for SealKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Crc32c => "CRC32C",
            Self::Blake3 => "BLAKE3",
            Self::Aes256Gcm => "AES-256-GCM",
            Self::Blake3Aes256Gcm => "AES-256-GCM and BLAKE3",
        })
    }
}

impl SealKind {
    /// How long the sum of a chunk is.
    pub const fn sum_bytes(self) -> usize {
        match self {
            Self::Crc32c => CRC_BYTES,
            Self::Blake3 => HASH_BYTES,
            Self::Aes256Gcm => TAG_BYTES,
            Self::Blake3Aes256Gcm => SUM_BYTES_MAX,
        }
    }
}

impl Default for Sum {
    fn default() -> Self {
        Self([0; SUM_BYTES_MAX])
    }
}

impl Sum {
    fn of(first: &[u8], second: &[u8]) -> Self {
        let mut sum = Self::default();
        for (to, from) in sum.0.iter_mut().zip(first.iter().chain(second)) {
            *to = *from;
        }
        sum
    }

    /// Its bytes, of a kind that has `len`.
    pub(super) fn bytes(&self, len: usize) -> &[u8] {
        self.0.get(..len).expect("no kind has longer sums")
    }
}

impl HashKey {
    pub(super) fn of(id: MemoryId) -> Self {
        Self(blake3::derive_key(
            "coracle 2026-11-26 snapshot: hashes of the memory",
            &id.0,
        ))
    }

    /// The pages first, so that they lie as the hash takes them; what is behind them has always the same length.
    fn hash(&self, part: Part, bytes: &[u8]) -> [u8; HASH_BYTES] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        each_run(part.mask, bytes, |pages| {
            hasher.update(pages);
        });
        *hasher.update(&part.bound()).finalize().as_bytes()
    }
}

impl Part {
    const BOUND_BYTES: usize = size_of::<u64>() + size_of::<u16>();

    fn number(self) -> u64 {
        self.chunk as u64
    }

    /// What a sum is bound to beside the pages.
    fn bound(self) -> [u8; Self::BOUND_BYTES] {
        let mut bound = [0; Self::BOUND_BYTES];
        let bytes = self
            .number()
            .to_le_bytes()
            .into_iter()
            .chain(self.mask.to_le_bytes());
        bound.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        bound
    }
}

impl Seal {
    /// For the memory `id` of a snapshot that is being made.
    pub fn new(id: MemoryId, protection: &Protection) -> Self {
        let signer = protection.signing.as_ref().map(SigningKey::public);
        Self::of_saved(id, signer, protection.cipher.as_ref())
    }

    /// For the memory `id` of a snapshot whose state was signed by `signer`, if anybody, and encrypted with `cipher`, if at all.
    pub(super) fn of_saved(id: MemoryId, signer: Option<PublicKey>, cipher: Option<&SnapshotCipher>) -> Self {
        match (signer, cipher) {
            (None, None) => Self::Crc32c,
            (Some(_), None) => Self::Blake3(HashKey::of(id)),
            (None, Some(cipher)) => Self::Aes256Gcm(cipher.chunks(id.0)),
            (Some(_), Some(cipher)) => Self::Blake3Aes256Gcm(HashKey::of(id), cipher.chunks(id.0)),
        }
    }

    /// Its kind.
    pub fn kind(&self) -> SealKind {
        match self {
            Self::Crc32c => SealKind::Crc32c,
            Self::Blake3(_) => SealKind::Blake3,
            Self::Aes256Gcm(_) => SealKind::Aes256Gcm,
            Self::Blake3Aes256Gcm(..) => SealKind::Blake3Aes256Gcm,
        }
    }

    /// Whether the file has other bytes than the memory.
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Aes256Gcm(_) | Self::Blake3Aes256Gcm(..))
    }

    /// Sums up those pages of a chunk that go to the file as they are.
    ///
    /// # Panics
    ///
    /// When they are to be encrypted.
    pub(super) fn sum(&self, part: Part, bytes: &[u8]) -> Sum {
        match self {
            Self::Crc32c => Sum::of(&crc32c_of(part.mask, bytes), &[]),
            Self::Blake3(hash) => Sum::of(&hash.hash(part, bytes), &[]),
            Self::Aes256Gcm(_) | Self::Blake3Aes256Gcm(..) => panic!("what is encrypted is closed"),
        }
    }

    /// Makes of a chunk what goes to the file, where it is, and sums that up. Pages that are not meant hold anything afterwards.
    pub(super) fn close(&self, part: Part, bytes: &mut [u8]) -> Sum {
        match self {
            Self::Crc32c | Self::Blake3(_) => self.sum(part, bytes),
            Self::Aes256Gcm(key) => Sum::of(&encrypt(key, part, bytes), &[]),
            Self::Blake3Aes256Gcm(hash, key) => {
                let tag = encrypt(key, part, bytes);
                Sum::of(&hash.hash(part, bytes), &tag)
            }
        }
    }

    /// Checks a chunk of the file, and makes of it what the memory had, where it is.
    ///
    /// # Errors
    ///
    /// When `sum` is not what it adds up to; then the bytes may be anything.
    pub(super) fn open(&self, part: Part, bytes: &mut [u8], sum: &[u8]) -> Result<(), Broken> {
        match self {
            Self::Crc32c => same(&crc32c_of(part.mask, bytes), sum),
            Self::Blake3(hash) => same(&hash.hash(part, bytes), sum),
            Self::Aes256Gcm(key) => decrypt(key, part, bytes, sum),
            Self::Blake3Aes256Gcm(hash, key) => {
                let (expected, tag) = sum.split_at_checked(HASH_BYTES).ok_or(Broken)?;
                same(&hash.hash(part, bytes), expected)?;
                decrypt(key, part, bytes, tag)
            }
        }
    }
}

fn same(found: &[u8], expected: &[u8]) -> Result<(), Broken> {
    if found == expected { Ok(()) } else { Err(Broken) }
}

/// Takes each run of those pages of a chunk that `mask` names, in order.
fn each_run<'b>(mask: u16, bytes: &'b [u8], mut take: impl FnMut(&'b [u8])) {
    for run in runs(&[mask]) {
        let pages = bytes.get(run.start * PAGE_BYTES..run.end * PAGE_BYTES);
        take(pages.expect("a chunk has as many pages as a mask has bits"));
    }
}

fn crc32c_of(mask: u16, bytes: &[u8]) -> [u8; CRC_BYTES] {
    let mut sum = 0;
    each_run(mask, bytes, |pages| sum = crc32c::crc32c_append(sum, pages));
    sum.to_le_bytes()
}

fn encrypt(key: &DataKey, part: Part, bytes: &mut [u8]) -> [u8; TAG_BYTES] {
    let len = gather(part.mask, bytes);
    let text = bytes.get_mut(..len).expect("its pages are no more than a chunk");
    let tag = key.seal(part.number(), &part.bound(), text);
    scatter(part.mask, bytes);
    tag
}

fn decrypt(key: &DataKey, part: Part, bytes: &mut [u8], tag: &[u8]) -> Result<(), Broken> {
    let tag = tag.try_into().map_err(|_| Broken)?;
    let len = gather(part.mask, bytes);
    let text = bytes.get_mut(..len).expect("its pages are no more than a chunk");
    let opened = key.open(part.number(), &part.bound(), text, tag);
    opened.map_err(|_| Broken)?;
    scatter(part.mask, bytes);
    Ok(())
}

/// Moves the pages that `mask` names to the beginning of their chunk, in order, and says how many bytes they are.
fn gather(mask: u16, bytes: &mut [u8]) -> usize {
    assert!(bytes.len() == CHUNK_BYTES, "a chunk is encrypted whole");
    let mut count = 0;
    for page in (0..CHUNK_PAGES).filter(|page| mask & 1 << page != 0) {
        move_page(bytes, page, count);
        count += 1;
    }
    count * PAGE_BYTES
}

/// Moves them back to their places, the last first: each lies at its place or before it.
fn scatter(mask: u16, bytes: &mut [u8]) {
    let mut from = (0..CHUNK_PAGES).filter(|page| mask & 1 << page != 0).count();
    for page in (0..CHUNK_PAGES).rev().filter(|page| mask & 1 << page != 0) {
        from -= 1;
        move_page(bytes, from, page);
    }
}

fn move_page(bytes: &mut [u8], from: usize, to: usize) {
    if from != to {
        bytes.copy_within(from * PAGE_BYTES..(from + 1) * PAGE_BYTES, to * PAGE_BYTES);
    }
}

#[cfg(test)]
mod tests;
