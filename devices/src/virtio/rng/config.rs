//! What the API says about the entropy device.

use coracle_storage::limit::RateLimiterConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Defines an entropy device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EntropyConfig {
    /// Limits on the bytes and requests that the guest gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiterConfig>,
}
