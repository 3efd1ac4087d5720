//! Why a text is no URL of an image.

use super::option::KEYS;
use super::{PORTALS_MAX, SCHEME, URL_BYTES_MAX};
use crate::iscsi::chap::USER_BYTES_MAX;
use crate::iscsi::name::NameError;
use crate::iscsi::pdu::Lun;
use crate::iscsi::portal::PortalError;

/// Why a text is no URL of an image. No error repeats a place where a password could be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Another scheme.
    #[error("a URL of an iSCSI image begins with `{SCHEME}`")]
    Scheme,
    /// Too long.
    #[error("a URL of an iSCSI image has at most {URL_BYTES_MAX} bytes")]
    Long,
    /// A part is missing.
    #[error("a URL of an iSCSI image is {SCHEME}[USER@]HOST[:PORT]/TARGET/LUN: a part of that is missing")]
    Path,
    /// `#`.
    #[error("a URL of an iSCSI image has no `#` (where one is meant, write %23)")]
    Fragment,
    /// A `%` that is none.
    #[error(
        "the URL has a `%` without two hexadecimal digits, or one that hides no text (where `%` is meant, write %25)"
    )]
    Escape,
    /// Nobody, or too many.
    #[error("the user in the URL has no character, or more than {USER_BYTES_MAX} bytes")]
    User,
    /// A password.
    #[error(
        "the URL has a password in it, or a user with a `:` or `%` (write %3A and %25): URLs are seen by others; put the \
         password into a file and name that by `chap_secret_file=PATH`"
    )]
    Password,
    /// A place that is none.
    #[error(transparent)]
    Portal(#[from] PortalError),
    /// Too many places.
    #[error("the URL has more than {PORTALS_MAX} portals")]
    Portals,
    /// A target that is none.
    #[error(transparent)]
    Target(#[from] NameError),
    /// No number.
    #[error("`{0}` is no logical unit: it is a number up to {max}", max = Lun::NUMBER_MAX)]
    Lun(String),
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
    /// Two that say the same.
    #[error("the URL has both `{0}` and `{1}`: leave one out")]
    Both(&'static str, &'static str),
    /// One that means nothing alone.
    #[error("the URL has {has}, and needs {needs} with it")]
    Incomplete {
        /// What there is.
        has: &'static str,
        /// What there is not.
        needs: &'static str,
    },
}
