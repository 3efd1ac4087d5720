//! A simulated host: files that lose what was not synced, a network that keeps nothing in time, and a reactor that does
//! its worst to them.
//!
//! Everything that happens is drawn from one seed, so a run can be repeated. What an image may
//! answer, and what must be left of it after a crash, the [`oracle::Oracle`] decides.

pub mod clock;
pub mod dice;
mod file;
pub mod image;
pub mod initiator;
pub mod medium;
pub mod net;
pub mod nfs;
pub mod oracle;
pub mod reactor;
pub mod seeds;
pub mod serve;
pub mod target;
