//! What NFS images are tested with: a server of the test's own, the protocol as the proxy must know it, another client, and
//! an image that many want.

mod compound;
mod damage;
pub mod disk;
pub mod protocol;
mod record;
mod results;
pub mod second_client;
pub mod server;
mod steps;
mod undo;
