//! The parts of the unikernel guest that need no machine: what was asked, what is written, what was measured.

#![cfg_attr(not(test), no_std)]

pub mod acpi;
pub mod cmdline;
pub mod garbage;
pub mod histogram;
pub mod packet;
pub mod pattern;
pub mod random;
pub mod ring;
pub mod stamp;
pub mod stream;
pub mod tcp;
pub mod time;
pub mod width;
