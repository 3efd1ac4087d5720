//! Disks on simulated targets, at the end of simulated networks.

pub(crate) mod heirs;
pub(crate) mod life;
mod site;
