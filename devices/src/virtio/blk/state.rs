//! What a block device takes along to go on elsewhere.

use serde::{Deserialize, Serialize};

/// The saved state of a block device: what its driver can set in the configuration space.
///
/// Its rate limiters start full. What the image has in flight is nothing, and what it is, is the machine's to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// The `writeback` field (virtio 1.2, 5.2.4). A drive that is written through now stays so, whatever this says.
    pub writeback: bool,
}
