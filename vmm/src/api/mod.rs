//! The API: HTTP on a Unix socket, and a table of verbs.
//!
//! The thread `api` owns nothing of the machine. It turns requests into [`Call`]s and posts them to
//! the thread that does; the answer comes back through the call's [`Reply`].

mod answer;
mod bell;
mod connection;
pub mod http;
mod inbox;
pub mod openapi;
mod router;
pub mod routes;
pub mod server;
mod socket;
pub mod verbs;

pub use answer::chain;
pub use inbox::{Call, Calls, Inbox, Reply, mailbox};
pub use router::route;
pub use verbs::{Answer, Data, Fault, Verb};
