//! Virtio 1.2: virtqueues, the device contract, and the devices.

pub mod device;
