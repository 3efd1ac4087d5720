//! The steps by which a machine is ended, from the polite one to the final one.
//!
//! ```text
//! Guest --(it takes too long, or has no such key)--> Monitor --(5 s)--> Kill
//! ```

use std::fmt;
use std::io;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use thiserror::Error;

use crate::client::{Client, ClientError, Request};
use crate::process::Process;

/// How long a monitor may take to end after SIGTERM: it drains its disks first.
const MONITOR_WAIT: Duration = Duration::from_secs(5);
/// How long the kernel may take to end a killed process.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// A monitor that is asked to press three keys answers at once.
const ASK_WAIT: Duration = Duration::from_secs(2);

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rung {
    /// The guest is asked to shut down: Ctrl-Alt-Del on its keyboard.
    Guest,
    /// The monitor is asked to end: SIGTERM.
    Monitor,
    /// The monitor is ended: SIGKILL.
    Kill,
}

/// Why a step could not be taken.
#[derive(Debug, Error)]
pub(crate) enum RungError {
    #[error("the guest cannot be asked to shut down")]
    Guest(#[source] ClientError),
    #[error("the monitor with process id {pid} cannot be signalled")]
    Signal {
        pid: i32,
        #[source]
        source: io::Error,
    },
}

impl Rung {
    /// What comes when this has not helped.
    pub(crate) fn next(self) -> Option<Self> {
        match self {
            Self::Guest => Some(Self::Monitor),
            Self::Monitor => Some(Self::Kill),
            Self::Kill => None,
        }
    }

    /// How long this step has to help, when the guest is given `guest_wait`.
    pub(crate) fn wait(self, guest_wait: Duration) -> Duration {
        match self {
            Self::Guest => guest_wait,
            Self::Monitor => MONITOR_WAIT,
            Self::Kill => KILL_WAIT,
        }
    }

    /// Takes the step, without waiting for its effect.
    ///
    /// # Errors
    ///
    /// When the monitor refuses or does not answer, or this user may not signal it.
    pub(crate) fn take(self, client: &Client<'_>, process: &Process) -> Result<(), RungError> {
        let signal = match self {
            Self::Guest => return press_ctrl_alt_del(client).map_err(RungError::Guest),
            Self::Monitor => Signal::TERM,
            Self::Kill => Signal::KILL,
        };
        let pid = process.pid().as_raw_nonzero().get();
        process
            .signal(signal)
            .map_err(|source| RungError::Signal { pid, source })
    }
}

impl fmt::Display for Rung {
    /// What ended the machine, when this step did.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Guest => "the guest shut down on Ctrl-Alt-Del",
            Self::Monitor => "the monitor ended on SIGTERM",
            Self::Kill => "the monitor was killed",
        })
    }
}

fn press_ctrl_alt_del(client: &Client<'_>) -> Result<(), ClientError> {
    let body = json!({ "action_type": "SendCtrlAltDel" }).to_string();
    let request = Request {
        method: "PUT",
        path: "/actions",
        body: Some(&body),
        wait: ASK_WAIT,
    };
    client.call(request).map(drop)
}
