//! The rules of the socket device.

use coracle_devices::virtio::vsock::{CID_MAX, CID_MIN, ListenError, VsockConfig};

use super::{Config, ConfigError, VsockOverride};

/// Why a socket device is refused.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum VsockError {
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("a guest_cid of {0} is reserved: {CID_MIN} to {CID_MAX}")]
    Cid(u32),
    #[error("uds_path is empty; name the socket that programs of the host are to connect to")]
    NoPath,
    #[error("the machine has no vsock device: leave this out")]
    None,
}

impl Config {
    /// The socket device, if there is one.
    pub fn vsock(&self) -> Option<&VsockConfig> {
        self.vsock.as_ref()
    }

    /// Replaces the socket device.
    ///
    /// # Errors
    ///
    /// The rule that `vsock` breaks; then nothing has changed.
    pub fn set_vsock(&mut self, vsock: VsockConfig) -> Result<(), ConfigError> {
        if !(CID_MIN..=CID_MAX).contains(&vsock.guest_cid) {
            return Err(VsockError::Cid(vsock.guest_cid).into());
        }
        if vsock.uds_path.is_empty() {
            return Err(VsockError::NoPath.into());
        }
        self.vsock = Some(vsock);
        Ok(())
    }

    /// Has the socket device be reached by another path, if `given` says one.
    ///
    /// # Errors
    ///
    /// There is none, or no path.
    pub fn override_vsock(&mut self, given: Option<&VsockOverride>) -> Result<(), VsockError> {
        let Some(VsockOverride { uds_path }) = given else {
            return Ok(());
        };
        if uds_path.is_empty() {
            return Err(VsockError::NoPath);
        }
        let vsock = self.vsock.as_mut().ok_or(VsockError::None)?;
        vsock.uds_path.clone_from(uds_path);
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn vsock(json: &str) -> VsockConfig {
        serde_json::from_str(json).unwrap()
    }

    fn given(path: &str) -> VsockOverride {
        VsockOverride {
            uds_path: path.to_owned(),
        }
    }

    #[test]
    fn a_device_has_an_address_and_a_path_and_the_last_one_stays() {
        let mut config = Config::default();
        for wrong in [
            r#"{"guest_cid": 2, "uds_path": "v"}"#,
            r#"{"guest_cid": 4294967295, "uds_path": "v"}"#,
            r#"{"guest_cid": 3, "uds_path": ""}"#,
        ] {
            assert!(config.set_vsock(vsock(wrong)).is_err(), "{wrong}");
        }
        assert_eq!(config.vsock(), None);
        let named = r#"{"guest_cid": 3, "uds_path": "v", "vsock_id": "vsock0"}"#;
        config.set_vsock(vsock(named)).unwrap();
        let last = r#"{"guest_cid": 4294967294, "uds_path": "w"}"#;
        config.set_vsock(vsock(last)).unwrap();
        assert_eq!(config.vsock(), Some(&vsock(last)));
        assert_eq!(config.virtio_devices(), 1);
    }

    #[test]
    fn an_override_is_of_a_device_that_there_is() {
        let mut config = Config::default();
        config.override_vsock(None).unwrap();
        assert!(matches!(
            config.override_vsock(Some(&given("w"))),
            Err(VsockError::None)
        ));
        let device = vsock(r#"{"guest_cid": 3, "uds_path": "v"}"#);
        config.set_vsock(device).unwrap();
        assert!(matches!(
            config.override_vsock(Some(&given(""))),
            Err(VsockError::NoPath)
        ));
        config.override_vsock(Some(&given("w"))).unwrap();
        assert_eq!(config.vsock().unwrap().uds_path, "w");
    }
}
