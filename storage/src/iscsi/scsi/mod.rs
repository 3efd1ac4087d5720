//! What is said to a logical unit and what it answers: the parts of SPC-4 and SBC-3 that a disk needs, without I/O.
//!
//! Sections are those of SPC-4 revision 36 and SBC-3 revision 35.

pub mod cdb;
pub mod reservation;
pub mod sense;
