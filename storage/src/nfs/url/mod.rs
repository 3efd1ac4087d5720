//! `nfs://HOST[:PORT]/EXPORT/PATH/IMAGE[?KEY=VALUE&…]`: everything that is to be known of an image.
//!
//! Where the export ends and the path in it begins is not said: NFSv4 has one tree, and a server of NFSv3 is asked for its
//! exports.

mod error;
mod option;

use std::fmt;
use std::str::FromStr;

use super::v4::Name;
use crate::escape::{Encoded, decoded};
use crate::host::host_and_port;

pub use crate::host::Host;
pub use error::UrlError;
pub use option::{UrlOptions, Version};

/// What such a URL begins with.
pub const SCHEME: &str = "nfs://";
/// The port of NFSv4 (RFC 8881, 2.9.3).
pub const PORT: u16 = 2049;
/// Longest URL, in bytes.
pub const URL_BYTES_MAX: usize = 4096;
/// Most directories and files of a path.
pub const COMPONENTS_MAX: usize = 64;

/// A file on a server, and how to go there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NfsUrl {
    /// Which image it is.
    pub image: ImageName,
    /// How to go there.
    pub options: UrlOptions,
}

/// A file on a server. Two URLs with the same one are one image.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImageName {
    /// The server.
    pub host: Host,
    /// Its port; `None`: where NFS usually is, which for NFSv3 the server is asked.
    pub port: Option<u16>,
    /// The directories from the root on, and the file.
    pub path: Path,
}

/// The components of a path; at least one.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Path(Vec<Name>);

impl Path {
    /// A path of those components. `None` if there are none, or more than [`COMPONENTS_MAX`].
    pub fn new(components: Vec<Name>) -> Option<Self> {
        (1..=COMPONENTS_MAX)
            .contains(&components.len())
            .then_some(Self(components))
    }

    /// All components, from the root on.
    pub fn components(&self) -> &[Name] {
        &self.0
    }

    /// The file, and the directories before it.
    pub fn file_and_directories(&self) -> (&Name, &[Name]) {
        self.0.split_last().expect("a path has a component")
    }

    /// The path of another file in the same directory.
    #[must_use]
    pub fn beside(&self, file: Name) -> Self {
        let (_, directories) = self.file_and_directories();
        Self(directories.iter().cloned().chain([file]).collect())
    }
}

impl fmt::Display for Path {
    /// As a file system would write it, for messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|name| write!(f, "/{name}"))
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Path({self})")
    }
}

impl NfsUrl {
    /// Whether a path is a URL for this module, right or wrong.
    pub fn is_url(path: &str) -> bool {
        path.get(..SCHEME.len())
            .is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME))
    }
}

impl FromStr for NfsUrl {
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
        if authority.contains('@') {
            return Err(UrlError::User);
        }
        let (host, port) = host_and_port(authority).ok_or_else(|| UrlError::host(authority))?;
        let options = UrlOptions::parse(query)?;
        // A server of NFSv3 is asked where it is, unless that is said.
        let is_usual = port == Some(PORT) && options.version != Some(Version::V3);
        Ok(Self {
            image: ImageName {
                host,
                port: port.filter(|_| !is_usual),
                path: path_of(path)?,
            },
            options,
        })
    }
}

impl fmt::Display for NfsUrl {
    /// The one text for what it says: names in lower case, no port where it is the usual one, options in their order and
    /// only where they change something.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.image, self.options)
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.host)?;
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        for name in self.path.components() {
            // It was text when it was read.
            write!(f, "/{}", Encoded::path(&String::from_utf8_lossy(name.bytes())))?;
        }
        Ok(())
    }
}

fn path_of(text: &str) -> Result<Path, UrlError> {
    let mut components = Vec::new();
    for component in text.split('/') {
        let name = decoded(component).ok_or(UrlError::Escape)?;
        components.push(Name::new(name).ok_or(UrlError::Component)?);
    }
    Path::new(components).ok_or(UrlError::Deep)
}

#[cfg(test)]
mod tests;
