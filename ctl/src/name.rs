//! The name of a machine: what `ps` shows, the monitor's `--id` and the runtime directory.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Firecracker's limit for an id.
pub(crate) const NAME_BYTES_MAX: usize = 64;

/// A name that is also an id in Firecracker's sense: letters, digits and hyphens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name(String);

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a machine's name has 1 to {NAME_BYTES_MAX} letters, digits and hyphens")]
pub(crate) struct NameError;

impl Name {
    /// The text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let allowed = text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        match text.len() {
            1..=NAME_BYTES_MAX if allowed => Ok(Self(text.to_owned())),
            _ => Err(NameError),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_never_leaves_its_directory() {
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for text in ["", ".", "..", "a/b", "a b", "a_b", "a\0", "é", long.as_str()] {
            assert_eq!(text.parse::<Name>(), Err(NameError), "{text:?}");
        }
        assert_eq!(
            "web-1".parse::<Name>().map(|name| name.to_string()),
            Ok("web-1".to_owned())
        );
    }
}
