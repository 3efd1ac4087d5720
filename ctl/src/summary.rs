//! What a running machine says about itself in one line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;
use serde::Serialize;
use serde_json::Value;

use crate::client::{Client, ClientError, Request};
use crate::process;

/// A machine in one line; what it did not tell is absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    /// The id.
    pub(crate) id: String,
    /// `Not started`, `Running` or `Paused`, as the API says it.
    pub(crate) state: String,
    /// The monitor's process.
    pub(crate) pid: i32,
    /// How many vCPUs.
    pub(crate) vcpus: Option<u64>,
    /// How much memory.
    pub(crate) memory_mib: Option<u64>,
    /// How long the monitor has been running.
    pub(crate) uptime_seconds: Option<u64>,
    /// The API socket.
    pub(crate) socket: PathBuf,
}

impl Summary {
    /// Asks the monitor behind `socket`; each question may take `wait`.
    ///
    /// # Errors
    ///
    /// When the monitor does not answer, or refuses.
    pub(crate) fn ask(socket: &Path, wait: Duration) -> Result<Self, ClientError> {
        let client = Client::new(socket);
        let pid = client.peer(wait)?;
        let instance = client.read(Request::get("/").within(wait))?;
        let machine = client.read(Request::get("/machine-config").within(wait))?;
        Ok(Self::of(socket, pid, &instance, &machine))
    }

    fn of(socket: &Path, pid: Pid, instance: &Value, machine: &Value) -> Self {
        let text = |field| {
            instance
                .get(field)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let number = |field| machine.get(field).and_then(Value::as_u64);
        Self {
            id: text("id"),
            state: text("state"),
            pid: pid.as_raw_nonzero().get(),
            vcpus: number("vcpu_count"),
            memory_mib: number("mem_size_mib"),
            uptime_seconds: process::uptime(pid).map(|uptime| uptime.as_secs()),
            socket: socket.to_owned(),
        }
    }
}
