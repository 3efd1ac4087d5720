//! Secrets, and where they come from: a file or a descriptor, never an argument.

#![expect(
    unsafe_code,
    reason = "a descriptor that was inherited is a number and no more"
)]

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use zeroize::Zeroizing;

/// Longest secret, in bytes; with a line feed behind it one more.
pub const SECRET_BYTES_MAX: usize = 256;

const SECRET_BYTES_READ: usize = SECRET_BYTES_MAX + 1;

/// A secret. Nothing prints it, and its memory is overwritten when it is dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

/// Where a secret is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// In a file.
    File(PathBuf),
    /// Behind a descriptor that this process has inherited. It is read to its end and stays open: what is a file can be
    /// read again, what is a pipe cannot.
    Descriptor(RawFd),
}

/// Why there is no secret. It names the place and nothing of what is in it.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file or the descriptor cannot be read.
    #[error("cannot read the secret in {place}")]
    Read {
        /// Where it should be.
        place: SecretSource,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Nothing in it.
    #[error("{0} is empty: it should have a secret in it")]
    Empty(SecretSource),
    /// Too much in it.
    #[error("{0} has more than {SECRET_BYTES_MAX} bytes: it should have a secret in it, and nothing else")]
    Long(SecretSource),
}

impl Secret {
    /// Shortest secret that the standard allows without IPsec underneath, in bytes (RFC 7143, 9.2.1).
    pub const BYTES_MIN: usize = 12;

    /// A secret of these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Reads the secret in `source`, without the line feed that an editor has left behind it.
    ///
    /// # Errors
    ///
    /// It cannot be read, or what is there can be no secret.
    pub fn read(source: &SecretSource) -> Result<Self, SecretError> {
        let Self(mut bytes) = Self::read_whole(source)?;
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        match bytes.len() {
            0 => Err(SecretError::Empty(source.clone())),
            1..=SECRET_BYTES_MAX => Ok(Self(bytes)),
            _ => Err(SecretError::Long(source.clone())),
        }
    }

    /// Reads the secret in `source`, every byte of it: for keys that are not text, which may end with any.
    ///
    /// # Errors
    ///
    /// It cannot be read, or what is there can be no secret.
    pub fn read_whole(source: &SecretSource) -> Result<Self, SecretError> {
        let failed = |error| SecretError::Read {
            place: source.clone(),
            source: error,
        };
        let file = source.open().map_err(failed)?;
        source.warn_of_readers(&file);
        // Room for all of it from the start: a vector that grows leaves its old bytes behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(SECRET_BYTES_MAX + 2));
        file.take(SECRET_BYTES_MAX as u64 + 2)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        // One more may be the line feed that is none of it.
        match bytes.len() {
            0 => Err(SecretError::Empty(source.clone())),
            1..=SECRET_BYTES_READ => Ok(Self(bytes)),
            _ => Err(SecretError::Long(source.clone())),
        }
    }

    /// Its bytes, for what is computed with them.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl SecretSource {
    fn open(&self) -> io::Result<File> {
        match self {
            Self::File(path) => File::open(path),
            Self::Descriptor(number) => {
                if *number < 0 {
                    return Err(io::Error::from_raw_os_error(libc::EBADF));
                }
                // SAFETY: it is not -1, and is looked at for one call only, which itself finds out whether it is open.
                let inherited = unsafe { BorrowedFd::borrow_raw(*number) };
                let mut file = File::from(inherited.try_clone_to_owned()?);
                // A pipe has no beginning, and needs none.
                let _ = file.rewind();
                Ok(file)
            }
        }
    }

    fn warn_of_readers(&self, file: &File) {
        const OTHERS_READ: u32 = 0o004;
        let mode = file.metadata().map_or(0, |metadata| metadata.mode());
        if matches!(self, Self::File(_)) && mode & OTHERS_READ != 0 {
            log::warn!("{self} can be read by everybody on this host: chmod o-r it");
        }
    }
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "`{}`", path.display()),
            Self::Descriptor(number) => write!(f, "descriptor {number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use std::error::Error;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    fn file_of(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn read(content: &[u8]) -> Result<Secret, SecretError> {
        Secret::read(&SecretSource::File(file_of(content).path().to_owned()))
    }

    #[test]
    fn a_secret_is_what_is_in_the_file_without_the_last_line_feed() {
        assert_eq!(read(b"open sesame\n").unwrap().bytes(), b"open sesame");
        assert_eq!(read(b"open sesame").unwrap().bytes(), b"open sesame");
        assert_eq!(read(b" a\n\n").unwrap().bytes(), b" a\n");
        let whole = Secret::read_whole(&SecretSource::File(file_of(b"a\n").path().to_owned()));
        assert_eq!(whole.unwrap().bytes(), b"a\n");
        assert_eq!(
            read(&[7; SECRET_BYTES_MAX]).unwrap().bytes(),
            [7; SECRET_BYTES_MAX]
        );
    }

    #[test]
    fn what_can_be_no_secret_is_refused_without_being_shown() {
        assert!(matches!(read(b""), Err(SecretError::Empty(_))));
        assert!(matches!(read(b"\n"), Err(SecretError::Empty(_))));
        let error = read(&[b's'; SECRET_BYTES_MAX + 1]).unwrap_err();
        assert!(matches!(error, SecretError::Long(_)));
        assert!(!format!("{error} {error:?}").contains("ssss"));
        let absent = SecretSource::File("/nonexistent/chap".into());
        let error = Secret::read(&absent).unwrap_err();
        assert_eq!(error.to_string(), "cannot read the secret in `/nonexistent/chap`");
        assert!(error.source().is_some());
    }

    #[test]
    fn a_secret_behind_a_descriptor_is_read_and_the_descriptor_stays_open() {
        let file = file_of(b"open sesame\n");
        let source = SecretSource::Descriptor(file.as_raw_fd());
        assert_eq!(Secret::read(&source).unwrap().bytes(), b"open sesame");
        assert_eq!(Secret::read(&source).unwrap().bytes(), b"open sesame");
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"open sesame").unwrap();
        drop(writer);
        let source = SecretSource::Descriptor(reader.as_raw_fd());
        assert_eq!(Secret::read(&source).unwrap().bytes(), b"open sesame");
        assert!(matches!(Secret::read(&source), Err(SecretError::Empty(_))));
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_an_error() {
        for number in [-1, -2, i32::MAX] {
            let error = Secret::read(&SecretSource::Descriptor(number)).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("cannot read the secret in descriptor {number}")
            );
        }
    }

    #[test]
    fn nothing_prints_a_secret() {
        assert_eq!(format!("{:?}", Secret::new(b"open sesame".to_vec())), "…");
    }
}
