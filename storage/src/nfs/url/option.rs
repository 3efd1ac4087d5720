//! What stands behind the `?` of a URL.

use std::fmt;

use super::UrlError;
use crate::escape::decoded;
use crate::host::port_of;
use crate::nfs::rpc::GROUPS_MAX;

/// The options of a URL; what none says is as `default` has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UrlOptions {
    /// `version`; `None`: 4.2, or 4.1 where the server does not have that.
    pub version: Option<Version>,
    /// `uid`: who reads and writes; `None`: the user of this process.
    pub uid: Option<u32>,
    /// `gid`: its group; `None`: that of this process.
    pub gid: Option<u32>,
    /// `groups`: its other groups, up to [`GROUPS_MAX`]; `None`: none.
    pub groups: Option<Vec<u32>>,
    /// `mountport`: where the server of NFSv3 gives its exports; `None`: it is asked. There for [`Version::V3`] only.
    pub mount_port: Option<u16>,
    /// `uncommitted_bytes_max`: how much of what was written may be kept here until the server has made it last.
    pub uncommitted_bytes_max: Option<u64>,
    /// `base_immutable`: the user's word that nobody writes to it.
    pub base_immutable: bool,
}

/// A version of NFS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// `3`: to read only.
    V3,
    /// `4.1`.
    V41,
    /// `4.2`.
    V42,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spelled = VERSIONS.iter().find(|(_, version)| version == self);
        f.write_str(spelled.expect("each has its text").0)
    }
}

/// All there are, in the order in which they are written.
pub(super) const KEYS: [&str; 7] = [
    "version",
    "uid",
    "gid",
    "groups",
    "mountport",
    "uncommitted_bytes_max",
    "base_immutable",
];

const VERSIONS: [(&str, Version); 3] = [("3", Version::V3), ("4.1", Version::V41), ("4.2", Version::V42)];
const BOOLEANS: [(&str, bool); 2] = [("true", true), ("false", false)];

impl UrlOptions {
    /// Reads what stands behind the `?`.
    pub(super) fn parse(query: &str) -> Result<Self, UrlError> {
        let values = Values::parse(query)?;
        let options = Self {
            version: values.one_of("version", &VERSIONS, "3, 4.1 or 4.2")?,
            uid: values.parsed("uid", "the number of a user", number)?,
            gid: values.parsed("gid", "the number of a group", number)?,
            groups: values.parsed(
                "groups",
                "numbers of up to 16 groups, with commas between them",
                groups,
            )?,
            mount_port: values.parsed("mountport", "the number of a port", port_of)?,
            uncommitted_bytes_max: values.parsed(
                "uncommitted_bytes_max",
                "a number of bytes, and not 0",
                bytes_max,
            )?,
            base_immutable: values
                .one_of("base_immutable", &BOOLEANS, "true or false")?
                .unwrap_or_default(),
        };
        if options.mount_port.is_some() && options.version != Some(Version::V3) {
            return Err(UrlError::MountPort);
        }
        Ok(options)
    }
}

impl fmt::Display for UrlOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = '?';
        let mut put = |key: &str, value: Option<&dyn fmt::Display>| match value {
            Some(value) => write!(f, "{}{key}={value}", std::mem::replace(&mut separator, '&')),
            None => Ok(()),
        };
        let groups = self.groups.as_ref().map(|groups| {
            let groups: Vec<String> = groups.iter().map(u32::to_string).collect();
            groups.join(",")
        });
        put("version", self.version.as_ref().map(|it| it as _))?;
        put("uid", self.uid.as_ref().map(|it| it as _))?;
        put("gid", self.gid.as_ref().map(|it| it as _))?;
        put("groups", groups.as_ref().map(|it| it as _))?;
        put("mountport", self.mount_port.as_ref().map(|it| it as _))?;
        put(
            "uncommitted_bytes_max",
            self.uncommitted_bytes_max.as_ref().map(|it| it as _),
        )?;
        put(
            "base_immutable",
            self.base_immutable.then_some(&self.base_immutable as _),
        )
    }
}

fn number(digits: &str) -> Option<u32> {
    let are_digits = digits.bytes().all(|c| c.is_ascii_digit());
    let number = digits.parse().ok()?;
    are_digits.then_some(number)
}

fn groups(text: &str) -> Option<Vec<u32>> {
    if text.is_empty() {
        return Some(Vec::new());
    }
    let groups: Vec<u32> = text.split(',').map(number).collect::<Option<_>>()?;
    (groups.len() <= GROUPS_MAX).then_some(groups)
}

fn bytes_max(digits: &str) -> Option<u64> {
    let are_digits = digits.bytes().all(|c| c.is_ascii_digit());
    let bytes_max: u64 = digits.parse().ok()?;
    (are_digits && bytes_max != 0).then_some(bytes_max)
}

/// Each option that is there, with its value.
struct Values(Vec<(&'static str, String)>);

impl Values {
    fn parse(query: &str) -> Result<Self, UrlError> {
        let mut values = Self(Vec::new());
        for pair in query.split('&').filter(|_| !query.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let known = KEYS.into_iter().find(|known| *known == key);
            let key = known.ok_or_else(|| UrlError::unknown(key))?;
            if values.of(key).is_some() {
                return Err(UrlError::Twice(key));
            }
            values.0.push((key, decoded(value).ok_or(UrlError::Escape)?));
        }
        Ok(values)
    }

    fn of(&self, key: &str) -> Option<&str> {
        let found = self.0.iter().find(|(it, _)| *it == key);
        found.map(|(_, value)| value.as_str())
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
}
