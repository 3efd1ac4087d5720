//! Live migration: a machine goes on in another process, by a connection that both sides have checked.
//!
//! ```text
//!   source                                   target
//!   hello: what it is, what it offers ─────► checks all of it; ready, or every reason why not
//!   disks that go along: blocks, holes ────► into new files
//!   rounds: pages, zeros, and what was written of disks ─► into the memory of a machine that is not there yet
//!   the guest stands still, all is flushed
//!   the last pages, the state ─────────────► checked whole, new files on their media: loaded
//!   the fences come down; go ──────────────► takes each lease, builds the machine
//!                                            starts: from here on the source never runs again
//!   retires ◄──────────────────── running ── the guest's next instruction
//! ```
//!
//! Who may write the disks is decided by their leases alone (`coracle_storage::lease`), whatever is sent or lost here.

mod call;
pub mod compress;
pub mod converge;
pub mod disks;
pub mod door;
pub mod hello;
pub mod join;
pub mod landing;
pub mod pages;
pub mod postcopy;
pub mod progress;
pub mod receive;
pub mod send;
mod standstill;
pub mod stream;
mod streams;
pub mod tls;
pub mod wire;
