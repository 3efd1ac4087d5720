//! The machine: KVM, boot, configuration, the API.

pub mod arch;
pub mod config;
pub mod memory;
