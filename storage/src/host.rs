//! The host of a URL, by address or by name (RFC 3986, 3.2.2).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Longest name of a host, in bytes (RFC 1035, 2.3.4).
const HOST_BYTES_MAX: usize = 253;

/// A host. Whether the name is one of a host shows when it is resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is what its name says")]
pub enum Host {
    V4(Ipv4Addr),
    V6(Ipv6Addr),
    /// In lower case.
    Name(String),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(address) => write!(f, "{address}"),
            Self::V6(address) => write!(f, "[{address}]"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Reads `HOST` or `HOST:PORT`, where an IPv6 address stands in `[ ]`.
pub(crate) fn host_and_port(text: &str) -> Option<(Host, Option<u16>)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) = rest.split_once(']')?;
            let port = if rest.is_empty() {
                None
            } else {
                Some(rest.strip_prefix(':')?)
            };
            (Host::V6(address.parse().ok()?), port)
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host_of(host)?, Some(port)),
            None => (host_of(text)?, None),
        },
    };
    match port {
        Some(digits) => Some((host, Some(port_of(digits)?))),
        None => Some((host, None)),
    }
}

fn host_of(text: &str) -> Option<Host> {
    if let Ok(address) = text.parse() {
        return Some(Host::V4(address));
    }
    let is_of_a_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let is_name = (1..=HOST_BYTES_MAX).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(is_of_a_name);
    is_name.then(|| Host::Name(text.to_ascii_lowercase()))
}

/// The number of a port of TCP.
pub(crate) fn port_of(digits: &str) -> Option<u16> {
    let are_digits = digits.bytes().all(|c| c.is_ascii_digit());
    let port: u16 = digits.parse().ok()?;
    (are_digits && port != 0).then_some(port)
}
