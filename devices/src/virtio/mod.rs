//! Virtio 1.2: virtqueues, the device contract, and the devices.

pub mod balloon;
pub mod blk;
#[cfg(test)]
pub(crate) mod conformance;
pub mod device;
pub mod dirty;
pub mod mem;
pub mod mmio;
pub mod net;
mod parts;
pub mod pmem;
pub mod ring;
pub mod rng;
pub mod segments;
mod service;
mod single;
pub mod state;
mod team;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
