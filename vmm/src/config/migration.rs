//! Moving a machine to another process while its guest runs.

use std::num::NonZeroU64;

use coracle_devices::virtio::blk::DriveConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::migration::tls::TlsFiles;

/// The body of `PUT /migration/send`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationSend {
    /// HOST:PORT of the receiver.
    pub to: String,
    /// The name in the receiver's certificate, if it is not the host of `to`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_name: Option<String>,
    /// The certificates.
    pub tls: TlsFiles,
    /// How long the guest may stand still for its last pages, in milliseconds. As long as what is left would take longer, memory
    /// is sent while the guest runs.
    #[serde(default = "downtime_ms")]
    pub downtime_ms: u64,
    /// After how long it is given up, in seconds, if the guest still writes faster than memory is sent.
    #[serde(default = "timeout_s")]
    pub timeout_s: u64,
    /// What is done then.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Whether a guest that writes faster than memory is sent is slowed down.
    #[serde(default)]
    pub mode: MigrationMode,
    /// How many bytes per second are sent at most; without it as many as the connection takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit: Option<NonZeroU64>,
    /// Connections that memory goes by. Each takes about a core at either side while it is busy.
    #[serde(default = "streams")]
    #[schemars(range(min = 1, max = STREAMS_MAX))]
    pub streams: u8,
    /// Whether memory is packed on its way.
    #[serde(default)]
    pub compression: Compression,
}

/// Whether memory is packed on its way. Pages that do not become smaller are sent as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Compression {
    /// It is not.
    #[default]
    None,
    /// By LZ4.
    Lz4,
    /// By LZ4 as long as that makes it faster, which is measured again and again: it does where the link is slower than a
    /// processor packs.
    Auto,
}

/// Most connections of one migration.
pub const STREAMS_MAX: u8 = 16;

/// What becomes of a migration whose time is over while the guest writes faster than memory is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnTimeout {
    /// It is given up, and the guest runs on where it is.
    #[default]
    Abort,
    /// The guest stands still until the rest is sent, however long that takes.
    Stop,
}

/// How memory is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MigrationMode {
    /// While the guest runs. If it writes so fast that the rounds do not become shorter, its vCPUs run for a share of the time,
    /// which is halved, or more, from round to round.
    #[default]
    Auto,
    /// While the guest runs as fast as it can.
    Precopy,
}

fn downtime_ms() -> u64 {
    50
}

fn streams() -> u8 {
    1
}

fn timeout_s() -> u64 {
    300
}

/// The body of `PUT /migration/receive`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationReceive {
    /// ADDRESS:PORT to listen at; with port 0 a free one, which `GET /migration` tells.
    pub listen: String,
    /// The name in the sender's certificate; without it any host of the authority may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_name: Option<String>,
    /// The only machine that is taken, by its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The certificates.
    pub tls: TlsFiles,
    /// What of the machine has another name on this host.
    #[serde(default, skip_serializing_if = "Overrides::is_empty")]
    pub overrides: Overrides,
}

/// What of a machine has another name on the host that receives it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Overrides {
    /// Its drives, each at most once; one that is not here is where the sender has it.
    #[serde(default)]
    pub drives: Vec<DriveOverride>,
}

/// Where a drive is on the host that receives it: the same image, by another path, address or secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The drive.
    pub drive_id: String,
    /// Its image: a path or a URL, which also says where this host has its secrets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    /// The base of its overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_base: Option<String>,
    /// Its overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_path: Option<String>,
    /// What the records of its lease are named after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_at: Option<String>,
}

/// Why what has another name here is not that of the machine that is sent.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum OverrideError {
    #[error("`overrides` names drive `{0}`, which the machine does not have")]
    NoDrive(String),
    #[error("`overrides` names drive `{0}` twice: say all of it in one")]
    Twice(String),
    #[error(
        "`overrides` gives drive `{0}` a `path_on_host`, and it is an overlay: give it an `overlay_base` or an `overlay_path`"
    )]
    NoImage(String),
    #[error("`overrides` gives drive `{0}` an overlay, and it has none: give it a `path_on_host`")]
    NoOverlay(String),
}

impl Overrides {
    /// Whether every drive is where the sender has it.
    pub fn is_empty(&self) -> bool {
        self.drives.is_empty()
    }

    /// Has `drives` be where this host has them.
    ///
    /// # Errors
    ///
    /// Every override that does not fit them.
    pub fn apply(&self, drives: &mut [DriveConfig]) -> Result<(), Vec<OverrideError>> {
        let mut errors = Vec::new();
        for (number, given) in self.drives.iter().enumerate() {
            let is_same = |other: &DriveOverride| other.drive_id == given.drive_id;
            let drive = drives.iter_mut().find(|drive| drive.drive_id == given.drive_id);
            let id = given.drive_id.clone();
            match drive {
                _ if self.drives.iter().take(number).any(is_same) => errors.push(OverrideError::Twice(id)),
                None => errors.push(OverrideError::NoDrive(id)),
                Some(drive) => errors.extend(given.apply(drive).err()),
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }
}

impl DriveOverride {
    fn apply(&self, drive: &mut DriveConfig) -> Result<(), OverrideError> {
        let id = || self.drive_id.clone();
        match (&mut drive.overlay, &self.path_on_host) {
            (Some(_), Some(_)) => return Err(OverrideError::NoImage(id())),
            (None, _) if self.overlay_base.is_some() || self.overlay_path.is_some() => {
                return Err(OverrideError::NoOverlay(id()));
            }
            (Some(overlay), None) => {
                replace(&mut overlay.base, self.overlay_base.as_ref());
                replace(&mut overlay.path, self.overlay_path.as_ref());
            }
            (None, Some(path)) => drive.path_on_host = Some(path.clone()),
            (None, None) => {}
        }
        if let Some(at) = &self.lease_at {
            drive.lease_at = Some(at.clone());
        }
        Ok(())
    }
}

fn replace(path: &mut String, given: Option<&String>) {
    if let Some(given) = given {
        path.clone_from(given);
    }
}

/// The answer to `GET /migration`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MigrationStatus {
    /// What is being done.
    pub state: MigrationStage,
    /// Where a receiver listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// How many times memory was gone through.
    pub rounds: u64,
    /// How much memory was sent or taken, in bytes.
    pub sent_bytes: u64,
    /// What went over the connections for that, in bytes.
    pub wire_bytes: u64,
    /// How much is left of this round, in bytes.
    pub left_bytes: u64,
    /// How fast memory was sent in the last round, in bytes per second.
    pub bytes_per_s: u64,
    /// How long the guest would stand still now, in microseconds, by what is known.
    pub predicted_downtime_us: u64,
    /// How much of the time the guest's vCPUs may run, in thousandths.
    pub vcpu_permille: u32,
}

/// What is being done of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MigrationStage {
    /// Nothing.
    #[default]
    Idle,
    /// A receiver waits for its sender, or takes memory.
    Receiving,
    /// The guest runs, and its memory is being sent.
    Sending,
    /// The guest stands still for the last pages.
    Stopping,
    /// The disks are on their way: the leases decide.
    HandingOver,
    /// The connection was lost meanwhile, and the leases are asked who has the guest.
    Settling,
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn drives() -> Vec<DriveConfig> {
        let text = r#"[
            {"drive_id": "root", "path_on_host": "nfs://a/export/root.raw", "is_root_device": true},
            {"drive_id": "data", "is_root_device": false,
             "overlay": {"base": "/images/base", "path": "/shared/data", "keep": true}}]"#;
        serde_json::from_str(text).unwrap()
    }

    fn applied(overrides: &str) -> Result<Vec<DriveConfig>, Vec<OverrideError>> {
        let overrides: Overrides = serde_json::from_str(overrides).unwrap();
        let mut drives = drives();
        overrides.apply(&mut drives).map(|()| drives)
    }

    #[test]
    fn what_has_another_name_here_is_found_by_it_and_the_rest_is_where_it_was() {
        let found = applied(
            r#"{"drives": [
                {"drive_id": "data", "overlay_base": "/golden/base", "lease_at": "/leases/data"},
                {"drive_id": "root", "path_on_host": "nfs://b/export/root.raw"}]}"#,
        );
        let mut expected = drives();
        let [root, data] = expected.as_mut_slice() else {
            panic!("there are two");
        };
        root.path_on_host = Some("nfs://b/export/root.raw".to_owned());
        data.overlay.as_mut().unwrap().base = "/golden/base".to_owned();
        data.lease_at = Some("/leases/data".to_owned());
        assert_eq!(found.unwrap(), expected);
        assert_eq!(applied("{}").unwrap(), drives());
    }

    #[test]
    fn every_override_that_does_not_fit_is_told() {
        let found = applied(
            r#"{"drives": [
                {"drive_id": "swap", "path_on_host": "/s"},
                {"drive_id": "data", "path_on_host": "/d"},
                {"drive_id": "root", "overlay_path": "/o"},
                {"drive_id": "root", "path_on_host": "/r"}]}"#,
        );
        assert_eq!(
            found.unwrap_err(),
            [
                OverrideError::NoDrive("swap".to_owned()),
                OverrideError::NoImage("data".to_owned()),
                OverrideError::NoOverlay("root".to_owned()),
                OverrideError::Twice("root".to_owned()),
            ]
        );
    }
}
