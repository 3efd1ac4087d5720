//! The rules of network interfaces.

use coracle_devices::virtio::net::{
    MTU_MIN, MacAddress, NetworkInterfaceConfig, PartialNetworkInterface, QUEUE_PAIRS_MAX, TapError,
};
use coracle_storage::limit::RateLimiterConfig;

use super::{Config, ConfigError, MmdsConfig, NETWORKS_MAX, NetworkOverride, check_device_id};

/// Why a network interface is refused.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum NetworkError {
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("The MAC address is already in use: {0} is that of interface `{1}`")]
    MacInUse(MacAddress, String),
    #[error("tap `{0}` is that of interface `{1}`: give each interface its own")]
    TapInUse(String, String),
    #[error("an mtu of {0} is too small for IP: {MTU_MIN} to 65535")]
    Mtu(u16),
    #[error(
        "network interface `{id}` asks for {pairs} pairs of queues: `queue_pairs` is 1 to {QUEUE_PAIRS_MAX}"
    )]
    QueuePairs { id: String, pairs: u16 },
    #[error("there are {NETWORKS_MAX} network interfaces, and no machine can have more")]
    TooMany,
    #[error("there is no network interface `{0}`; GET /vm/config lists them")]
    NoSuch(String),
    #[error("network interface `{0}` is named twice: say all of it in one")]
    Twice(String),
    #[error(
        "there is a network interface `{0}`: PATCH /network-interfaces/{0} changes its limits, and DELETE takes it out"
    )]
    There(String),
    #[error(
        "the guest asks for its metadata by network interface `{0}`, which stays as long as the machine is there"
    )]
    HasMetadata(String),
}

impl Config {
    /// Adds a network interface, or replaces the one of the same name.
    ///
    /// # Errors
    ///
    /// The rule that `network` breaks; then nothing has changed.
    pub fn insert_network(&mut self, network: NetworkInterfaceConfig) -> Result<(), ConfigError> {
        check_device_id(&network.iface_id)?;
        if let Some(mtu) = network.mtu.filter(|mtu| *mtu < MTU_MIN) {
            return Err(NetworkError::Mtu(mtu).into());
        }
        if !(1..=QUEUE_PAIRS_MAX).contains(&network.pairs()) {
            let (id, pairs) = (network.iface_id.clone(), network.pairs());
            return Err(NetworkError::QueuePairs { id, pairs }.into());
        }
        let others = || {
            self.networks
                .iter()
                .filter(|other| other.iface_id != network.iface_id)
        };
        if others().count() == NETWORKS_MAX {
            return Err(NetworkError::TooMany.into());
        }
        if let Some(error) = others().find_map(|other| shares_tap(&network, other)) {
            return Err(error.into());
        }
        if let Some(mac) = network.guest_mac
            && let Some(other) = others().find(|other| other.guest_mac == Some(mac))
        {
            return Err(NetworkError::MacInUse(mac, other.iface_id.clone()).into());
        }
        match self.network_mut(&network.iface_id) {
            Ok(there) => *there = network,
            Err(_) => self.networks.push(network),
        }
        Ok(())
    }

    /// Adds a network interface to a machine whose guest runs.
    ///
    /// # Errors
    ///
    /// There is one of that name, or a rule that it breaks; then nothing has changed.
    pub fn plug_network(&mut self, network: NetworkInterfaceConfig) -> Result<(), ConfigError> {
        if self.network_mut(&network.iface_id).is_ok() {
            return Err(NetworkError::There(network.iface_id).into());
        }
        self.insert_network(network)
    }

    /// Removes a network interface from a machine whose guest runs.
    ///
    /// # Errors
    ///
    /// There is none of that name, or the guest has its metadata by it; then nothing has changed.
    pub fn unplug_network(&mut self, id: &str) -> Result<(), ConfigError> {
        self.network_mut(id)?;
        let has_metadata = |mmds: &MmdsConfig| mmds.network_interfaces.iter().any(|other| other == id);
        if self.mmds().is_some_and(has_metadata) {
            return Err(NetworkError::HasMetadata(id.to_owned()).into());
        }
        self.networks.retain(|network| network.iface_id != id);
        Ok(())
    }

    /// Changes the limits that `patch` names of a network interface.
    ///
    /// # Errors
    ///
    /// There is no such interface; then nothing has changed.
    pub fn patch_network(&mut self, patch: &PartialNetworkInterface) -> Result<(), ConfigError> {
        let network = self.network_mut(&patch.iface_id)?;
        for (limits, changed) in [
            (&mut network.rx_rate_limiter, patch.rx_rate_limiter),
            (&mut network.tx_rate_limiter, patch.tx_rate_limiter),
        ] {
            if let Some(RateLimiterConfig { bandwidth, ops }) = changed {
                let kept = limits.get_or_insert_default();
                kept.bandwidth = bandwidth.or(kept.bandwidth);
                kept.ops = ops.or(kept.ops);
            }
        }
        Ok(())
    }

    /// Has network interfaces be on other taps, each at most once.
    ///
    /// # Errors
    ///
    /// What does not fit the interfaces that there are.
    pub fn override_networks(&mut self, overrides: &[NetworkOverride]) -> Result<(), NetworkError> {
        for (number, given) in overrides.iter().enumerate() {
            if overrides
                .iter()
                .take(number)
                .any(|other| other.iface_id == given.iface_id)
            {
                return Err(NetworkError::Twice(given.iface_id.clone()));
            }
            self.network_mut(&given.iface_id)?
                .host_dev_name
                .clone_from(&given.host_dev_name);
        }
        for (number, network) in self.networks.iter().enumerate() {
            let mut others = self.networks.iter().skip(number + 1);
            if let Some(error) = others.find_map(|other| shares_tap(network, other)) {
                return Err(error);
            }
        }
        Ok(())
    }

    fn network_mut(&mut self, id: &str) -> Result<&mut NetworkInterfaceConfig, NetworkError> {
        let found = self.networks.iter_mut().find(|network| network.iface_id == id);
        found.ok_or_else(|| NetworkError::NoSuch(id.to_owned()))
    }
}

/// What is wrong with an interface that has a tap of another.
fn shares_tap(network: &NetworkInterfaceConfig, other: &NetworkInterfaceConfig) -> Option<NetworkError> {
    let tap = network
        .taps()
        .find(|tap| other.taps().any(|other| other == *tap))?;
    Some(NetworkError::TapInUse(tap.to_owned(), other.iface_id.clone()))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn network(json: &str) -> NetworkInterfaceConfig {
        serde_json::from_str(json).unwrap()
    }

    fn eth0() -> NetworkInterfaceConfig {
        network(
            r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02", "mtu": 1400}"#,
        )
    }

    fn only(config: &Config) -> &NetworkInterfaceConfig {
        config.networks().first().unwrap()
    }

    #[test]
    fn an_interface_is_replaced_by_its_name_and_shares_nothing() {
        let mut config = Config::default();
        config.insert_network(eth0()).unwrap();
        config.insert_network(eth0()).unwrap();
        assert_eq!(config.networks(), [eth0()]);
        for (wrong, words) in [
            (
                r#"{"iface_id": "eth1", "host_dev_name": "tap0"}"#,
                "`eth0`: give each",
            ),
            (
                r#"{"iface_id": "eth1", "host_dev_name": "tap1", "guest_mac": "06:00:AC:10:00:02"}"#,
                "already in use",
            ),
            (
                r#"{"iface_id": "eth1", "host_dev_name": "tap1", "mtu": 67}"#,
                "too small",
            ),
            (r#"{"iface_id": "", "host_dev_name": "tap1"}"#, ""),
        ] {
            let error = config.insert_network(network(wrong)).unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string);
            let said = source.unwrap_or_else(|| error.to_string());
            assert!(said.contains(words), "{said}");
        }
        assert_eq!(config.networks(), [eth0()]);
        assert_eq!(config.virtio_devices(), 1);
    }

    #[test]
    fn a_patch_changes_the_buckets_that_it_names() {
        let mut config = Config::default();
        config.insert_network(eth0()).unwrap();
        let patch = |json| serde_json::from_str::<PartialNetworkInterface>(json).unwrap();
        let ops = r#"{"iface_id": "eth0", "rx_rate_limiter": {"ops": {"size": 5, "refill_time": 100}}}"#;
        config.patch_network(&patch(ops)).unwrap();
        let bandwidth =
            r#"{"iface_id": "eth0", "rx_rate_limiter": {"bandwidth": {"size": 7, "refill_time": 100}}}"#;
        config.patch_network(&patch(bandwidth)).unwrap();
        let limits = only(&config).rx_rate_limiter.unwrap();
        assert_eq!(limits.ops.map(|bucket| bucket.size), Some(5));
        assert_eq!(limits.bandwidth.map(|bucket| bucket.size), Some(7));
        assert_eq!(only(&config).tx_rate_limiter, None);
        assert!(config.patch_network(&patch(r#"{"iface_id": "eth1"}"#)).is_err());
    }

    #[test]
    fn an_override_is_of_an_interface_that_there_is() {
        let mut config = Config::default();
        config.insert_network(eth0()).unwrap();
        let given = |id: &str| NetworkOverride {
            iface_id: id.to_owned(),
            host_dev_name: "tap9".to_owned(),
        };
        config.override_networks(&[given("eth0")]).unwrap();
        assert_eq!(only(&config).host_dev_name, "tap9");
        assert!(config.override_networks(&[given("eth1")]).is_err());
        assert!(config.override_networks(&[given("eth0"), given("eth0")]).is_err());
        let eth1 = network(r#"{"iface_id": "eth1", "host_dev_name": "tap1"}"#);
        config.insert_network(eth1).unwrap();
        assert!(config.override_networks(&[given("eth1")]).is_err());
    }
}
