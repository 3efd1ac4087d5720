//! Encryption by AES-256-GCM (NIST SP 800-38D), under keys that are made for one snapshot each: no nonce is used twice.
//!
//! ```text
//!   the user's key and the snapshot's salt (random, in its state)
//!      ├── the check     stands in the state, and tells another key from damage
//!      ├── sections      nonce: the section's place in the state
//!      └── chunks        with the memory's id; nonce: the chunk's number
//! ```

use std::fmt;

use coracle_storage::secret::{Secret, SecretSource};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey};
use zeroize::{Zeroize, Zeroizing};

use super::KeyError;

/// What an encrypted text has beside its own length, in bytes: it says that the text is the one that was encrypted.
pub const TAG_BYTES: usize = 16;
/// What a state says of how it is encrypted, in bytes: the salt and the check.
pub const CIPHER_BYTES: usize = SALT_BYTES + CHECK_BYTES;

const KEY_BYTES: usize = 32;
const SALT_BYTES: usize = 32;
const CHECK_BYTES: usize = 32;

/// What a user encrypts snapshots with. Nothing prints it, and its memory is overwritten when it is dropped.
#[derive(Clone)]
pub struct EncryptionKey(Zeroizing<[u8; KEY_BYTES]>);

/// What one snapshot is encrypted with.
#[derive(Clone)]
pub struct SnapshotCipher {
    key: EncryptionKey,
    salt: [u8; SALT_BYTES],
}

/// One of the keys of a snapshot, which encrypts things that have numbers.
#[derive(Clone)]
pub struct DataKey(LessSafeKey);

/// What was to be decrypted is not what was encrypted with this key, in this place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forged;

impl EncryptionKey {
    /// Reads the key in `place`: 32 bytes, or 64 hexadecimal digits and perhaps a line feed.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is no key.
    pub fn read(place: &SecretSource) -> Result<Self, KeyError> {
        Self::parse(place, Secret::read_whole(place)?.bytes())
    }

    /// The key in `bytes`, which were read in `place`.
    ///
    /// # Errors
    ///
    /// When they are none.
    pub fn parse(place: &SecretSource, bytes: &[u8]) -> Result<Self, KeyError> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        let is_key = if bytes.len() == KEY_BYTES {
            key.copy_from_slice(bytes);
            true
        } else {
            from_hex(bytes.strip_suffix(b"\n").unwrap_or(bytes), &mut key).is_some()
        };
        is_key
            .then_some(Self(key))
            .ok_or_else(|| KeyError::Encryption { place: place.clone() })
    }
}

fn from_hex(digits: &[u8], key: &mut [u8; KEY_BYTES]) -> Option<()> {
    let (pairs, rest) = digits.as_chunks::<2>();
    if pairs.len() != KEY_BYTES || !rest.is_empty() {
        return None;
    }
    let value = |digit: u8| char::from(digit).to_digit(16);
    for (byte, [high, low]) in key.iter_mut().zip(pairs) {
        *byte = u8::try_from(value(*high)? << 4 | value(*low)?).ok()?;
    }
    Some(())
}

impl fmt::Debug for EncryptionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl SnapshotCipher {
    /// For a snapshot that is being made.
    ///
    /// # Errors
    ///
    /// When the host has no random bytes.
    pub fn new(key: EncryptionKey) -> Result<Self, KeyError> {
        let mut salt = [0; SALT_BYTES];
        coracle_devices::random::fill(&mut salt).map_err(KeyError::Random)?;
        Ok(Self { key, salt })
    }

    /// That of a snapshot whose state has `saved`; none if that was made with another key.
    pub fn of_saved(key: EncryptionKey, saved: &[u8; CIPHER_BYTES]) -> Option<Self> {
        let (salt, _) = saved.split_first_chunk()?;
        let cipher = Self { key, salt: *salt };
        // It is no secret how far two checks agree: the state has one of them.
        (cipher.saved() == *saved).then_some(cipher)
    }

    /// What a state says of it.
    pub fn saved(&self) -> [u8; CIPHER_BYTES] {
        let mut saved = [0; CIPHER_BYTES];
        let check = self.derived("coracle 2026-11-26 snapshot: check of the key", &[]);
        for (to, from) in saved.iter_mut().zip(self.salt.iter().chain(check.iter())) {
            *to = *from;
        }
        saved
    }

    /// What the sections of the state are encrypted with.
    pub fn sections(&self) -> DataKey {
        self.data_key("coracle 2026-11-26 snapshot: sections of the state", &[])
    }

    /// What the chunks of the memory `id` are encrypted with.
    pub fn chunks(&self, id: [u8; 16]) -> DataKey {
        self.data_key("coracle 2026-11-26 snapshot: chunks of the memory", &id)
    }

    fn data_key(&self, context: &str, more: &[u8]) -> DataKey {
        let key = UnboundKey::new(&AES_256_GCM, self.derived(context, more).as_slice());
        DataKey(LessSafeKey::new(key.expect("a derived key has 32 bytes")))
    }

    /// BLAKE3 in its mode for this: key and salt have fixed lengths, so nothing else adds up to the same.
    fn derived(&self, context: &str, more: &[u8]) -> Zeroizing<[u8; KEY_BYTES]> {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher.update(self.key.0.as_slice());
        hasher.update(&self.salt).update(more);
        let mut hash = hasher.finalize();
        let derived = Zeroizing::new(*hash.as_bytes());
        hash.zeroize();
        hasher.zeroize();
        derived
    }
}

impl fmt::Debug for SnapshotCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl DataKey {
    /// Encrypts `bytes` where they are, as `number`, which is given out once, and with what is `bound` to it.
    pub fn seal(&self, number: u64, bound: &[u8], bytes: &mut [u8]) -> [u8; TAG_BYTES] {
        let sealed = self
            .0
            .seal_in_place_separate_tag(nonce(number), Aad::from(bound), bytes);
        let tag = sealed.expect("AES-GCM takes 64 GiB, which is more than a state or a chunk");
        tag.as_ref().try_into().expect("a tag has 16 bytes")
    }

    /// Decrypts what was encrypted as `number`, bound to `bound`.
    ///
    /// # Errors
    ///
    /// When it is anything else; then `bytes` are of no use.
    pub fn open(
        &self,
        number: u64,
        bound: &[u8],
        bytes: &mut [u8],
        tag: [u8; TAG_BYTES],
    ) -> Result<(), Forged> {
        let opened =
            self.0
                .open_in_place_separate_tag(nonce(number), Aad::from(bound), Tag::from(tag), bytes, 0..);
        opened.map(drop).map_err(|_| Forged)
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

fn nonce(number: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    for (to, from) in nonce.iter_mut().zip(number.to_le_bytes()) {
        *to = from;
    }
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
impl EncryptionKey {
    /// One for tests.
    pub(crate) fn of(byte: u8) -> Self {
        Self(Zeroizing::new([byte; KEY_BYTES]))
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use std::io::Write;

    use super::*;

    fn read(content: &[u8]) -> Result<EncryptionKey, KeyError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        EncryptionKey::read(&SecretSource::File(file.path().to_owned()))
    }

    #[test]
    fn a_key_is_32_bytes_or_64_digits() {
        assert_eq!(*read(&[b'\n'; 32]).unwrap().0, [b'\n'; 32]);
        let digits = b"00ff".repeat(16);
        let expected: [u8; 32] = std::array::from_fn(|at| if at % 2 == 0 { 0 } else { 0xff });
        assert_eq!(*read(&digits).unwrap().0, expected);
        assert_eq!(*read(&[&digits[..], b"\n"].concat()).unwrap().0, expected);
        for wrong in [
            &[1; 31][..],
            &[1; 33],
            &b"0g".repeat(32),
            &b"00".repeat(31),
            &b"00".repeat(33),
        ] {
            let error = read(wrong).unwrap_err();
            assert!(
                matches!(&error, KeyError::Encryption { .. }) && error.to_string().contains("openssl rand"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_was_encrypted_is_decrypted_in_its_place_and_in_no_other() {
        let cipher = SnapshotCipher::new(EncryptionKey::of(1)).unwrap();
        let again = SnapshotCipher::of_saved(EncryptionKey::of(1), &cipher.saved()).unwrap();
        let mut sealed = *b"of a guest";
        let tag = cipher.chunks([1; 16]).seal(7, b"bound", &mut sealed);
        assert_ne!(&sealed, b"of a guest");
        let open = |key: &DataKey, number, bound: &[u8], tag| {
            let mut bytes = sealed;
            key.open(number, bound, &mut bytes, tag).map(|()| bytes)
        };
        let key = again.chunks([1; 16]);
        assert_eq!(open(&key, 7, b"bound", tag), Ok(*b"of a guest"));
        assert_eq!(open(&key, 8, b"bound", tag), Err(Forged));
        assert_eq!(open(&key, 7, b"other", tag), Err(Forged));
        assert_eq!(open(&key, 7, b"bound", [0; 16]), Err(Forged));
        assert_eq!(open(&again.chunks([2; 16]), 7, b"bound", tag), Err(Forged));
        assert_eq!(open(&again.sections(), 7, b"bound", tag), Err(Forged));
        let other = SnapshotCipher::new(EncryptionKey::of(1)).unwrap();
        assert_eq!(open(&other.chunks([1; 16]), 7, b"bound", tag), Err(Forged));
    }

    #[test]
    fn another_key_is_known_before_anything_is_decrypted() {
        let saved = SnapshotCipher::new(EncryptionKey::of(1)).unwrap().saved();
        assert!(SnapshotCipher::of_saved(EncryptionKey::of(2), &saved).is_none());
        for at in 0..CIPHER_BYTES {
            let mut changed = saved;
            changed.get_mut(at).into_iter().for_each(|byte| *byte ^= 1);
            assert!(
                SnapshotCipher::of_saved(EncryptionKey::of(1), &changed).is_none(),
                "{at}"
            );
        }
    }

    #[test]
    fn nothing_prints_a_key() {
        let cipher = SnapshotCipher::new(EncryptionKey::of(1)).unwrap();
        let shown = format!("{:?} {:?} {:?}", EncryptionKey::of(1), cipher, cipher.sections());
        assert_eq!(shown, "… … …");
    }
}
