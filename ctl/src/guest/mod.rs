//! `coraclectl exec` and `coraclectl cp`: what the agent in a guest does for who may reach its vsock device.

mod copy;
mod exec;
mod link;

pub(crate) use self::copy::{CopyArgs, copy};
pub(crate) use self::exec::{ExecArgs, exec};
