//! The unikernel guest: boots through PVH, does at CPL 3 what its command line asks, ends with a status.
//!
//! `README.md` has the command language; `boot.s` has the only instructions that run at CPL 0.

#![no_std]
#![no_main]

mod boot;
mod bytes;
mod clock;
mod cpu;
mod ending;
mod interrupts;
mod machine;
mod memory;
mod panic;
mod serial;
mod smp;
mod tables;
mod verbs;
mod virtio;
mod wait;
