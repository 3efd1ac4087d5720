//! A socket device as the API has it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The smallest CID of a guest: those before are reserved, 2 for the host.
pub const CID_MIN: u32 = 3;
/// The largest: the next one means any.
pub const CID_MAX: u32 = u32::MAX - 1;

/// The socket device of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Deprecated: there is one such device, and it needs no name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// The guest's address, from 3 to 4294967294. Nobody else sees it: two machines may have the same.
    #[schemars(range(min = 3, max = 4_294_967_294_u32))]
    pub guest_cid: u32,
    /// Where programs of the host connect to, to reach the guest: a socket that is made when the machine starts. What the guest
    /// connects to at port N of the host is the socket at this path with `_N` behind.
    pub uds_path: String,
}
