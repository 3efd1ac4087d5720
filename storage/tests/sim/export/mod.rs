//! Disks on simulated NFS servers, at the end of simulated networks.

pub(crate) mod heirs;
pub(crate) mod hostile;
pub(crate) mod keeping;
pub(crate) mod lapse;
pub(crate) mod life;
pub(crate) mod outage;
mod site;
pub(crate) mod sparse;
pub(crate) mod stopped;
