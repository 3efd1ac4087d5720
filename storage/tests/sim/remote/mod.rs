//! Disks on simulated targets, at the end of simulated networks.

pub(crate) mod heirs;
pub(crate) mod hostile;
pub(crate) mod keeping;
pub(crate) mod life;
pub(crate) mod outage;
mod site;
