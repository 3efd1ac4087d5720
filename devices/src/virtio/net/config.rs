//! A network interface as the API has it.

use std::fmt;
use std::str::FromStr;

use coracle_storage::limit::RateLimiterConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::tap::{AND, HANDED_IN};

/// The smallest MTU of a network that carries IPv4 (RFC 791).
pub const MTU_MIN: u16 = 68;
/// Pairs of queues of one interface.
pub const QUEUE_PAIRS_MAX: u16 = 8;

/// A network interface of the guest, and the tap of the host that it is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceConfig {
    /// What the interface is called.
    pub iface_id: String,
    /// The tap on the host, or the descriptor of one that was handed in, as `/dev/fd/7`; one for each pair of queues, as
    /// `/dev/fd/7,/dev/fd/8`.
    pub host_dev_name: String,
    /// The guest's address; without, the guest chooses one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<MacAddress>,
    /// Largest packet that the guest is told to send, from 68 to 65535; without, the guest's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 68))]
    pub mtu: Option<u16>,
    /// Pairs of queues, of which the guest uses as many as it has processors: 1 to 8; without, 1. For more than one the tap has
    /// to be `multi_queue`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 8))]
    pub queue_pairs: Option<u16>,
    /// Limits of what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// Limits of what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}

impl NetworkInterfaceConfig {
    /// How many pairs of queues it has.
    pub fn pairs(&self) -> u16 {
        self.queue_pairs.unwrap_or(1)
    }

    /// The taps, or descriptors of one, that it is connected to.
    pub fn taps(&self) -> impl Iterator<Item = &str> {
        let name = self.host_dev_name.as_str();
        // The name of a tap may have a comma.
        let is_list = name.starts_with(HANDED_IN);
        name.split(move |character| is_list && character == AND)
    }
}

/// New limits of a network interface; buckets that are left out stay as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PartialNetworkInterface {
    /// What the interface is called.
    pub iface_id: String,
    /// Limits of what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// Limits of what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}

/// An Ethernet address, written as six pairs of hexadecimal digits with colons between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// Its bytes, as they are sent.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let wrong = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            // A sign would be taken for a number's.
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(wrong()),
        }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// It is no Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no MAC address; write one as 06:00:ac:10:00:02")]
pub struct MacError(String);
