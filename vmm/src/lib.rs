//! The machine: KVM, boot, configuration, the API.

pub mod api;
pub mod arch;
pub mod config;
pub mod memory;
