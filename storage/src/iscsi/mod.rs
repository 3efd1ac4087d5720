//! Images on the logical units of iSCSI targets (RFC 7143), without an initiator on the host: the protocol as values and state
//! machines, without I/O of their own.

mod bringup;
pub mod chap;
pub mod digest;
pub mod discovery;
mod disk;
mod error;
mod handover;
mod inbox;
mod initiator;
mod link;
pub mod login;
pub mod name;
mod open;
mod operator;
pub mod pdu;
mod plan;
pub mod portal;
mod procedure;
mod reservation;
pub mod scsi;
mod session;
pub mod tail;
pub mod text;
mod unit;
pub mod url;

pub use error::IscsiError;
pub(crate) use handover::check_offer;
pub(crate) use open::{Opened, check, image_name, open};
pub(crate) use open::{isid_stem, open_simulated};
pub use operator::{Operator, Replace, UnitStanding};
pub(crate) use url::shown;
pub use url::{ImageName, IscsiUrl};
