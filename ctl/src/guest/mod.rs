//! `coraclectl exec` and `coraclectl cp`: what the agent in a guest does for who may reach its vsock device.

mod copy;
mod exec;
mod link;

pub(crate) use self::copy::{CopyArgs, CopyError, copy, fetch};
pub(crate) use self::exec::{ExecArgs, ExecError, Ran, STATUS_LATE, Surroundings, Terms, converse, exec};
pub(crate) use self::link::{Done, Link, LinkError};
