//! What of a machine has another name on the host where it goes on.

use coracle_devices::virtio::blk::DriveConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Config, NetworkOverride, VsockOverride};

/// What of a machine has another name on the host that receives it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Overrides {
    /// Its drives, each at most once; one that is not here is where the sender has it.
    #[serde(default)]
    pub drives: Vec<DriveOverride>,
    /// Its network interfaces, likewise: the tap of one that is not here has the same name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkOverride>,
    /// Its vsock device: the path of its socket here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockOverride>,
}

/// Where a drive is on the host where its machine goes on: the same image, by another path, address or secret; of a load it may
/// be another image.
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
    #[error("names drive `{0}`, which the machine does not have")]
    NoDrive(String),
    #[error("names drive `{0}` twice: say all of it in one")]
    Twice(String),
    #[error(
        "gives drive `{0}` a `path_on_host`, and it is an overlay: give it an `overlay_base` or an `overlay_path`"
    )]
    NoImage(String),
    #[error("gives drive `{0}` an overlay, and it has none: give it a `path_on_host`")]
    NoOverlay(String),
}

impl Overrides {
    /// Whether everything is where the sender has it.
    pub fn is_empty(&self) -> bool {
        self.drives.is_empty() && self.networks.is_empty() && self.vsock.is_none()
    }
}

impl Config {
    /// Has drives be where this host has them, as `overrides` say it.
    ///
    /// # Errors
    ///
    /// Every override that does not fit them.
    pub fn override_drives(&mut self, overrides: &[DriveOverride]) -> Result<(), Vec<OverrideError>> {
        let mut errors = Vec::new();
        for (number, given) in overrides.iter().enumerate() {
            let is_same = |other: &DriveOverride| other.drive_id == given.drive_id;
            let drive = self
                .drives
                .iter_mut()
                .find(|drive| drive.drive_id == given.drive_id);
            let id = given.drive_id.clone();
            match drive {
                _ if overrides.iter().take(number).any(is_same) => errors.push(OverrideError::Twice(id)),
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
        let mut config = Config {
            drives: drives(),
            ..Config::default()
        };
        config.override_drives(&overrides.drives).map(|()| config.drives)
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
