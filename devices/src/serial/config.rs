//! What the API says about the serial port.

use std::path::PathBuf;

use coracle_storage::limit::TokenBucketConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The configuration of the serial device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// Path to a file or named pipe on the host to which serial output is written; without it, the standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// Token bucket with bytes as tokens: what the guest writes beyond it is dropped and counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucketConfig>,
}
