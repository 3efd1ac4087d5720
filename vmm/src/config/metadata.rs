//! The rules of the metadata service.

use std::fs::File;
use std::io::{self, Read as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use coracle_devices::mmds::MmdsVersion;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Config, ConfigError};

/// Where guests look for it unless told otherwise.
const ADDRESS_DEFAULT: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// How a guest may ask for its metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// Whether a token is needed.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The network interfaces by which it may ask.
    pub network_interfaces: Vec<String>,
    /// Where it asks: an address of 169.254.1.0 to 169.254.254.255 (RFC 3927).
    #[serde(default = "address_default")]
    pub ipv4_address: Ipv4Addr,
    /// Answers as EC2 does, whatever a request accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

fn address_default() -> Ipv4Addr {
    ADDRESS_DEFAULT
}

/// What a guest may ask for: any JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MmdsContents(pub Value);

/// Why the metadata service is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum MetadataError {
    #[error("network_interfaces is empty: name at least one by which the guest may ask")]
    NoInterface,
    #[error("network_interfaces names `{0}`, and there is no such network interface: add it first")]
    NoSuch(String),
    #[error("ipv4_address {0} is not link-local: choose one of 169.254.1.0 to 169.254.254.255")]
    Address(Ipv4Addr),
}

/// Why a file has no metadata.
#[derive(Debug, thiserror::Error)]
pub enum ContentsError {
    /// It cannot be read.
    #[error("cannot read the metadata in `{}`; check the path and its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Or is no JSON.
    #[error("the metadata in `{}` is no JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where, and what was expected there.
        #[source]
        source: serde_json::Error,
    },
    /// Or has too much.
    #[error("the metadata in `{}` has more than {bytes_max} bytes: store less, or raise --mmds-size-limit", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// What it may have.
        bytes_max: usize,
    },
}

/// The metadata in a file, which may have so many bytes.
///
/// # Errors
///
/// That it has none.
pub fn read_metadata(path: &Path, bytes_max: usize) -> Result<Value, ContentsError> {
    let path = || path.to_owned();
    let mut text = Vec::new();
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
    let read = File::open(path()).and_then(|file| file.take(limit).read_to_end(&mut text));
    read.map_err(|source| ContentsError::Read { path: path(), source })?;
    if text.len() > bytes_max {
        return Err(ContentsError::TooLong {
            path: path(),
            bytes_max,
        });
    }
    serde_json::from_slice(&text).map_err(|source| ContentsError::Json { path: path(), source })
}

impl Config {
    /// How the guest may ask for its metadata, if it may.
    pub fn mmds(&self) -> Option<&MmdsConfig> {
        self.mmds.as_ref()
    }

    /// Lets the guest ask for its metadata so.
    ///
    /// # Errors
    ///
    /// The rule that `mmds` breaks; then nothing has changed.
    pub fn set_mmds(&mut self, mut mmds: MmdsConfig) -> Result<(), ConfigError> {
        let [a, b, c, _] = mmds.ipv4_address.octets();
        if (a, b) != (169, 254) || !(1..=254).contains(&c) {
            return Err(MetadataError::Address(mmds.ipv4_address).into());
        }
        if mmds.network_interfaces.is_empty() {
            return Err(MetadataError::NoInterface.into());
        }
        let is_there = |id: &String| self.networks.iter().any(|network| network.iface_id == *id);
        if let Some(id) = mmds.network_interfaces.iter().find(|id| !is_there(id)) {
            return Err(MetadataError::NoSuch(id.clone()).into());
        }
        mmds.network_interfaces.sort();
        mmds.network_interfaces.dedup();
        self.mmds = Some(mmds);
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn mmds(json: &str) -> MmdsConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn it_is_asked_by_interfaces_that_there_are_at_a_link_local_address() {
        let mut config = Config::default();
        let network = r#"{"iface_id": "eth0", "host_dev_name": "tap0"}"#;
        config
            .insert_network(serde_json::from_str(network).unwrap())
            .unwrap();
        for (wrong, expected) in [
            (r#"{"network_interfaces": []}"#, MetadataError::NoInterface),
            (
                r#"{"network_interfaces": ["eth0", "eth1"]}"#,
                MetadataError::NoSuch("eth1".to_owned()),
            ),
            (
                r#"{"network_interfaces": ["eth0"], "ipv4_address": "169.254.0.1"}"#,
                MetadataError::Address(Ipv4Addr::new(169, 254, 0, 1)),
            ),
        ] {
            let refused = config.set_mmds(mmds(wrong));
            assert!(
                matches!(&refused, Err(ConfigError::Metadata(error)) if *error == expected),
                "{refused:?}"
            );
        }
        assert_eq!(config.mmds(), None);
        config
            .set_mmds(mmds(r#"{"network_interfaces": ["eth0", "eth0"]}"#))
            .unwrap();
        let set = config.mmds().unwrap();
        assert_eq!(
            (set.ipv4_address, set.network_interfaces.as_slice(), set.version),
            (ADDRESS_DEFAULT, ["eth0".to_owned()].as_slice(), MmdsVersion::V1)
        );
    }
}
