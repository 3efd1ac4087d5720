//! `--net`: a tap of the host, and what the guest finds behind it.

use std::str::FromStr;

use coracle_vmm::config::{MacAddress, MacError};
use serde_json::{Map, Value};
use thiserror::Error;

/// A network interface as it is written on the command line: `TAP[,OPTION]…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetSpec {
    tap: String,
    id: Option<String>,
    mac: Option<MacAddress>,
    mtu: Option<u16>,
    pairs: Option<u16>,
}

/// Why a text is no network interface.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum NetError {
    #[error("the network interface has no tap: write TAP[,OPTION]…")]
    NoTap,
    #[error(
        "unknown option {0:?} of a network interface: there are id=ID, mac=ADDRESS, mtu=BYTES and pairs=NUMBER"
    )]
    Option(String),
    #[error(transparent)]
    Mac(#[from] MacError),
    #[error("two network interfaces have the id {0}: choose another by id=ID")]
    SameId(String),
}

impl FromStr for NetSpec {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let mut parts = text.split(',');
        let tap = parts
            .next()
            .filter(|tap| !tap.is_empty())
            .ok_or(NetError::NoTap)?;
        let mut net = Self {
            tap: tap.to_owned(),
            id: None,
            mac: None,
            mtu: None,
            pairs: None,
        };
        for option in parts {
            let unknown = || NetError::Option(option.to_owned());
            match option.split_once('=').ok_or_else(unknown)? {
                ("id", id) if !id.is_empty() => net.id = Some(id.to_owned()),
                ("mac", mac) => net.mac = Some(mac.parse()?),
                ("mtu", mtu) => net.mtu = Some(mtu.parse().map_err(|_| unknown())?),
                ("pairs", pairs) => net.pairs = Some(pairs.parse().map_err(|_| unknown())?),
                _ => return Err(unknown()),
            }
        }
        Ok(net)
    }
}

/// The id and the configuration of each network interface.
///
/// # Errors
///
/// When two have the same id.
pub(super) fn configs(nets: &[NetSpec]) -> Result<Vec<(String, Value)>, NetError> {
    let mut configs: Vec<(String, Value)> = Vec::with_capacity(nets.len());
    for (index, net) in nets.iter().enumerate() {
        let id = net.id.clone().unwrap_or_else(|| format!("eth{index}"));
        if configs.iter().any(|(earlier, _)| *earlier == id) {
            return Err(NetError::SameId(id));
        }
        let mut config = Map::new();
        let mut set = |field: &str, value: Value| drop(config.insert(field.to_owned(), value));
        set("iface_id", id.as_str().into());
        set("host_dev_name", net.tap.as_str().into());
        if let Some(mac) = net.mac {
            set("guest_mac", mac.to_string().into());
        }
        if let Some(mtu) = net.mtu {
            set("mtu", mtu.into());
        }
        if let Some(pairs) = net.pairs {
            set("queue_pairs", pairs.into());
        }
        configs.push((id, Value::Object(config)));
    }
    Ok(configs)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(texts: &[&str]) -> Result<Vec<(String, Value)>, NetError> {
        let nets: Result<Vec<NetSpec>, _> = texts.iter().map(|text| text.parse()).collect();
        configs(&nets?)
    }

    #[test]
    fn an_interface_is_a_tap_with_options() {
        let nets = parsed(&["tap0", "tap1,mac=06:00:ac:10:00:02,mtu=9000,id=lan,pairs=2"]).unwrap();
        assert_eq!(
            nets,
            [
                (
                    "eth0".to_owned(),
                    json!({ "iface_id": "eth0", "host_dev_name": "tap0" })
                ),
                (
                    "lan".to_owned(),
                    json!({
                        "iface_id": "lan", "host_dev_name": "tap1", "guest_mac": "06:00:ac:10:00:02", "mtu": 9000,
                        "queue_pairs": 2
                    })
                ),
            ]
        );
    }

    #[test]
    fn what_is_none_is_an_error_that_says_what_there_is() {
        for (text, words) in [
            ("", "no tap"),
            (",id=a", "no tap"),
            ("tap0,fast", "there are id=ID"),
            ("tap0,mtu=x", "there are id=ID"),
            ("tap0,pairs=-1", "pairs=NUMBER"),
            ("tap0,mac=1", "MAC address"),
        ] {
            let error = parsed(&[text]).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert_eq!(
            parsed(&["a,id=x", "b,id=x"]),
            Err(NetError::SameId("x".to_owned()))
        );
    }
}
