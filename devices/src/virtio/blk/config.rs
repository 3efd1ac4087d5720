//! A drive as it is configured, with Firecracker's names, and what opening it yields.

use coracle_storage::backend::{Access, Backend};
use coracle_storage::engine::{Engine, PreparedReactor};
use coracle_storage::limit::RateLimiterConfig;
use coracle_storage::open::{OpenError, open};
use coracle_storage::overlay::{OverlayConfig, OverlayError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::device::QUEUE_SIZE_MAX;

/// A drive of the guest: the body of `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveConfig {
    /// Names the drive; the guest sees its first 20 bytes as the disk's serial number.
    pub drive_id: String,
    /// The unique id of the boot partition of this device. It is used only if `is_root_device` is true.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether this is the root device.
    pub is_root_device: bool,
    /// Whether the guest's flushes reach the medium.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Whether the guest may only read. False if absent.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// The image on this host: a file or a block device.
    #[serde(default)]
    pub path_on_host: Option<String>,
    /// A base that is only read, and where writes go, in place of `path_on_host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<OverlayConfig>,
    /// Limits on bytes and operations per second.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiterConfig>,
    /// How the host's storage is asked: `Async` (io_uring) if absent.
    #[serde(default)]
    pub io_engine: Option<Engine>,
    /// Path of a vhost-user-block socket: known, and refused.
    #[serde(default)]
    pub socket: Option<String>,
}

/// Changes of a drive: the body of `PATCH /drives/{drive_id}`. What is absent stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PartialDrive {
    /// The drive.
    pub drive_id: String,
    /// Another image.
    #[serde(default)]
    pub path_on_host: Option<String>,
    /// Other limits; a bucket that is absent stays as it is.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// What a guest's flush means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CacheType {
    /// The guest is not offered FLUSH: what it wrote reaches the medium when the host sees fit.
    #[default]
    Unsafe,
    /// The guest is offered FLUSH, and a flush reaches the medium.
    Writeback,
}

/// A drive whose image is open and whose reactor is set up: nothing after this sees a path.
pub struct Disk {
    /// The drive's name.
    pub id: String,
    /// The image.
    pub image: Box<dyn Backend>,
    /// What will carry its operations out.
    pub reactor: PreparedReactor,
    /// What a flush means.
    pub cache_type: CacheType,
    /// The limits.
    pub rate_limiter: RateLimiterConfig,
}

/// Why a drive cannot be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// A drive without an image.
    #[error("drive `{drive_id}` names no image: set `path_on_host`")]
    PathMissing {
        /// The drive.
        drive_id: String,
    },
    /// Firecracker's other kind of drive.
    #[error("drive `{drive_id}` names a vhost-user `socket`, which is not supported: use `path_on_host`")]
    Socket {
        /// The drive.
        drive_id: String,
    },
    /// Two images for one drive.
    #[error("drive `{drive_id}` has both `path_on_host` and `overlay`: leave one of them out")]
    TwoImages {
        /// The drive.
        drive_id: String,
    },
    /// An overlay that nothing is written to.
    #[error(
        "drive `{drive_id}` is a read-only overlay, which would only ever show its base: name that by \
         `path_on_host`, or leave `is_read_only` out"
    )]
    ReadOnlyOverlay {
        /// The drive.
        drive_id: String,
    },
    /// The overlay is not usable.
    #[error("drive `{drive_id}` cannot be used")]
    Overlay {
        /// The drive.
        drive_id: String,
        /// Why.
        #[source]
        source: OverlayError,
    },
    /// The image is not usable.
    #[error("drive `{drive_id}` cannot be used")]
    Image {
        /// The drive.
        drive_id: String,
        /// Why.
        #[source]
        source: OpenError,
    },
}

impl DriveConfig {
    /// The access to the image that the drive asks for.
    pub fn access(&self) -> Access {
        if self.is_read_only.unwrap_or(false) {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        }
    }

    /// Where the image is; for an overlay, its base.
    ///
    /// # Errors
    ///
    /// When no image is named, or two, or a socket, or an overlay that makes no sense.
    pub fn image_path(&self) -> Result<&str, DriveError> {
        let drive_id = || self.drive_id.clone();
        if self.socket.is_some() {
            return Err(DriveError::Socket { drive_id: drive_id() });
        }
        if let Some(overlay) = &self.overlay {
            if self.path_on_host.is_some() {
                return Err(DriveError::TwoImages { drive_id: drive_id() });
            }
            if self.access() == Access::ReadOnly {
                return Err(DriveError::ReadOnlyOverlay { drive_id: drive_id() });
            }
            overlay.check().map_err(|source| self.overlay_error(source))?;
            return Ok(&overlay.base);
        }
        self.path_on_host
            .as_deref()
            .ok_or_else(|| DriveError::PathMissing { drive_id: drive_id() })
    }

    /// Checks that the image can be opened as things are now, and changes nothing.
    ///
    /// # Errors
    ///
    /// As [`Self::open_image`].
    pub fn probe(&self) -> Result<(), DriveError> {
        self.image_path()?;
        match &self.overlay {
            Some(overlay) => overlay.probe().map_err(|source| self.overlay_error(source)),
            None => self.open_image().map(drop),
        }
    }

    /// Opens the image alone, as a disk swap needs it.
    ///
    /// # Errors
    ///
    /// What is wrong with the image, or with the configuration.
    pub fn open_image(&self) -> Result<Box<dyn Backend>, DriveError> {
        let path = self.image_path()?;
        if let Some(overlay) = &self.overlay {
            return overlay.open().map_err(|source| self.overlay_error(source));
        }
        open(path, self.access()).map_err(|source| DriveError::Image {
            drive_id: self.drive_id.clone(),
            source,
        })
    }

    /// Opens the image and sets its reactor up.
    ///
    /// # Errors
    ///
    /// As [`Self::open_image`].
    pub fn open(&self) -> Result<Disk, DriveError> {
        Ok(Disk {
            id: self.drive_id.clone(),
            image: self.open_image()?,
            reactor: PreparedReactor::new(self.io_engine.unwrap_or_default(), u32::from(QUEUE_SIZE_MAX)),
            cache_type: self.cache_type,
            rate_limiter: self.rate_limiter.unwrap_or_default(),
        })
    }

    fn overlay_error(&self, source: OverlayError) -> DriveError {
        DriveError::Overlay {
            drive_id: self.drive_id.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: &str) -> Result<DriveConfig, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn a_drive_of_firecracker_is_understood_and_its_defaults_are_ours() {
        let drive = parsed(
            r#"{"drive_id": "rootfs", "path_on_host": "/a.ext4", "is_root_device": true, "is_read_only": false}"#,
        )
        .expect("this is Firecracker's own example");
        assert_eq!(drive.cache_type, CacheType::Unsafe);
        assert_eq!(drive.io_engine.unwrap_or_default(), Engine::Async);
        assert_eq!(drive.access(), Access::ReadWrite);
        assert!(matches!(drive.image_path(), Ok("/a.ext4")));
    }

    #[test]
    fn an_unknown_field_is_refused_by_its_name() {
        let error = parsed(r#"{"drive_id": "a", "is_root_device": false, "path_on_hots": "/a"}"#)
            .expect_err("a typo");
        assert!(error.to_string().contains("path_on_hots"), "{error}");
    }

    #[test]
    fn a_socket_and_a_missing_path_are_refused_with_the_remedy() {
        let mut drive = DriveConfig::default();
        assert!(matches!(drive.image_path(), Err(DriveError::PathMissing { .. })));
        drive.socket = Some("/s".to_owned());
        assert!(matches!(drive.image_path(), Err(DriveError::Socket { .. })));
    }

    #[test]
    fn an_overlay_is_the_only_image_of_its_drive_and_is_writable() {
        let mut drive = parsed(
            r#"{"drive_id": "root", "is_root_device": true, "overlay": {"base": "/base.img", "path": "memory"}}"#,
        )
        .expect("an overlay needs no more than that");
        assert!(matches!(drive.image_path(), Ok("/base.img")));
        drive.is_read_only = Some(true);
        assert!(matches!(
            drive.image_path(),
            Err(DriveError::ReadOnlyOverlay { .. })
        ));
        drive.path_on_host = Some("/a".to_owned());
        assert!(matches!(drive.image_path(), Err(DriveError::TwoImages { .. })));
        drive.path_on_host = None;
        drive.is_read_only = None;
        drive.overlay = Some(OverlayConfig {
            keep: true,
            ..drive.overlay.unwrap_or_default()
        });
        let error = drive.image_path().expect_err("memory cannot be kept");
        assert!(matches!(
            error,
            DriveError::Overlay {
                source: OverlayError::MemoryKept,
                ..
            }
        ));
        let unknown = r#"{"drive_id": "a", "is_root_device": false, "overlay": {"base": "b", "path": "p", "kepe": true}}"#;
        assert!(parsed(unknown).is_err_and(|error| error.to_string().contains("kepe")));
    }
}
