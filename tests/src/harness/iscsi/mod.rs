//! What iSCSI images are tested with: a target of the test's own, the protocol as the proxy must know it, and an image
//! that many want.

mod damage;
pub mod disk;
mod pdu;
pub mod protocol;
mod steps;
pub mod target;
