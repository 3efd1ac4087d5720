//! The metadata service: what the host says to a guest about itself, asked for by HTTP at an address of the guest's network.
//!
//! ```text
//!   guest ── frame for the address ──► stack.rs ── bytes of a request ──► answer.rs ──► store.rs ◄── PUT, PATCH /mmds
//!   guest ◄── frames ─────────────────    │   ◄──── bytes of the response ────┘
//! ```
//!
//! Each network interface that may ask has a stack of its own, on the thread of its device; there is one [`Mmds`] for all.

mod answer;
mod stack;
mod store;
mod token;

pub use answer::{Answer, answer};
pub use stack::{HEAD_BYTES, Stack};
pub use store::{Mmds, MmdsCounts, MmdsError, MmdsVersion};

#[cfg(test)]
mod tests;
