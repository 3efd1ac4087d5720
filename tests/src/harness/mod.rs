//! What every storage backend is tested with: hosts, faults between them, and judges of what is on the image.

mod daemon;
pub mod double_start;
pub mod hosts;
pub mod iscsi;
pub mod jail;
pub mod matrix;
pub mod nfs;
pub mod oracle;
pub mod peer;
pub mod proxy;
pub mod receiver;
