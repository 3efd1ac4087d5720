//! Images on the exports of NFS servers (RFC 8881, 7862, 1813), without a mount on the host: the protocol as values and state
//! machines, without I/O of their own.

mod bringup;
mod callback;
mod client;
mod command;
mod disk;
mod error;
mod fence;
mod handover;
mod inbox;
mod open;
mod operator;
mod payload;
mod plan;
mod procedure;
mod pulse;
mod records;
pub mod rpc;
mod session;
mod stateless;
pub mod url;
pub mod v3;
pub mod v4;
pub mod xdr;
mod xid;

pub use error::NfsError;
pub(crate) use handover::check_offer;
pub(crate) use open::{Opened, check, client_prefix, image_name, open, open_simulated};
pub use operator::{FileStanding, Operator};
pub use url::{ImageName, NfsUrl};
