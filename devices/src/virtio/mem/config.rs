//! What the API says about memory that comes and goes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Defines the memory that may come while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugConfig {
    /// How much may be plugged in all, in MiB; a multiple of `slot_size_mib`.
    pub total_size_mib: u32,
    /// How much is plugged and unplugged at a time, in MiB; a power of two, at least 2.
    #[serde(default = "default_block_size_mib")]
    #[schemars(range(min = 2))]
    pub block_size_mib: u32,
    /// How much the guest's processors reach, or do not reach, as a whole, in MiB: all of it while one block of it is plugged. A
    /// multiple of `block_size_mib`, at least 128.
    #[serde(default = "default_slot_size_mib")]
    #[schemars(range(min = 128))]
    pub slot_size_mib: u32,
}

/// Another amount of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugSizeUpdate {
    /// How much the guest is to have plugged, in MiB; a multiple of `block_size_mib`, at most `total_size_mib`.
    pub requested_size_mib: u32,
}

/// How much memory has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct MemoryHotplugStatus {
    /// How much may be plugged in all, in MiB.
    pub total_size_mib: u32,
    /// How much is plugged and unplugged at a time, in MiB.
    pub block_size_mib: u32,
    /// How much the guest's processors reach, or do not reach, as a whole, in MiB.
    pub slot_size_mib: u32,
    /// How much the guest has plugged, in MiB.
    pub plugged_size_mib: u64,
    /// How much it is to have plugged, in MiB.
    pub requested_size_mib: u64,
}

fn default_block_size_mib() -> u32 {
    2
}

fn default_slot_size_mib() -> u32 {
    128
}
