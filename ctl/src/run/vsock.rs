//! `--vsock`: the socket by which programs of the host and of the guest reach each other.

use std::str::FromStr;

use serde_json::{Value, json};
use thiserror::Error;

/// The guest's address, if none is given: nobody but the guest sees it.
const DEFAULT_CID: u32 = 3;

/// A socket device as it is written on the command line: `PATH[,cid=N]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VsockSpec {
    path: String,
    cid: u32,
}

/// Why a text is no socket device.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum VsockError {
    #[error("the vsock device has no path for its socket: write PATH[,cid=N]")]
    NoPath,
    #[error("unknown option {0:?} of the vsock device: there is cid=N, from 3 to 4294967294")]
    Option(String),
}

impl FromStr for VsockSpec {
    type Err = VsockError;

    fn from_str(text: &str) -> Result<Self, VsockError> {
        let mut parts = text.split(',');
        let path = parts.next().filter(|path| !path.is_empty());
        let mut vsock = Self {
            path: path.ok_or(VsockError::NoPath)?.to_owned(),
            cid: DEFAULT_CID,
        };
        for option in parts {
            let cid = option.strip_prefix("cid=").and_then(|cid| cid.parse().ok());
            vsock.cid = cid.ok_or_else(|| VsockError::Option(option.to_owned()))?;
        }
        Ok(vsock)
    }
}

/// The configuration of the device.
pub(super) fn config(vsock: &VsockSpec) -> Value {
    json!({ "guest_cid": vsock.cid, "uds_path": vsock.path })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_path_and_perhaps_an_address() {
        for (text, cid) in [("/run/v", 3), ("/run/v,cid=52", 52)] {
            let config = config(&text.parse().unwrap());
            assert_eq!(config, json!({ "guest_cid": cid, "uds_path": "/run/v" }));
        }
    }

    #[test]
    fn what_is_none_is_an_error_that_says_what_there_is() {
        for (text, words) in [
            ("", "no path"),
            (",cid=4", "no path"),
            ("v,cid=", "there is cid=N"),
            ("v,cid=4294967296", "there is cid=N"),
            ("v,port=1", "there is cid=N"),
        ] {
            let error = text.parse::<VsockSpec>().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
