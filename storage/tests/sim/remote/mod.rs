//! Disks on simulated targets, at the end of simulated networks.

pub(crate) mod life;
mod site;
