//! The machine: KVM, boot, configuration, the API.

pub mod api;
pub mod arch;
pub mod cli;
pub mod config;
pub mod line_sink;
pub mod logger;
pub mod memory;
pub mod metrics;
