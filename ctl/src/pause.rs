//! `coraclectl pause` and `coraclectl resume`: the two directions of `PATCH /vm`.

use clap::Args;
use serde_json::json;
use thiserror::Error;

use crate::client::{Client, ClientError};
use crate::discovery::{FindError, resolve};
use crate::output::{Format, OutputError, print, print_json};

/// Which machine.
#[derive(Debug, Args)]
pub(crate) struct PhaseArgs {
    /// A machine's name, or the path of its API socket
    vm: String,
}

/// The phase that a machine is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Its vCPUs stand still and its disks are drained.
    Paused,
    /// Its vCPUs run.
    Resumed,
}

/// Why the machine has not changed its phase.
#[derive(Debug, Error)]
pub(crate) enum PhaseError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl Phase {
    /// As `PATCH /vm` spells it.
    fn wanted(self) -> &'static str {
        match self {
            Self::Paused => "Paused",
            Self::Resumed => "Resumed",
        }
    }

    /// As `GET /` spells it afterwards.
    fn reached(self) -> &'static str {
        match self {
            Self::Paused => "Paused",
            Self::Resumed => "Running",
        }
    }

    /// Brings the machine behind `client` into this phase.
    ///
    /// # Errors
    ///
    /// When the monitor refuses or does not answer.
    pub(crate) fn bring(self, client: &Client<'_>) -> Result<(), ClientError> {
        client.send("PATCH", "/vm", &json!({ "state": self.wanted() }))
    }
}

/// Brings the machine into `phase` and says so.
///
/// # Errors
///
/// When there is no such machine, or it refuses.
pub(crate) fn set_phase(args: &PhaseArgs, phase: Phase, format: Format) -> Result<(), PhaseError> {
    let client = Client::new(&resolve(&args.vm)?);
    phase.bring(&client)?;
    match format {
        Format::Json => print_json(&json!({ "vm": args.vm, "state": phase.reached() }))?,
        Format::Text => print(format_args!("{}: {}\n", args.vm, phase.reached().to_lowercase()))?,
    }
    Ok(())
}
