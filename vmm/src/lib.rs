//! The machine: KVM, boot, configuration, the API.

pub mod api;
pub mod arch;
pub mod cli;
pub mod config;
pub mod console;
pub mod end;
pub mod event_loop;
pub mod keys;
pub mod kvm;
pub mod landlock;
pub mod line_sink;
pub mod logger;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod migration;
pub mod monitor;
pub mod process;
pub mod seccomp;
pub mod signals;
pub mod snapshot;
pub mod state;
