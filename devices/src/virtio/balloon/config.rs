//! What the API says about the balloon.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Defines the balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// How much memory the guest is to give back, in MiB; at most what it has.
    pub amount_mib: u32,
    /// Whether the guest may take it again before it ends a program for want of memory.
    pub deflate_on_oom: bool,
    /// How often the guest is asked for statistics, in seconds; 0 for never, which cannot be changed once it runs.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest can be asked for all memory that is free (`PATCH /balloon/hinting/start`). A guest that runs short of
    /// memory during such a run may lose what it has written.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest gives back by itself what has been free for some seconds.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// Another size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// How much memory the guest is to give back, in MiB; at most what it has.
    pub amount_mib: u32,
}

/// Another interval between statistics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StatisticsPatch {
    /// Seconds, not 0; the guest is asked at once, and then as often.
    pub stats_polling_interval_s: u16,
}

/// Has the guest tell all memory that is free.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HintingStart {
    /// Whether the guest may use that memory again as soon as it has told all of it, and not only after
    /// `PATCH /balloon/hinting/stop`.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

impl Default for HintingStart {
    fn default() -> Self {
        Self {
            acknowledge_on_stop: true,
        }
    }
}

fn yes() -> bool {
    true
}
