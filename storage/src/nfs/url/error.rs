//! Why a text is no URL of an image.

use super::option::KEYS;
use super::{COMPONENTS_MAX, SCHEME, URL_BYTES_MAX};
use crate::nfs::v4::Name;

/// Why a text is no URL of an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Another scheme.
    #[error("a URL of an NFS image begins with `{SCHEME}`")]
    Scheme,
    /// Too long.
    #[error("a URL of an NFS image has at most {URL_BYTES_MAX} bytes")]
    Long,
    /// A part is missing.
    #[error("a URL of an NFS image is {SCHEME}HOST[:PORT]/EXPORT/PATH/IMAGE: a part of that is missing")]
    Path,
    /// `#`.
    #[error("a URL of an NFS image has no `#` (where one is meant, write %23)")]
    Fragment,
    /// A `%` that is none.
    #[error(
        "the URL has a `%` without two hexadecimal digits, or one that hides no text (where `%` is meant, write %25)"
    )]
    Escape,
    /// Something before the host.
    #[error(
        "the URL has something before `@`: NFS has no passwords; who reads and writes is said by `uid=` and `gid=`"
    )]
    User,
    /// A host that is none.
    #[error("`{0}` is no server: it is HOST or HOST:PORT, where an IPv6 address stands in [ ]")]
    Host(String),
    /// A component that is none.
    #[error(
        "the path in the URL has a part that is empty, `.`, `..` or longer than {max} bytes, or has a `/` or a zero byte",
        max = Name::BYTES_MAX
    )]
    Component,
    /// Too many components.
    #[error("the path in the URL has more than {COMPONENTS_MAX} parts")]
    Deep,
    /// An option that there is not.
    #[error("the URL has the unknown option `{0}`: there are {known}", known = KEYS.join(", "))]
    UnknownOption(String),
    /// An option with a value that it cannot have.
    #[error("the option `{key}` of the URL has a value that it cannot have: it is {expected}")]
    Value {
        /// Which one.
        key: &'static str,
        /// What it could be.
        expected: &'static str,
    },
    /// An option more than once.
    #[error("the URL has the option `{0}` more than once")]
    Twice(&'static str),
    /// An option that means nothing to the version.
    #[error("the URL has `mountport`, which means something to NFSv3 only: add `version=3`")]
    MountPort,
}

impl UrlError {
    /// As much of what stands for a host as is worth showing.
    pub(super) fn host(text: &str) -> Self {
        Self::Host(shown(text))
    }

    /// As much of a key as is worth showing. What stands behind a `=` is no part of it.
    pub(super) fn unknown(key: &str) -> Self {
        Self::UnknownOption(shown(key))
    }
}

fn shown(text: &str) -> String {
    const SHOWN_MAX: usize = 64;
    text.chars()
        .take(SHOWN_MAX)
        .flat_map(char::escape_debug)
        .collect()
}
