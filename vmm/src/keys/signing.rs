//! Signatures by Ed25519 (RFC 8032), and whose are trusted.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use coracle_storage::secret::{Secret, SecretSource};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use super::{KeyError, pem};

/// A public key, in bytes.
pub const PUBLIC_KEY_BYTES: usize = 32;
/// A signature, in bytes.
pub const SIGNATURE_BYTES: usize = 64;

/// Longest list of trusted keys, in bytes.
const LIST_BYTES_MAX: u64 = 64 << 10;
/// What stands before an Ed25519 key where its kind is said (RFC 8410, 4).
const SPKI: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];

/// Who has signed. It is shown as the line that stands in the key's own file, so that one is found in the other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(pub [u8; PUBLIC_KEY_BYTES]);

/// A key that signs. Nothing prints it.
pub struct SigningKey(Ed25519KeyPair);

/// Those whose signatures count.
#[derive(Clone, PartialEq, Eq)]
pub struct TrustedKeys {
    path: PathBuf,
    keys: Vec<PublicKey>,
}

impl PublicKey {
    /// Whether `signature` is that of this key, of `message`.
    pub fn has_signed(&self, message: &[u8], signature: &[u8; SIGNATURE_BYTES]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0)
            .verify(message, signature)
            .is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&pem::encoded(&[SPKI.as_slice(), &self.0].concat()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl SigningKey {
    /// Reads the key in `place`: PKCS#8 in PEM, as `openssl genpkey -algorithm ed25519` writes it.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is no such key.
    pub fn read(place: &SecretSource) -> Result<Self, KeyError> {
        Self::parse(place, Secret::read_whole(place)?.bytes())
    }

    /// The key in `text`, which was read in `place`.
    ///
    /// # Errors
    ///
    /// When there is none, or more than one.
    pub fn parse(place: &SecretSource, text: &[u8]) -> Result<Self, KeyError> {
        let none = |source| KeyError::Signing {
            place: place.clone(),
            source,
        };
        let blocks = pem::blocks(text).map_err(|source| none(Some(source)))?;
        let mut keys = blocks.iter().filter(|block| block.label == "PRIVATE KEY");
        let (Some(key), None) = (keys.next(), keys.next()) else {
            return Err(none(None));
        };
        // OpenSSL leaves the public half out, which is checked where it is there.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&key.der);
        Ok(Self(pair.map_err(|_| none(None))?))
    }

    /// Its public half.
    pub fn public(&self) -> PublicKey {
        let public = self.0.public_key().as_ref().try_into();
        PublicKey(public.expect("a public key of Ed25519 has 32 bytes"))
    }

    /// Signs `message`.
    pub fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_BYTES] {
        let signature = self.0.sign(message).as_ref().try_into();
        signature.expect("a signature of Ed25519 has 64 bytes")
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the key of {}", self.public())
    }
}

impl TrustedKeys {
    /// Reads the list in the file at `path`: public keys in PEM, one after the other.
    ///
    /// # Errors
    ///
    /// It cannot be read, has no key, or something else in it.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let mut text = Vec::new();
        let read = File::open(path).and_then(|file| file.take(LIST_BYTES_MAX + 1).read_to_end(&mut text));
        read.map_err(|source| KeyError::Trusted {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// The list in `text`, which was read at `path`.
    ///
    /// # Errors
    ///
    /// When it has no key, or something else in it, or is longer than any.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self, KeyError> {
        let path = path.to_owned();
        if text.len() as u64 > LIST_BYTES_MAX {
            return Err(KeyError::Long { path });
        }
        let blocks = match pem::blocks(text) {
            Ok(blocks) => blocks,
            Err(source) => return Err(KeyError::List { path, source }),
        };
        let mut keys = Vec::new();
        for block in blocks {
            let key = block.der.strip_prefix(&SPKI).and_then(|key| key.try_into().ok());
            match key.filter(|_| block.label == "PUBLIC KEY") {
                Some(key) => keys.push(PublicKey(key)),
                None => {
                    let label = block.label.escape_default().to_string();
                    return Err(KeyError::Other { path, label });
                }
            }
        }
        if keys.is_empty() {
            return Err(KeyError::Nobody { path });
        }
        Ok(Self { path, keys })
    }

    /// Whether `signer` is one of them.
    pub fn contains(&self, signer: PublicKey) -> bool {
        self.keys.contains(&signer)
    }

    /// The file that they stand in.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Debug for TrustedKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys of `{}`", self.keys.len(), self.path.display())
    }
}

#[cfg(test)]
impl SigningKey {
    /// One for tests.
    pub(crate) fn of(byte: u8) -> Self {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[byte; 32]);
        Self(pair.expect("a seed has 32 bytes"))
    }
}

#[cfg(test)]
impl TrustedKeys {
    /// A list for tests.
    pub(crate) fn of(keys: &[&SigningKey]) -> Self {
        Self {
            path: "trusted.pem".into(),
            keys: keys.iter().map(|key| key.public()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    /// As `openssl genpkey -algorithm ed25519` has written it, and `openssl pkey -pubout` of it.
    const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIFF7UUjlXdKfq1awAJ81hdFPXh5N9srvwTE7OgpXgJaz
-----END PRIVATE KEY-----
";
    const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEA/7dWB5Ge7x3C7GM5gdyvfCY41zw30HgRmhml/aNCc1M=
-----END PUBLIC KEY-----
";

    fn file_of(text: &str) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn key(text: &str) -> Result<SigningKey, KeyError> {
        SigningKey::read(&SecretSource::File(file_of(text).path().to_owned()))
    }

    fn list(text: &str) -> Result<TrustedKeys, KeyError> {
        TrustedKeys::read(file_of(text).path())
    }

    #[test]
    fn a_key_of_openssl_signs_and_is_known_by_its_public_half() {
        let key = key(PRIVATE).unwrap();
        let public = key.public();
        assert!(PUBLIC.contains(&public.to_string()), "{public}");
        let trusted = list(&format!("alice, until 2030\n{PUBLIC}\nbob\n{PUBLIC}")).unwrap();
        assert!(trusted.contains(public) && !trusted.contains(PublicKey([3; 32])));
        let signature = key.sign(b"message");
        assert!(public.has_signed(b"message", &signature));
        assert!(!public.has_signed(b"massage", &signature));
        assert!(!PublicKey([3; 32]).has_signed(b"message", &signature));
        assert!(!format!("{key:?}").contains("MC4CAQ"));
    }

    #[test]
    fn what_is_no_signing_key_is_refused_with_the_command_that_makes_one() {
        for text in [
            PUBLIC,
            "nothing",
            &PRIVATE.replace("MC4", "MC5"),
            &PRIVATE.repeat(2),
        ] {
            let error = key(text).unwrap_err();
            assert!(
                matches!(&error, KeyError::Signing { .. }) && error.to_string().contains("openssl genpkey"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_list_of_trusted_keys_has_public_keys_and_no_other() {
        assert!(matches!(list("nobody"), Err(KeyError::Nobody { .. })));
        let error = list(&format!("{PUBLIC}{PRIVATE}")).unwrap_err();
        assert!(error.to_string().contains("a PRIVATE KEY in it"), "{error}");
        let other = list(&PUBLIC.replace("MCowBQYDK2VwAyEA", "MCowBQYDK2VuAyEA"));
        assert!(matches!(other, Err(KeyError::Other { .. })));
        let cut = PUBLIC.replace("-----END", "----END");
        assert!(matches!(list(&cut), Err(KeyError::List { .. })));
        assert!(matches!(list(&"#".repeat(70_000)), Err(KeyError::Long { .. })));
        let absent = TrustedKeys::read(Path::new("/nonexistent/keys"));
        assert!(matches!(absent, Err(KeyError::Trusted { .. })));
    }
}
