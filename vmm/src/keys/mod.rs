//! The keys of snapshots: who has signed one, who is trusted, and what it is encrypted with.

mod encryption;
mod pem;
mod signing;

use std::io;
use std::path::{Path, PathBuf};

use coracle_storage::secret::{SecretError, SecretSource};

pub use self::encryption::{CIPHER_BYTES, DataKey, EncryptionKey, Forged, SnapshotCipher, TAG_BYTES};
pub use self::pem::PemError;
pub use self::signing::{PUBLIC_KEY_BYTES, PublicKey, SIGNATURE_BYTES, SigningKey, TrustedKeys};

/// What protects a snapshot that is written, beside checksums.
#[derive(Debug, Default)]
pub struct Protection {
    /// Who signs it.
    pub signing: Option<SigningKey>,
    /// What it is encrypted with.
    pub cipher: Option<SnapshotCipher>,
}

/// What snapshots are read with.
#[derive(Clone, Debug, Default)]
pub struct ReadingKeys {
    /// A snapshot has to be signed by one key of each of these lists.
    pub trusted: Vec<TrustedKeys>,
    /// The key of one that is encrypted.
    pub encryption: Option<EncryptionKey>,
}

impl Protection {
    /// With the keys in these places, and a salt of its own.
    ///
    /// # Errors
    ///
    /// When one of them is no key, or the host has no random bytes.
    pub fn read(signing: Option<&SecretSource>, encryption: Option<&SecretSource>) -> Result<Self, KeyError> {
        let key = encryption.map(EncryptionKey::read).transpose()?;
        Ok(Self {
            signing: signing.map(SigningKey::read).transpose()?,
            cipher: key.map(SnapshotCipher::new).transpose()?,
        })
    }
}

impl ReadingKeys {
    /// Those in these places.
    ///
    /// # Errors
    ///
    /// When one of them is none.
    pub fn read(trusted: Option<&Path>, encryption: Option<&SecretSource>) -> Result<Self, KeyError> {
        Ok(Self {
            trusted: trusted.map(TrustedKeys::read).transpose()?.into_iter().collect(),
            encryption: encryption.map(EncryptionKey::read).transpose()?,
        })
    }
}

/// Why there is no key. It says nothing of what is in its place.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// There is nothing to be read.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// It is no private key.
    #[error("{place} has no Ed25519 private key in it: make one with `openssl genpkey -algorithm ed25519`")]
    Signing {
        /// Where it should be.
        place: SecretSource,
        /// What is wrong with the text, if it is not just another.
        #[source]
        source: Option<PemError>,
    },
    /// It is no key to encrypt with.
    #[error(
        "{place} has no encryption key in it, which is 32 bytes or 64 hexadecimal digits: make one with `openssl rand -hex 32`"
    )]
    Encryption {
        /// Where it should be.
        place: SecretSource,
    },
    /// The list of trusted keys cannot be read.
    #[error("cannot read the trusted keys in `{}`", path.display())]
    Trusted {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is longer than any.
    #[error("`{}` is longer than a list of trusted keys can be", path.display())]
    Long {
        /// The file.
        path: PathBuf,
    },
    /// It is no list.
    #[error("`{}` is no list of trusted keys", path.display())]
    List {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: PemError,
    },
    /// There is none in it.
    #[error(
        "`{}` has no public key in it: `openssl pkey -in KEY -pubout` writes that of a key that signs",
        path.display()
    )]
    Nobody {
        /// The file.
        path: PathBuf,
    },
    /// There is something else in it.
    #[error(
        "`{}` has a {label} in it that is no public key of Ed25519: a list of trusted keys has nothing else",
        path.display()
    )]
    Other {
        /// The file.
        path: PathBuf,
        /// What it calls itself.
        label: String,
    },
    /// The host has no random bytes.
    #[error("the host has no random bytes to encrypt with")]
    Random(#[source] io::Error),
}
