//! x86-64: boot protocols, tables for the guest, processor state.

pub mod acpi;
pub mod boot;
pub mod cpu;
pub mod cpuid;
#[cfg(test)]
mod entry_tests;
pub mod lapic;
pub mod layout;
mod mptable;
pub mod msr;
pub mod regs;
pub mod tables;
pub mod template;
#[cfg(test)]
pub(crate) mod testing;
