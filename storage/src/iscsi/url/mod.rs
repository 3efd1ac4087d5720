//! `iscsi://[USER@]HOST[:PORT][,HOST2[:PORT]]/TARGET/LUN[?KEY=VALUE&…]`: everything that is to be known of an image.
//!
//! Secrets stand in files and behind descriptors, never in a URL: those end in argument lists and logs.

mod error;
mod option;

use std::fmt;
use std::str::FromStr;

use super::chap::USER_BYTES_MAX;
use super::name::IscsiName;
use super::pdu::Lun;
use super::portal::Portal;

use crate::escape::{Encoded, decoded, has_needless_escapes};
pub use error::UrlError;
pub use option::{Mutual, UrlOptions};

/// What such a URL begins with.
pub const SCHEME: &str = "iscsi://";
/// Longest URL, in bytes.
pub const URL_BYTES_MAX: usize = 4096;
/// Most portals that are tried in turn.
pub const PORTALS_MAX: usize = 8;

/// A logical unit, the ways to it, and how to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IscsiUrl {
    /// Who logs in, by CHAP.
    pub user: Option<String>,
    /// Where, in turn; at least one.
    pub portals: Vec<Portal>,
    /// Which image it is, wherever it is.
    pub image: ImageName,
    /// The rest.
    pub options: UrlOptions,
}

/// A logical unit of a target. Two URLs with the same one are one image.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImageName {
    /// The target.
    pub target: IscsiName,
    /// Its logical unit.
    pub lun: Lun,
}

impl IscsiUrl {
    /// Whether a path is a URL for this module, right or wrong.
    pub fn is_url(path: &str) -> bool {
        path.get(..SCHEME.len())
            .is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME))
    }
}

impl FromStr for IscsiUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        if text.len() > URL_BYTES_MAX {
            return Err(UrlError::Long);
        }
        if !Self::is_url(text) {
            return Err(UrlError::Scheme);
        }
        let rest = text.get(SCHEME.len()..).ok_or(UrlError::Scheme)?;
        if rest.contains('#') {
            return Err(UrlError::Fragment);
        }
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = place.split_once('/').ok_or(UrlError::Path)?;
        if path.contains('@') {
            // No name has one. It stands behind a password with a slash.
            return Err(UrlError::Password);
        }
        let (user, portals) = match authority.rsplit_once('@') {
            Some((user, portals)) => (Some(user_of(user)?), portals),
            None => (None, authority),
        };
        let portals: Vec<Portal> = portals.split(',').map(str::parse).collect::<Result<_, _>>()?;
        if portals.len() > PORTALS_MAX {
            return Err(UrlError::Portals);
        }
        let (target, lun) = path.rsplit_once('/').ok_or(UrlError::Path)?;
        let target = decoded(target).ok_or(UrlError::Escape)?;
        let image = ImageName {
            target: target.parse()?,
            lun: lun_of(lun).ok_or_else(|| UrlError::Lun(lun.to_owned()))?,
        };
        let options = UrlOptions::parse(query, user.as_deref())?;
        Ok(Self {
            user,
            portals,
            image,
            options,
        })
    }
}

impl fmt::Display for IscsiUrl {
    /// The one text for what it says: names in lower case, no port where it is the usual one, options in their order and
    /// only where they change something.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SCHEME)?;
        if let Some(user) = &self.user {
            write!(f, "{}@", Encoded::name(user))?;
        }
        for (at, portal) in self.portals.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma}{portal}")?;
        }
        write!(f, "/{}{}", self.image, self.options)
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", Encoded::path(self.target.as_str()))?;
        match self.lun.number() {
            Some(number) => write!(f, "{number}"),
            None => write!(f, "{:?}", self.lun),
        }
    }
}

/// The user, where nothing else may stand. What stands there instead is not repeated: it may be a password.
fn user_of(text: &str) -> Result<String, UrlError> {
    // `USER%PASSWORD` is how libiscsi writes it. A user that needs an escape can be told from that, unless the password
    // begins as one that is needed.
    if text.contains(':') || has_needless_escapes(text) {
        return Err(UrlError::Password);
    }
    let user = decoded(text).ok_or(UrlError::Password)?;
    let is_user = (1..=USER_BYTES_MAX).contains(&user.len());
    is_user.then_some(user).ok_or(UrlError::User)
}

/// `text` for a message: as it is if it is a URL of an image or none of this kind, else without the places where a password could
/// be.
pub(crate) fn shown(text: &str) -> String {
    if !IscsiUrl::is_url(text) || text.parse::<IscsiUrl>().is_ok() {
        return text.to_owned();
    }
    let rest = text.get(SCHEME.len()..).unwrap_or_default();
    let (place, query) = rest
        .split_once('?')
        .map_or((rest, None), |(place, query)| (place, Some(query)));
    if query.is_some_and(|query| query.contains('@')) {
        // It is not known where a password ends that has a question mark.
        return format!("{SCHEME}…");
    }
    let place = match place.rsplit_once('@') {
        Some((_, behind)) => format!("…@{behind}"),
        None => place.to_owned(),
    };
    let query = if query.is_some() { "?…" } else { "" };
    format!("{SCHEME}{place}{query}")
}

fn lun_of(digits: &str) -> Option<Lun> {
    let are_digits = digits.bytes().all(|c| c.is_ascii_digit());
    let number: u16 = digits.parse().ok()?;
    are_digits.then(|| Lun::new(number))?
}

#[cfg(test)]
mod tests;
