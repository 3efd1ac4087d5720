//! The balloon (virtio 1.2, 5.5): memory that the guest does not need goes back to the host.
//!
//! ```text
//!   guest ── inflate ────► pages that its driver has taken, so that nobody there uses them ──┐
//!   guest ── reporting ──► pages that are free at the moment, until they are acknowledged ───┼──► Reclaim
//!   guest ── hinting ────► the same, all there are at once, when the host asks ──────────────┘
//!   guest ── deflate ────► pages that it uses again: nothing to be done
//!   guest ── statistics ─► numbers for whoever decides how large the balloon is to be
//! ```
//!
//! What a page had is gone; whoever touches it finds a fresh one. How memory is given back is the affair of whoever made it, see
//! [`Reclaim`].

mod config;
mod device;
mod hinting;
mod pages;
mod statistics;
mod worker;

use std::io;

use coracle_storage::request::Segment;
use serde::{Deserialize, Serialize};

pub use config::{BalloonConfig, BalloonPatch, HintingStart, StatisticsPatch};
pub use device::{Balloon, BalloonControl};
pub use hinting::HintingStatus;
pub use statistics::BalloonStatistics;
pub use worker::BalloonCounts;

/// Bytes of a page of the balloon, whatever pages the guest and the host have (5.5.6).
pub const PAGE_BYTES: u64 = 4096;

/// Gives guest memory back to the host.
pub trait Reclaim: Send {
    /// Gives back those pages of the host that lie wholly within `segment`; returns how many bytes they have.
    ///
    /// # Errors
    ///
    /// What the host answers; then the memory is as it was.
    fn reclaim(&mut self, segment: Segment) -> io::Result<u64>;
}

/// What a balloon takes along to go on elsewhere, beside its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// How many pages the driver says that the balloon has.
    pub actual_pages: u32,
    /// The number of the last run of hints.
    pub last_run: u32,
    /// Whether the driver may still hold pages of that run.
    pub holds_hints: bool,
}

#[cfg(test)]
mod tests;
