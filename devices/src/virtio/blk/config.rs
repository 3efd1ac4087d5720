//! A drive as it is configured, with Firecracker's names, and what opening it yields.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::backend::{Access, Backend};
use coracle_storage::engine::{Engine, PreparedReactor};
use coracle_storage::lease::{Lock, NetworkTerms, Offer, OnError, Owner, Succession, Terms};
use coracle_storage::limit::{RateLimiterConfig, SharedLimiter};
use coracle_storage::open::{self, Hold, Image, OpenError, Place};
use coracle_storage::overlay::{Beginning, OverlayConfig, OverlayError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::device::{QUEUE_SIZE_MAX, QUEUES_MAX};
use super::loss::LossSignal;

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
    /// How many virtqueues the guest may use, 1 to 16: one if absent. Local images have a thread for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub num_queues: Option<u16>,
    /// The group of drives that share the limits of `PUT /rate-limiter-groups/{group_id}`, beside the drive's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_group: Option<String>,
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
    /// What the guest sees while the server of its image does not answer: nothing but time (`wait`, if absent), or after
    /// `timeout_ms` an I/O error (`report`). Only for images of a network. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_error: Option<OnError>,
    /// How long a request waits before it is reported, in milliseconds, 100 to 3600000; 30000 if absent. Only with
    /// `on_error` `report`. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 100, max = 3_600_000))]
    pub timeout_ms: Option<u64>,
    /// The key of a process that has ended for certain and held the image's lease. Only the command line can say it: no
    /// document mentions it.
    #[serde(skip)]
    pub takes_over: Option<u64>,
}

/// Bounds of `timeout_ms`, and what it is if absent.
const TIMEOUT_MS_MIN: u64 = 100;
const TIMEOUT_MS_MAX: u64 = 3_600_000;
const TIMEOUT_MS_DEFAULT: u64 = 30_000;

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
    /// Told when the image serves nobody any more.
    pub loss: Arc<LossSignal>,
}

impl Disk {
    /// A disk on `image`, with a thread for each of so many queues if the image allows that.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub fn new(id: &str, image: Box<dyn Backend>, queues: u16, engine: Engine) -> io::Result<Self> {
        let images = forked(image, usize::from(queues));
        let ops_max = u32::from(QUEUE_SIZE_MAX);
        Ok(Self {
            id: id.to_owned(),
            queues,
            reactors: images
                .iter()
                .map(|image| PreparedReactor::new(engine, ops_max, image.reach()))
                .collect(),
            images,
            cache_type: CacheType::default(),
            rate_limiter: RateLimiterConfig::default(),
            group: None,
            loss: LossSignal::new(id)?,
        })
    }
}

/// The image as often as `threads` can serve it: that many times, or once.
pub(super) fn forked(image: Box<dyn Backend>, threads: usize) -> Vec<Box<dyn Backend>> {
    let forks: Option<Vec<_>> = (1..threads).map(|_| image.fork()).collect();
    let mut images = vec![image];
    images.extend(forks.into_iter().flatten());
    images
}

/// A drive that can be used, and what makes its image ours: to be dropped after the device has ended.
pub struct HeldDisk {
    /// The drive.
    pub disk: Disk,
    /// Its image's lease: to be settled before the device is started.
    pub hold: Hold,
}

/// Why a drive cannot be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// A drive without an image.
    #[error("drive `{drive_id}` names no image: set `path_on_host`, or `overlay`")]
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
    /// A file or a block device with what only an image of a network has.
    #[error(
        "drive `{drive_id}` has {field}, which is for images of a network, and `{path}` is on this host: leave it out"
    )]
    Local {
        /// The drive.
        drive_id: String,
        /// What it has.
        field: &'static str,
        /// Its image, or the base of it.
        path: String,
    },
    /// A time after which nothing happens.
    #[error(
        "drive `{drive_id}` has a `timeout_ms`, and its requests wait: set `on_error` to `report`, or leave it out"
    )]
    TimeoutUnused {
        /// The drive.
        drive_id: String,
    },
    /// A time that makes no sense.
    #[error(
        "drive `{drive_id}` has the `timeout_ms` {timeout_ms}: choose {TIMEOUT_MS_MIN} to {TIMEOUT_MS_MAX} milliseconds"
    )]
    Timeout {
        /// The drive.
        drive_id: String,
        /// As configured.
        timeout_ms: u64,
    },
    /// Two images for one drive.
    #[error("drive `{drive_id}` has both `path_on_host` and `overlay`: leave one of them out")]
    TwoImages {
        /// The drive.
        drive_id: String,
    },
    /// An image that cannot be looked at.
    #[error("the image of drive `{drive_id}` cannot be read")]
    Unread {
        /// The drive.
        drive_id: String,
        /// What the host or the server says.
        #[source]
        source: io::Error,
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
    /// An overlay that is to last, under a cache that nobody empties.
    #[error(
        "drive `{drive_id}` keeps its overlay, and with cache_type `Unsafe` what the overlay has is written down only \
         when the machine ends in order: set cache_type to `Writeback`, or to `Writethrough`"
    )]
    KeptUnsafe {
        /// The drive.
        drive_id: String,
    },
    /// The process has no descriptor left.
    #[error(
        "drive `{drive_id}` needs one more descriptor than the process may have: raise its limit (`ulimit -n`)"
    )]
    Descriptor {
        /// The drive.
        drive_id: String,
        /// What the host says.
        #[source]
        source: io::Error,
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
            overlay
                .check_fields()
                .map_err(|source| self.overlay_error(source))?;
            if overlay.keep && self.cache_type == CacheType::Unsafe {
                return Err(DriveError::KeptUnsafe { drive_id: drive_id() });
            }
            return Ok(&overlay.base);
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

    /// What is asked of an image of a network.
    ///
    /// # Errors
    ///
    /// When anything is, and the image is none; or when it makes no sense.
    pub fn network(&self) -> Result<NetworkTerms, DriveError> {
        let drive_id = || self.drive_id.clone();
        let path = self.image_path()?;
        let field = match self {
            Self {
                on_error: Some(_), ..
            } => Some("`on_error`"),
            Self {
                timeout_ms: Some(_), ..
            } => Some("`timeout_ms`"),
            Self {
                takes_over: Some(_), ..
            } => Some("a key of `--takes-over`"),
            _ => None,
        };
        if let Some(field) = field
            && !open::is_remote(path)
        {
            return Err(DriveError::Local {
                drive_id: drive_id(),
                field,
                path: path.to_owned(),
            });
        }
        let on_error = self.on_error.unwrap_or_default();
        let timeout_ms = match (on_error, self.timeout_ms) {
            (OnError::Wait, None) => None,
            (OnError::Wait, Some(_)) => return Err(DriveError::TimeoutUnused { drive_id: drive_id() }),
            (OnError::Report, timeout_ms) => Some(timeout_ms.unwrap_or(TIMEOUT_MS_DEFAULT)),
        };
        match timeout_ms {
            Some(timeout_ms) if !(TIMEOUT_MS_MIN..=TIMEOUT_MS_MAX).contains(&timeout_ms) => {
                Err(DriveError::Timeout {
                    drive_id: drive_id(),
                    timeout_ms,
                })
            }
            _ => Ok(NetworkTerms {
                on_error,
                timeout: timeout_ms.map(Duration::from_millis),
                takes_over: self.takes_over,
            }),
        }
    }

    /// Says whether the image could be opened now, by `owner`; nothing is kept and nothing is changed.
    ///
    /// # Errors
    ///
    /// What is wrong with the image or the configuration, or who has the image.
    pub fn check_image(&self, owner: &Owner) -> Result<(), DriveError> {
        let (path, terms) = (self.image_path()?, self.terms(owner)?);
        match &self.overlay {
            Some(overlay) => overlay.check(&terms).map_err(|source| self.overlay_error(source)),
            None => open::check(path, self.access(), &terms).map_err(|source| self.refused(source)),
        }
    }

    /// The same, where whoever asks can wait for a network: an image there that `owner` would share is opened, and closed again.
    ///
    /// # Errors
    ///
    /// As [`Self::check_image`].
    pub fn check_reach(&self, owner: &Owner) -> Result<(), DriveError> {
        self.check_image(owner)?;
        let is_shared = self.access() == Access::ReadOnly || self.lock()? == Lock::None;
        if is_shared && self.overlay.is_none() && open::is_remote(self.image_path()?) {
            self.open_image(owner)?;
        }
        Ok(())
    }

    /// Where the file is that the guest writes, if it writes one of its own: what goes along where the drive is copied.
    pub fn own_file(&self) -> Option<&str> {
        match &self.overlay {
            Some(overlay) => Some(&overlay.path),
            None => self.path_on_host.as_deref(),
        }
    }

    /// Says whether what a copy of its file stands on is there: the base, if that is an overlay.
    ///
    /// # Errors
    ///
    /// What is wrong with the base or the configuration.
    pub fn check_ground(&self, owner: &Owner) -> Result<(), DriveError> {
        self.image_path()?;
        let terms = self.terms(owner)?;
        let checked = self.overlay.as_ref().map(|overlay| overlay.check_base(&terms));
        checked
            .unwrap_or(Ok(()))
            .map_err(|source| self.overlay_error(source))
    }

    /// Says whether a copy of its file, which `owner` is filling, fits what it stands on.
    ///
    /// # Errors
    ///
    /// That it does not.
    pub fn check_copied(&self, owner: &Owner) -> Result<(), DriveError> {
        let terms = self.terms(owner)?;
        let checked = self.overlay.as_ref().map(|overlay| overlay.check_copied(&terms));
        checked
            .unwrap_or(Ok(()))
            .map_err(|source| self.overlay_error(source))
    }

    /// Says whether the image is the one that is offered to `owner`; nothing is kept and nothing is changed.
    ///
    /// # Errors
    ///
    /// That it is another, or cannot be handed over.
    pub fn check_offer(&self, owner: &Owner, offer: Offer) -> Result<(), DriveError> {
        let terms = self.terms(owner)?;
        let path = match &self.overlay {
            Some(overlay) => &overlay.path,
            None => self.image_path()?,
        };
        open::check_offer(path, &terms, offer).map_err(|source| self.refused(source))
    }

    /// Opens the image alone and leases it to `owner`, as a disk swap needs it.
    ///
    /// # Errors
    ///
    /// As [`Self::check_image`].
    pub fn open_image(&self, owner: &Owner) -> Result<Image, DriveError> {
        let (path, terms) = (self.image_path()?, self.terms(owner)?);
        match &self.overlay {
            Some(overlay) => overlay.open(&terms).map_err(|source| self.overlay_error(source)),
            None => open::open(path, self.access(), &terms).map_err(|source| self.refused(source)),
        }
    }

    /// Opens the image, leases it to `owner`, who goes on with its generation as `succession` has it, and sets its reactor up;
    /// the lease is yet to be settled.
    ///
    /// # Errors
    ///
    /// As [`Self::check_image`].
    pub fn open(&self, owner: &Owner, succession: Succession) -> Result<HeldDisk, DriveError> {
        let terms = Terms {
            succession,
            ..self.terms(owner)?
        };
        let path = self.image_path()?;
        let begun = match &self.overlay {
            Some(overlay) => overlay.open(&terms).map_err(|source| self.overlay_error(source)),
            None => open::begin(path, self.access(), &terms).map_err(|source| self.refused(source)),
        };
        self.held(begun?)
    }

    /// The same with the drive's `overlay`, which is temporary, and begins with `beginning`: that is to be of the generation that
    /// `succession` has, which it keeps, by the records at `lease_at`, or beside it.
    ///
    /// # Errors
    ///
    /// As [`Self::check_image`]; or what is begun with cannot be used.
    pub fn begin(
        &self,
        owner: &Owner,
        beginning: Beginning<'_>,
        lease_at: Option<&str>,
        succession: Succession,
    ) -> Result<HeldDisk, DriveError> {
        let terms = Terms {
            at: lease_at,
            succession,
            ..self.terms(owner)?
        };
        self.image_path()?;
        let Some(overlay) = &self.overlay else {
            let drive_id = self.drive_id.clone();
            return Err(DriveError::PathMissing { drive_id });
        };
        let begun = overlay.begin(beginning, &terms);
        self.held(begun.map_err(|source| self.overlay_error(source))?)
    }

    fn held(&self, image: Image) -> Result<HeldDisk, DriveError> {
        let Image { backend, hold } = image;
        let engine = self.io_engine.unwrap_or_default();
        let disk = Disk::new(&self.drive_id, backend, self.queues()?, engine);
        let disk = Disk {
            cache_type: self.cache_type,
            rate_limiter: self.rate_limiter.unwrap_or_default(),
            ..disk.map_err(|source| DriveError::Descriptor {
                drive_id: self.drive_id.clone(),
                source,
            })?
        };
        Ok(HeldDisk { disk, hold })
    }

    /// The places of this host's file system that opening it needs; none of a drive that cannot be opened.
    pub fn places(&self) -> Vec<Place> {
        let (Ok(lock), at) = (self.lock(), self.lease_at.as_deref()) else {
            return Vec::new();
        };
        match (&self.overlay, &self.path_on_host) {
            (Some(overlay), _) => overlay.places(lock, at),
            (None, Some(path)) => open::places(path, self.access(), lock, at),
            (None, None) => Vec::new(),
        }
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

    pub(super) fn terms<'a>(&'a self, owner: &'a Owner) -> Result<Terms<'a>, DriveError> {
        Ok(Terms {
            lock: self.lock()?,
            at: self.lease_at.as_deref(),
            owner,
            succession: Succession::default(),
            network: self.network()?,
        })
    }

    pub(super) fn refused(&self, source: OpenError) -> DriveError {
        DriveError::Image {
            drive_id: self.drive_id.clone(),
            source,
        }
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

    #[test]
    fn what_a_guest_sees_of_a_silent_server_is_said_for_images_of_a_network_only() {
        let network = |path: &str, fields: &str| {
            let json =
                format!(r#"{{"drive_id": "a", "is_root_device": false, "path_on_host": "{path}"{fields}}}"#);
            let drive = parsed(&json).expect("these are its names");
            drive.network().map_err(|error| error.to_string())
        };
        let (file, url) = ("/a.img", "iscsi://host/iqn.a/1");
        assert_eq!(network(file, ""), Ok(NetworkTerms::default()));
        assert_eq!(
            network(url, r#", "on_error": "wait""#),
            Ok(NetworkTerms::default())
        );
        for (fields, timeout_ms) in [
            (r#", "on_error": "report""#, 30_000),
            (r#", "on_error": "report", "timeout_ms": 100"#, 100),
            (r#", "on_error": "report", "timeout_ms": 3600000"#, 3_600_000),
        ] {
            let terms = NetworkTerms {
                on_error: OnError::Report,
                timeout: Some(Duration::from_millis(timeout_ms)),
                takes_over: None,
            };
            assert_eq!(network(url, fields), Ok(terms));
        }
        for (path, fields, reason) in [
            (
                file,
                r#", "on_error": "wait""#,
                "has `on_error`, which is for images of a network",
            ),
            (file, r#", "timeout_ms": 500"#, "`/a.img` is on this host"),
            (url, r#", "timeout_ms": 500"#, "set `on_error` to `report`"),
            (
                url,
                r#", "on_error": "report", "timeout_ms": 99"#,
                "choose 100 to 3600000",
            ),
            (
                url,
                r#", "on_error": "report", "timeout_ms": 3600001"#,
                "choose 100 to",
            ),
        ] {
            let error = network(path, fields).expect_err(fields);
            assert!(error.contains(reason), "{error}");
        }
        let mut drive =
            parsed(r#"{"drive_id": "a", "is_root_device": false, "path_on_host": "/a"}"#).expect("a file");
        drive.takes_over = Some(7);
        assert!(matches!(drive.network(), Err(DriveError::Local { .. })));
        drive.path_on_host = Some(url.to_owned());
        assert_eq!(drive.network().map(|terms| terms.takes_over).ok(), Some(Some(7)));
        let shown = serde_json::to_string(&drive).expect("a drive is a document");
        assert!(!shown.contains("takes_over"), "{shown}");
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
