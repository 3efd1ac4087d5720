//! What stands behind the `?` of a URL.

use std::fmt;

use super::UrlError;
use crate::escape::{Encoded, decoded};
use crate::iscsi::chap::{Algorithm, USER_BYTES_MAX};
use crate::iscsi::digest::DigestKind;
use crate::iscsi::name::IscsiName;
use crate::secret::SecretSource;

/// The options of a URL; what none says is as `default` has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UrlOptions {
    /// `chap_secret_file`, `chap_secret_fd`: the secret of the URL's user. There if the user is.
    pub chap_secret: Option<SecretSource>,
    /// `chap`: the one hash to be used; `None`: that which the target takes.
    pub chap: Option<Algorithm>,
    /// `mutual_user` and its secret: what the target has to prove.
    pub mutual: Option<Mutual>,
    /// `header_digest`.
    pub header_digest: DigestKind,
    /// `data_digest`.
    pub data_digest: DigestKind,
    /// `initiator`: who this host is to the target; `None`: what the machine is called.
    pub initiator: Option<IscsiName>,
    /// `base_immutable`: the user's word that nobody writes to it.
    pub base_immutable: bool,
}

/// Who the target has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutual {
    /// `mutual_user`.
    pub user: String,
    /// `mutual_secret_file`, `mutual_secret_fd`.
    pub secret: SecretSource,
}

/// All there are, in the order in which they are written.
pub(super) const KEYS: [&str; 10] = [
    "chap_secret_file",
    "chap_secret_fd",
    "chap",
    "mutual_user",
    "mutual_secret_file",
    "mutual_secret_fd",
    "header_digest",
    "data_digest",
    "initiator",
    "base_immutable",
];

impl UrlOptions {
    /// Reads what stands behind the `?`, and whether it fits to the user before the host.
    pub(super) fn parse(query: &str, user: Option<&str>) -> Result<Self, UrlError> {
        let values = Values::parse(query)?;
        let options = Self {
            chap_secret: values.secret("chap_secret_file", "chap_secret_fd")?,
            chap: values.one_of("chap", &HASHES, "md5 or sha256")?,
            mutual: mutual(&values)?,
            header_digest: values
                .one_of("header_digest", &DIGESTS, "crc32c or none")?
                .unwrap_or_default(),
            data_digest: values
                .one_of("data_digest", &DIGESTS, "crc32c or none")?
                .unwrap_or_default(),
            initiator: values.parsed(
                "initiator",
                "an iSCSI name, such as iqn.2026-11.org.example:vm",
                |name| name.parse().ok(),
            )?,
            base_immutable: values
                .one_of("base_immutable", &BOOLEANS, "true or false")?
                .unwrap_or_default(),
        };
        let incomplete = |has, needs| Err(UrlError::Incomplete { has, needs });
        match (user, &options) {
            (
                Some(_),
                Self {
                    chap_secret: None, ..
                },
            ) => incomplete("a user", "`chap_secret_file` or `chap_secret_fd`"),
            (
                None,
                Self {
                    chap_secret: Some(_), ..
                },
            ) => incomplete("a secret", "the user before the host (USER@HOST)"),
            (None, Self { mutual: Some(_), .. }) => {
                incomplete("`mutual_user`", "a user of its own (USER@HOST)")
            }
            (None, Self { chap: Some(_), .. }) => incomplete("`chap`", "a user (USER@HOST)"),
            _ => Ok(options),
        }
    }
}

impl fmt::Display for UrlOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = '?';
        let mut put = |key: &str, value: &dyn fmt::Display| {
            write!(f, "{}{key}={value}", std::mem::replace(&mut separator, '&'))
        };
        if let Some(secret) = &self.chap_secret {
            put_secret(&mut put, ["chap_secret_file", "chap_secret_fd"], secret)?;
        }
        if let Some(algorithm) = &self.chap {
            put("chap", algorithm)?;
        }
        if let Some(mutual) = &self.mutual {
            put("mutual_user", &Encoded::name(&mutual.user))?;
            put_secret(
                &mut put,
                ["mutual_secret_file", "mutual_secret_fd"],
                &mutual.secret,
            )?;
        }
        for (key, digest) in [
            ("header_digest", self.header_digest),
            ("data_digest", self.data_digest),
        ] {
            if digest == DigestKind::Crc32c {
                put(key, &"crc32c")?;
            }
        }
        if let Some(name) = &self.initiator {
            put("initiator", &Encoded::path(name.as_str()))?;
        }
        if self.base_immutable {
            put("base_immutable", &true)?;
        }
        Ok(())
    }
}

const HASHES: [(&str, Algorithm); 2] = [("md5", Algorithm::Md5), ("sha256", Algorithm::Sha256)];
const DIGESTS: [(&str, DigestKind); 2] = [("crc32c", DigestKind::Crc32c), ("none", DigestKind::None)];
const BOOLEANS: [(&str, bool); 2] = [("true", true), ("false", false)];

fn put_secret(
    put: &mut impl FnMut(&str, &dyn fmt::Display) -> fmt::Result,
    [file, descriptor]: [&str; 2],
    source: &SecretSource,
) -> fmt::Result {
    match source {
        SecretSource::File(path) => {
            // It was text when it was read.
            put(file, &Encoded::path(&path.to_string_lossy()))
        }
        SecretSource::Descriptor(number) => put(descriptor, number),
    }
}

fn mutual(values: &Values) -> Result<Option<Mutual>, UrlError> {
    let user = values.parsed("mutual_user", "the name of a user, of up to 255 bytes", |user| {
        (1..=USER_BYTES_MAX)
            .contains(&user.len())
            .then(|| user.to_owned())
    })?;
    let secret = values.secret("mutual_secret_file", "mutual_secret_fd")?;
    match (user, secret) {
        (Some(user), Some(secret)) => Ok(Some(Mutual { user, secret })),
        (None, None) => Ok(None),
        (Some(_), None) => Err(UrlError::Incomplete {
            has: "`mutual_user`",
            needs: "`mutual_secret_file` or `mutual_secret_fd`",
        }),
        (None, Some(_)) => Err(UrlError::Incomplete {
            has: "a secret of the target",
            needs: "`mutual_user`",
        }),
    }
}

/// Each option that is there, with its value.
struct Values(Vec<(&'static str, String)>);

impl Values {
    fn parse(query: &str) -> Result<Self, UrlError> {
        let mut values = Self(Vec::new());
        for pair in query.split('&').filter(|_| !query.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let known = KEYS.into_iter().find(|known| *known == key);
            let key = known.ok_or_else(|| UrlError::UnknownOption(shown(key)))?;
            if values.of(key).is_some() {
                return Err(UrlError::Twice(key));
            }
            values.0.push((key, decoded(value).ok_or(UrlError::Escape)?));
        }
        Ok(values)
    }

    fn of(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(it, _)| *it == key)
            .map(|(_, value)| value.as_str())
    }

    fn parsed<T>(
        &self,
        key: &'static str,
        expected: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, UrlError> {
        let wrong = UrlError::Value { key, expected };
        self.of(key).map(|value| parse(value).ok_or(wrong)).transpose()
    }

    fn one_of<T: Copy>(
        &self,
        key: &'static str,
        all: &[(&str, T)],
        expected: &'static str,
    ) -> Result<Option<T>, UrlError> {
        self.parsed(key, expected, |value| {
            all.iter().find(|(text, _)| *text == value).map(|(_, it)| *it)
        })
    }

    fn secret(&self, file: &'static str, descriptor: &'static str) -> Result<Option<SecretSource>, UrlError> {
        let path = self.parsed(file, "the path of a file with a secret in it", |path| {
            (!path.is_empty()).then(|| SecretSource::File(path.into()))
        })?;
        let number = self.parsed(descriptor, "the number of an inherited descriptor", |digits| {
            let are_digits = digits.bytes().all(|c| c.is_ascii_digit());
            let number = digits.parse().ok()?;
            are_digits.then_some(SecretSource::Descriptor(number))
        })?;
        match (path, number) {
            (Some(_), Some(_)) => Err(UrlError::Both(file, descriptor)),
            (path, number) => Ok(path.or(number)),
        }
    }
}

/// As much of a key as is worth showing. What stands behind a `=` is no part of it.
fn shown(key: &str) -> String {
    const SHOWN_MAX: usize = 32;
    key.chars().take(SHOWN_MAX).collect()
}
