//! `--hotplug-memory`: memory that may come while the guest runs.

use std::str::FromStr;

use serde_json::{Value, json};
use thiserror::Error;

use super::memory::MemoryMib;

/// Such memory as it is written on the command line: `SIZE[,OPTION]…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HotplugSpec {
    total_mib: u64,
    block_mib: Option<u64>,
    slot_mib: Option<u64>,
}

/// Why a text is none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum HotplugError {
    #[error("{0:?} is no size of memory: write something like 1G")]
    Size(String),
    #[error("unknown option {0:?} of memory that comes: there are block=SIZE and slot=SIZE")]
    Option(String),
}

impl FromStr for HotplugSpec {
    type Err = HotplugError;

    fn from_str(text: &str) -> Result<Self, HotplugError> {
        let size = |text: &str| -> Result<u64, HotplugError> {
            let size: Result<MemoryMib, _> = text.parse();
            Ok(size.map_err(|_| HotplugError::Size(text.to_owned()))?.0)
        };
        let mut parts = text.split(',');
        let mut hotplug = Self {
            total_mib: size(parts.next().unwrap_or_default())?,
            block_mib: None,
            slot_mib: None,
        };
        for option in parts {
            match option.split_once('=') {
                Some(("block", text)) => hotplug.block_mib = Some(size(text)?),
                Some(("slot", text)) => hotplug.slot_mib = Some(size(text)?),
                _ => return Err(HotplugError::Option(option.to_owned())),
            }
        }
        Ok(hotplug)
    }
}

/// The configuration of the device.
pub(super) fn config(hotplug: &HotplugSpec) -> Value {
    let mut config = json!({ "total_size_mib": hotplug.total_mib });
    let sizes = [
        ("block_size_mib", hotplug.block_mib),
        ("slot_size_mib", hotplug.slot_mib),
    ];
    for (name, mib) in sizes {
        if let (Some(mib), Some(object)) = (mib, config.as_object_mut()) {
            object.insert(name.to_owned(), json!(mib));
        }
    }
    config
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn memory_that_comes_is_a_size_and_options() {
        let config = |text: &str| config(&text.parse().unwrap());
        assert_eq!(config("1G"), json!({ "total_size_mib": 1024 }));
        let all = json!({ "total_size_mib": 2048, "block_size_mib": 4, "slot_size_mib": 256 });
        assert_eq!(config("2G,slot=256M,block=4"), all);
        let refused = |text: &str| text.parse::<HotplugSpec>().unwrap_err().to_string();
        assert!(refused("0").contains("1G"));
        assert!(refused("1G,blocks=4").contains("block=SIZE"));
        assert!(refused("1G,block=x").contains("is no size"));
    }
}
