//! A drive as it is configured, with Firecracker's names, and what opening it yields.

use std::sync::Arc;

use coracle_storage::backend::{Access, Backend};
use coracle_storage::engine::{Engine, PreparedReactor};
use coracle_storage::limit::{RateLimiterConfig, SharedLimiter};
use coracle_storage::open::{OpenError, open};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::device::{QUEUE_SIZE_MAX, QUEUES_MAX};

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
    /// How many virtqueues the guest may use, 1 to 16: one if absent. Local images have a thread for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// The group of drives that share the limits of `PUT /rate-limiter-groups/{group_id}`, beside the drive's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_group: Option<String>,
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
    /// Another image; or the same one, which is then looked at again: it may have grown.
    #[serde(default)]
    pub path_on_host: Option<String>,
    /// The new size of the image in bytes, a multiple of 512: it grows, and the guest is told. It never shrinks.
    #[serde(default)]
    pub size_bytes: Option<u64>,
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
    /// The guest is offered FLUSH, and a flush reaches the medium. It may switch its cache off: then each
    /// write is on the medium when it completes.
    Writeback,
    /// Each write is on the medium when it completes. (Not in Firecracker.)
    Writethrough,
}

/// A drive whose image is open and whose reactor is set up: nothing after this sees a path.
pub struct Disk {
    /// The drive's name.
    pub id: String,
    /// How many queues the guest may use.
    pub queues: u16,
    /// The image, once for each thread that will serve it: for each queue, or for all of them together.
    pub images: Vec<Box<dyn Backend>>,
    /// What will carry their operations out: one for each of the images.
    pub reactors: Vec<PreparedReactor>,
    /// What a flush means.
    pub cache_type: CacheType,
    /// The limits of this disk alone.
    pub rate_limiter: RateLimiterConfig,
    /// The limits that it shares with others.
    pub group: Option<Arc<SharedLimiter>>,
}

impl Disk {
    /// A disk on `image`, with a thread for each of so many queues if the image allows that.
    pub fn new(id: &str, image: Box<dyn Backend>, queues: u16, engine: Engine) -> Self {
        let images = forked(image, usize::from(queues));
        let ops_max = u32::from(QUEUE_SIZE_MAX);
        Self {
            id: id.to_owned(),
            queues,
            reactors: images
                .iter()
                .map(|_| PreparedReactor::new(engine, ops_max))
                .collect(),
            images,
            cache_type: CacheType::default(),
            rate_limiter: RateLimiterConfig::default(),
            group: None,
        }
    }
}

/// The image as often as `threads` can serve it: that many times, or once.
pub(super) fn forked(image: Box<dyn Backend>, threads: usize) -> Vec<Box<dyn Backend>> {
    let forks: Option<Vec<_>> = (1..threads).map(|_| image.fork()).collect();
    let mut images = vec![image];
    images.extend(forks.into_iter().flatten());
    images
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
    /// A number of queues that makes no sense.
    #[error("drive `{drive_id}` asks for {queues} queues: `num_queues` is 1 to {QUEUES_MAX}")]
    Queues {
        /// The drive.
        drive_id: String,
        /// What it asks for.
        queues: u16,
    },
    /// Firecracker's other kind of drive.
    #[error("drive `{drive_id}` names a vhost-user `socket`, which is not supported: use `path_on_host`")]
    Socket {
        /// The drive.
        drive_id: String,
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

    /// Opens the image alone, as a disk swap needs it.
    ///
    /// # Errors
    ///
    /// What is wrong with the image, or with the configuration.
    pub fn open_image(&self) -> Result<Box<dyn Backend>, DriveError> {
        open(self.image_path()?, self.access()).map_err(|source| DriveError::Image {
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
        let image = self.open_image()?;
        let engine = self.io_engine.unwrap_or_default();
        Ok(Disk {
            cache_type: self.cache_type,
            rate_limiter: self.rate_limiter.unwrap_or_default(),
            ..Disk::new(&self.drive_id, image, self.queues()?, engine)
        })
    }

    /// How many virtqueues the guest may use.
    ///
    /// # Errors
    ///
    /// When none, or more than there can be, are asked for.
    pub fn queues(&self) -> Result<u16, DriveError> {
        match self.num_queues.unwrap_or(1) {
            queues @ 1..=QUEUES_MAX => Ok(queues),
            queues => Err(DriveError::Queues {
                drive_id: self.drive_id.clone(),
                queues,
            }),
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
}
