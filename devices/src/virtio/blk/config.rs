//! A drive as it is configured, with Firecracker's names, and what opening it yields.

use coracle_storage::backend::{Access, Backend};
use coracle_storage::engine::{Engine, PreparedReactor};
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::limit::RateLimiterConfig;
use coracle_storage::open::{self, Hold, Image, OpenError};
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
    /// Limits on bytes and operations per second.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiterConfig>,
    /// How the host's storage is asked: `Async` (io_uring) if absent.
    #[serde(default)]
    pub io_engine: Option<Engine>,
    /// Path of a vhost-user-block socket: known, and refused.
    #[serde(default)]
    pub socket: Option<String>,
    /// Who else may use the image meanwhile: nobody (`exclusive`, for a drive that writes, and its default), whoever
    /// only reads (`shared`, for a read-only drive, and its default), or whoever likes (`none`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<Lock>,
    /// What the lease's records are named after: `<lease_at>.lease.<n>`. If absent, they are beside the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_at: Option<String>,
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

/// A drive that can be used, and what makes its image ours: to be dropped after the device has ended.
pub struct HeldDisk {
    /// The drive.
    pub disk: Disk,
    /// Its image's lease.
    pub hold: Hold,
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
    /// A lock that does not fit what the drive does.
    #[error(
        "drive `{drive_id}` has the lock `{lock}`, which is for {purpose}: leave `lock` out, or {remedy}"
    )]
    Lock {
        /// The drive.
        drive_id: String,
        /// The lock, as configured.
        lock: &'static str,
        /// Which drives it is for.
        purpose: &'static str,
        /// What to change instead.
        remedy: &'static str,
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

    /// Where the image is.
    ///
    /// # Errors
    ///
    /// When no image is named, or a socket.
    pub fn image_path(&self) -> Result<&str, DriveError> {
        let drive_id = || self.drive_id.clone();
        if self.socket.is_some() {
            return Err(DriveError::Socket { drive_id: drive_id() });
        }
        self.path_on_host
            .as_deref()
            .ok_or_else(|| DriveError::PathMissing { drive_id: drive_id() })
    }

    /// What is locked while the drive is used.
    ///
    /// # Errors
    ///
    /// When `lock` does not fit the drive's access.
    pub fn lock(&self) -> Result<Lock, DriveError> {
        let refused = |lock, purpose, remedy| DriveError::Lock {
            drive_id: self.drive_id.clone(),
            lock,
            purpose,
            remedy,
        };
        match (self.access(), self.lock) {
            (Access::ReadWrite, None | Some(Lock::Exclusive)) => Ok(Lock::Exclusive),
            (Access::ReadOnly, None | Some(Lock::Shared)) => Ok(Lock::Shared),
            (_, Some(Lock::None)) => Ok(Lock::None),
            (Access::ReadWrite, Some(Lock::Shared)) => {
                Err(refused("shared", "drives that only read", "set `is_read_only`"))
            }
            (Access::ReadOnly, Some(Lock::Exclusive)) => {
                Err(refused("exclusive", "drives that write", "unset `is_read_only`"))
            }
        }
    }

    /// Says whether the image could be opened now, by `owner`; nothing is kept and nothing is changed.
    ///
    /// # Errors
    ///
    /// What is wrong with the image or the configuration, or who has the image.
    pub fn check_image(&self, owner: &Owner) -> Result<(), DriveError> {
        let checked = open::check(self.image_path()?, self.access(), &self.terms(owner)?);
        checked.map_err(|source| self.refused(source))
    }

    /// Opens the image alone and leases it to `owner`, as a disk swap needs it.
    ///
    /// # Errors
    ///
    /// As [`Self::check_image`].
    pub fn open_image(&self, owner: &Owner) -> Result<Image, DriveError> {
        let opened = open::open(self.image_path()?, self.access(), &self.terms(owner)?);
        opened.map_err(|source| self.refused(source))
    }

    /// Opens the image, leases it to `owner` and sets its reactor up.
    ///
    /// # Errors
    ///
    /// As [`Self::check_image`].
    pub fn open(&self, owner: &Owner) -> Result<HeldDisk, DriveError> {
        let Image { backend, hold } = self.open_image(owner)?;
        let disk = Disk {
            id: self.drive_id.clone(),
            image: backend,
            reactor: PreparedReactor::new(self.io_engine.unwrap_or_default(), u32::from(QUEUE_SIZE_MAX)),
            cache_type: self.cache_type,
            rate_limiter: self.rate_limiter.unwrap_or_default(),
        };
        Ok(HeldDisk { disk, hold })
    }

    fn terms<'a>(&'a self, owner: &'a Owner) -> Result<Terms<'a>, DriveError> {
        Ok(Terms {
            lock: self.lock()?,
            at: self.lease_at.as_deref(),
            owner,
        })
    }

    fn refused(&self, source: OpenError) -> DriveError {
        DriveError::Image {
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
    fn a_lock_fits_what_the_drive_does_or_is_refused() {
        let lock = |is_read_only, lock| {
            let drive = DriveConfig {
                is_read_only: Some(is_read_only),
                lock,
                ..DriveConfig::default()
            };
            drive.lock().map_err(|error| error.to_string())
        };
        assert_eq!(lock(false, None), Ok(Lock::Exclusive));
        assert_eq!(lock(true, None), Ok(Lock::Shared));
        for is_read_only in [false, true] {
            assert_eq!(lock(is_read_only, Some(Lock::None)), Ok(Lock::None));
        }
        let shared = lock(false, Some(Lock::Shared)).expect_err("a writer does not share");
        assert!(shared.contains("set `is_read_only`"), "{shared}");
        let exclusive = lock(true, Some(Lock::Exclusive)).expect_err("a reader has no need of it");
        assert!(exclusive.contains("for drives that write"), "{exclusive}");
        let parsed =
            parsed(r#"{"drive_id": "a", "is_root_device": false, "lock": "none", "lease_at": "/l/a"}"#);
        let parsed = parsed.expect("these are its names");
        assert_eq!(
            (parsed.lock, parsed.lease_at.as_deref()),
            (Some(Lock::None), Some("/l/a"))
        );
    }
}
