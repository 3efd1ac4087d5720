//! What the guest sees: virtio devices, their transport, and the few legacy devices a microVM needs.
//!
//! This crate does not know KVM: interrupts leave as eventfd writes and kicks arrive as eventfd
//! reads, and whoever assembles the machine connects both.

pub mod boot_timer;
pub mod bus;
mod complaints;
pub mod hotplug;
pub mod i8042;
pub mod mmds;
pub mod power;
pub mod random;
pub mod serial;
pub mod virtio;
pub mod vmclock;
pub mod vmgenid;
mod wait;
