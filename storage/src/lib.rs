//! Disk images, and where their bytes live. This crate knows neither virtio nor KVM.
//!
//! A [`backend::Backend`] is a state machine that never calls the kernel: it turns requests into
//! [`reactor::KernelOp`]s and their results into completions. A [`reactor::Reactor`] carries the
//! operations out; an I/O thread owns one reactor and one stack of backends.

pub mod backend;
pub mod blocking;
pub mod changes;
mod clock;
pub mod copy;
pub mod draft;
pub mod engine;
mod escape;
mod host;
pub mod iscsi;
pub mod lease;
pub mod likeness;
pub mod limit;
pub mod metrics;
pub mod nfs;
pub mod open;
pub mod overlay;
pub mod pipeline;
pub mod plain;
pub mod raw;
pub mod reactor;
mod remote;
pub mod request;
pub mod ring;
pub mod secret;
mod segments;
pub mod sim;
pub mod slab;
mod socket;
pub mod threads;
pub mod utc;
