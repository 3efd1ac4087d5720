//! Virtio 1.2: virtqueues, the device contract, and the devices.

pub mod device;
pub mod ring;
pub mod segments;
#[cfg(test)]
pub(crate) mod testing;
