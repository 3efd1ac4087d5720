//! Where a target listens: a host and a port (RFC 7143, 13.8).

use std::fmt;
use std::str::FromStr;

pub use crate::host::Host;
use crate::host::host_and_port;

/// The port of iSCSI, where none is said.
pub const PORT: u16 = 3260;

/// A host and a port. Whether the name is one of a host shows when it is resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Portal {
    /// By address or by name.
    pub host: Host,
    /// Of TCP.
    pub port: u16,
}

/// Why a text is no portal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no portal: it is HOST or HOST:PORT, where an IPv6 address stands in [ ]")]
pub struct PortalError(String);

impl PortalError {
    /// As much of a text as is worth showing. It may be a target's, and then anything.
    fn of(text: &str) -> Self {
        const SHOWN_MAX: usize = 64;
        Self(
            text.chars()
                .take(SHOWN_MAX)
                .flat_map(char::escape_debug)
                .collect(),
        )
    }
}

impl FromStr for Portal {
    type Err = PortalError;

    fn from_str(text: &str) -> Result<Self, PortalError> {
        parse(text).ok_or_else(|| PortalError::of(text))
    }
}

impl fmt::Display for Portal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.host)?;
        if self.port != PORT {
            write!(f, ":{}", self.port)?;
        }
        Ok(())
    }
}

/// A portal as a target tells of it (`TargetAddress`): with the number of its group, if it says one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetAddress {
    /// Where.
    pub portal: Portal,
    /// Portals of one group are one to a session.
    pub portal_group: Option<u16>,
}

impl FromStr for TargetAddress {
    type Err = PortalError;

    fn from_str(text: &str) -> Result<Self, PortalError> {
        let (portal, group) = match text.split_once(',') {
            Some((portal, group)) => (portal, Some(group)),
            None => (text, None),
        };
        let wrong = || PortalError::of(text);
        Ok(Self {
            portal: parse(portal).ok_or_else(wrong)?,
            portal_group: group
                .map(|group| group.parse().map_err(|_| wrong()))
                .transpose()?,
        })
    }
}

fn parse(text: &str) -> Option<Portal> {
    let (host, port) = host_and_port(text)?;
    let port = port.unwrap_or(PORT);
    Some(Portal { host, port })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::*;

    #[test]
    fn a_portal_is_read_as_it_is_written() {
        for (text, canonical) in [
            ("10.0.0.1", "10.0.0.1"),
            ("10.0.0.1:3260", "10.0.0.1"),
            ("10.0.0.1:860", "10.0.0.1:860"),
            ("[2001:DB8::1]", "[2001:db8::1]"),
            ("[::1]:3261", "[::1]:3261"),
            ("Storage-1.example.org:3260", "storage-1.example.org"),
        ] {
            let portal: Portal = text.parse().unwrap();
            assert_eq!(portal.to_string(), canonical);
            assert_eq!(canonical.parse(), Ok(portal));
        }
    }

    #[test]
    fn a_target_tells_of_a_portal_with_its_group() {
        let address: TargetAddress = "[2001:db8::1]:3261,7".parse().unwrap();
        assert_eq!(address.portal.to_string(), "[2001:db8::1]:3261");
        assert_eq!(address.portal_group, Some(7));
        let address: TargetAddress = "10.0.0.1".parse().unwrap();
        assert_eq!(address.portal_group, None);
        assert!("10.0.0.1,65536".parse::<TargetAddress>().is_err());
    }

    #[test]
    fn what_is_no_portal_is_refused() {
        for text in [
            "",
            ":3260",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "::1",
            "[::1",
            "[::1]3260",
            "[10.0.0.1]",
            "a b",
            "-a",
            "a/b",
        ] {
            assert_eq!(text.parse::<Portal>(), Err(PortalError(text.to_owned())));
        }
    }

    #[test]
    fn an_error_shows_no_more_of_a_portal_than_a_line_takes() {
        let error = format!("\x1b\n{}", "é".repeat(1000)).parse::<TargetAddress>();
        let text = error.unwrap_err().to_string();
        assert!(
            text.chars().count() < 200 && !text.contains(char::is_control),
            "{text}"
        );
    }
}
