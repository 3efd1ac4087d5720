//! Persistent memory as it is configured, with Firecracker's names, and what opening it yields.

use std::sync::Arc;

use coracle_storage::backend::Access;
use coracle_storage::lease::{Lock, NetworkTerms, Owner, Succession, Terms};
use coracle_storage::limit::RateLimiterConfig;
use coracle_storage::open::{self, Hold, OpenError, Place};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::medium::Medium;

/// A file that the guest has in its address space: the body of `PUT /pmem/{id}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// Names the device.
    pub id: String,
    /// The file on this host.
    pub path_on_host: String,
    /// Whether the kernel finds its root there. False if absent.
    #[serde(default)]
    pub root_device: bool,
    /// Whether the guest may only read. False if absent.
    #[serde(default)]
    pub read_only: bool,
    /// Limits on flushes, each of which counts as many bytes as the file has.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// New limits: the body of `PATCH /pmem/{id}`; a bucket that is left out stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PartialPmem {
    /// The device.
    pub id: String,
    /// Limits on flushes.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// A file that can be mapped, and what makes it ours: to be dropped after the mapping.
pub struct HeldPmem {
    /// The file.
    pub medium: Arc<Medium>,
    /// Its lease: to be settled before anything is written.
    pub hold: Hold,
}

/// Why persistent memory cannot be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// No file.
    #[error("pmem device `{id}` names no file: set `path_on_host`")]
    PathMissing {
        /// The device.
        id: String,
    },
    /// The file is not usable.
    #[error("pmem device `{id}` cannot be used")]
    File {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: OpenError,
    },
}

impl PmemConfig {
    /// The access to the file that the device asks for.
    pub fn access(&self) -> Access {
        if self.read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        }
    }

    /// Says whether the file could be had now, by `owner`; nothing is kept and nothing is changed.
    ///
    /// # Errors
    ///
    /// What is wrong with the file, or who has it.
    pub fn check_file(&self, owner: &Owner) -> Result<(), PmemError> {
        let checked = open::check_mappable(
            self.path()?,
            self.access(),
            &self.terms(owner, Succession::Raises),
        );
        checked.map_err(|source| self.refused(source))
    }

    /// Opens the file and leases it to `owner`, who goes on with its generation as `succession` has it; the lease is yet to be
    /// settled.
    ///
    /// # Errors
    ///
    /// As [`Self::check_file`].
    pub fn open(&self, owner: &Owner, succession: Succession) -> Result<HeldPmem, PmemError> {
        let begun = open::begin_mappable(self.path()?, self.access(), &self.terms(owner, succession));
        let open::Mappable {
            file,
            size_bytes,
            hold,
        } = begun.map_err(|source| self.refused(source))?;
        let medium = Arc::new(Medium::new(file, size_bytes, self.access()));
        Ok(HeldPmem { medium, hold })
    }

    /// The places of this host's file system that opening it needs.
    pub fn places(&self) -> Vec<Place> {
        open::places(&self.path_on_host, self.access(), self.lock(), None)
    }

    fn path(&self) -> Result<&str, PmemError> {
        match self.path_on_host.as_str() {
            "" => Err(PmemError::PathMissing { id: self.id.clone() }),
            path => Ok(path),
        }
    }

    /// The same as that of a drive.
    fn lock(&self) -> Lock {
        match self.access() {
            Access::ReadOnly => Lock::Shared,
            Access::ReadWrite => Lock::Exclusive,
        }
    }

    fn terms<'a>(&self, owner: &'a Owner, succession: Succession) -> Terms<'a> {
        Terms {
            lock: self.lock(),
            at: None,
            owner,
            succession,
            network: NetworkTerms::default(),
        }
    }

    fn refused(&self, source: OpenError) -> PmemError {
        PmemError::File {
            id: self.id.clone(),
            source,
        }
    }
}
