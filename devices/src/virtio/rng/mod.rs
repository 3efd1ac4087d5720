//! The entropy device (virtio 1.2, 5.4): random bytes of the host for the guest.

mod config;
mod device;
mod worker;

pub use config::EntropyConfig;
pub use device::Entropy;
pub use worker::{EntropyCounts, REQUEST_BYTES_MAX};

#[cfg(test)]
mod tests;
