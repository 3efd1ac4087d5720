//! Images that are only read, by NFSv3: whatever is asked may be asked again, so there are no sessions, and nothing is kept.
//!
//! ```text
//!   PORTMAP: GETPORT ──► MOUNT: EXPORT, MNT ──► NFS: LOOKUP …, FSINFO, GETATTR ──► READ …
//!   each on a connection of its own                the disk goes on with this one
//! ```

mod bringup;
mod calls;
mod client;
mod command;
mod disk;
mod locate;
mod open;
mod plan;
mod procedure;

pub(super) use open::open;
pub(super) use plan::Plan;
pub(super) use procedure::CallError;

#[cfg(test)]
mod tests;
