//! What iSCSI images are tested with: a target of the test's own, and the protocol as the proxy must know it.

mod damage;
mod pdu;
pub mod protocol;
mod steps;
pub mod target;
