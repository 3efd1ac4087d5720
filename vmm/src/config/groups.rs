//! Limits that several drives share.

use coracle_storage::limit::{RateLimiterConfig, TokenBucketConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A group of drives that share limits: the body of `PUT /rate-limiter-groups/{group_id}` and, with the buckets that
/// are to change, of its PATCH. A drive joins it by its `rate_limiter_group`. (Not in Firecracker.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterGroup {
    /// Names the group.
    pub group_id: String,
    /// Token bucket with bytes as tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Token bucket with operations as tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

impl RateLimiterGroup {
    /// The limits alone.
    pub fn limits(&self) -> RateLimiterConfig {
        RateLimiterConfig {
            bandwidth: self.bandwidth,
            ops: self.ops,
        }
    }
}
