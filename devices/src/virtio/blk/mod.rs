//! The block device (virtio 1.2, 5.2): a guest's requests become requests to a storage image.
//!
//! ```text
//!   guest ──ring──► worker thread "io <id>" ──Request──► image ──KernelOp──► reactor
//!     ▲                   │    ▲                                               │
//!     └──used, interrupt──┘    └─────────────── Completion ◄───────────────────┘
//! ```
//!
//! The worker waits in its reactor alone: kicks, commands, timers and the ends of operations all
//! arrive there. It owns the image; whoever wants something of it posts a command.

mod cache;
mod change;
mod config;
mod control;
mod departure;
mod device;
mod errand;
mod lane;
mod likeness;
mod loss;
mod mailbox;
mod metrics;
mod polling;
mod request;
mod space;
mod state;
#[cfg(test)]
mod tests;
mod worker;

pub use change::{Changed, ImageChange};
pub use config::{CacheType, Disk, DriveConfig, DriveError, HeldDisk, PartialDrive};
pub use control::{BlkControl, ControlError, grown};
pub use device::Blk;
pub use errand::Errand;
pub use loss::LossSignal;
pub use metrics::{BlkMetrics, LatencyAggregate};
pub use state::BlkState;
