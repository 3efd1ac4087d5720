//! What is asked of, and said about, the instance as a whole.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The version of Firecracker whose API this one follows.
pub const FIRECRACKER_API_VERSION: &str = "1.17.0";

/// The body of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InstanceActionInfo {
    /// What is to be done.
    pub action_type: Action,
}

/// What is to be done, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Action {
    /// Write the metrics now.
    FlushMetrics,
    /// Start the machine.
    InstanceStart,
    /// Press Ctrl+Alt+Del on the guest's keyboard.
    SendCtrlAltDel,
}

/// The body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// The state to go to.
    pub state: VmState,
}

/// The state that a started machine can be brought to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VmState {
    /// No vCPU runs and nothing is in flight.
    Paused,
    /// The guest runs.
    Resumed,
}

/// The phase that the machine is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// It is being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// The guest runs.
    Running,
    /// No vCPU runs and nothing is in flight.
    Paused,
}

impl Phase {
    /// Every phase, for tables over them.
    pub const ALL: [Self; 3] = [Self::NotStarted, Self::Running, Self::Paused];
}

/// The answer to `GET /`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceInfo {
    /// Name of the instance, from `--id`.
    pub id: String,
    /// The phase that the machine is in.
    pub state: Phase,
    /// Version of this program.
    pub vmm_version: String,
    /// Name of this program.
    pub app_name: String,
    /// Why the machine is paused, where nobody has asked for it and nobody can resume it: a disk is lost. (Not in
    /// Firecracker.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl InstanceInfo {
    /// What this build says about an instance.
    pub fn new(id: &str, state: Phase) -> Self {
        Self {
            id: id.to_owned(),
            state,
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            app_name: "Coracle".to_owned(),
            reason: None,
        }
    }

    /// The same, with the reason for its phase.
    pub fn because(self, reason: Option<String>) -> Self {
        Self { reason, ..self }
    }
}

/// The answer to `GET /version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Version {
    /// The version of Firecracker whose API this one follows.
    pub firecracker_version: String,
    /// Version of this program. (Not in Firecracker.)
    pub coracle_version: String,
}

impl Version {
    /// The versions of this build.
    pub fn current() -> Self {
        Self {
            firecracker_version: FIRECRACKER_API_VERSION.to_owned(),
            coracle_version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}
