//! From an overlay's configuration to an image that can be used.

use std::io;
use std::path::Path;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::file::{FileError, OverlayFile, check_absent, check_local};
use super::format::{BaseIdentity, Header, State};
use super::start::Beginning;
use super::{Lifetime, Overlay};
use crate::backend::{Access, Backend};
use crate::blocking::Blocking;
use crate::lease::{Lock, Succession, Terms};
use crate::open::{self, Image, Need, OpenError, Place, directory_of, is_remote};
use crate::request::Failure;

/// A disk that shows a base and keeps what the guest writes elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OverlayConfig {
    /// The image that the guest sees at first. It is only read, and any number of guests may share it.
    pub base: String,
    /// Where writes go: a file, or `memory`.
    pub path: String,
    /// Whether the file outlives the machine, and is used again if it is there. If false, no file of that name may
    /// be there, and nothing is left of it however the machine ends.
    #[serde(default)]
    pub keep: bool,
}

/// The `path` that is no file.
pub const MEMORY: &str = "memory";

/// Why an overlay cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// A field without content.
    #[error("`{0}` of an overlay is empty: `base` names an image, and `path` a file or `memory`")]
    Empty(&'static str),
    /// Memory does not last.
    #[error("an overlay in memory cannot be kept: leave `keep` out, or let `path` name a file")]
    MemoryKept,
    /// The base is only read, and the overlay is written.
    #[error("the overlay and its base are both `{0}`: name another file for the overlay")]
    OneFile(String),
    /// The base cannot be used.
    #[error("the base of the overlay cannot be used")]
    Base(#[from] OpenError),
    /// The base cannot be read.
    #[error("cannot read the base `{path}`")]
    BaseUnreadable {
        /// As configured.
        path: String,
        /// What the storage answers.
        #[source]
        source: Failure,
    },
    /// The base is larger than the format can hold.
    #[error("the base `{path}` has {size_bytes} bytes, which is more than an overlay can cover")]
    BaseTooLarge {
        /// As configured.
        path: String,
        /// Its size.
        size_bytes: u64,
    },
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The overlay is somebody else's, or the base was changed.
    #[error(
        "overlay `{path}` was made on the base `{recorded}` of {recorded_bytes} bytes, and `{base}` of {base_bytes} \
         bytes is another image or was changed since: name the base as it was (`coraclectl disk` takes it by `--base`, \
         and `rebase` by `--old-base`); without a copy of it, what the overlay does not hold itself is lost"
    )]
    WrongBase {
        /// The overlay.
        path: String,
        /// The base that it was made on.
        recorded: String,
        /// The size of that.
        recorded_bytes: u64,
        /// As configured.
        base: String,
        /// The size of that.
        base_bytes: u64,
    },
    /// A commit did not end.
    #[error(
        "a commit of overlay `{path}` into its base was interrupted: run `coraclectl disk commit {path}` once more"
    )]
    Committing {
        /// The overlay.
        path: String,
    },
    /// What a snapshot has is not what it had.
    #[error(
        "overlay `{path}` of the snapshot is damaged: it is not what was written; take another copy of it"
    )]
    Damaged {
        /// The file.
        path: String,
    },
    /// The host says no.
    #[error("cannot use overlay `{path}`")]
    Host {
        /// As configured.
        path: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

impl OverlayConfig {
    /// Checks what can be checked without looking at files.
    ///
    /// # Errors
    ///
    /// The rule that is broken.
    pub fn check_fields(&self) -> Result<(), OverlayError> {
        match self {
            Self { base, .. } if base.is_empty() => Err(OverlayError::Empty("base")),
            Self { path, .. } if path.is_empty() => Err(OverlayError::Empty("path")),
            Self { path, keep: true, .. } if path == MEMORY => Err(OverlayError::MemoryKept),
            Self { base, path, .. } if base == path => Err(OverlayError::OneFile(path.clone())),
            Self { path, .. } => Ok(check_local(path)?),
        }
    }

    /// Says whether [`Self::open`] would succeed now, and changes nothing.
    ///
    /// # Errors
    ///
    /// As [`Self::open`], as far as that can be told.
    pub fn check(&self, terms: &Terms<'_>) -> Result<(), OverlayError> {
        let Image { backend, hold: _hold } = self.open_base(terms)?;
        if self.keep {
            match OverlayFile::open(&self.path) {
                Err(FileError::Missing { .. }) => {}
                file => {
                    let file = file?;
                    file.check_lease(&self.path, terms)?;
                    let (_, identity) = self.identified(backend)?;
                    self.check_file(&file, &identity)?;
                }
            }
        } else if self.path != MEMORY {
            check_absent(&self.path)?;
        }
        Ok(())
    }

    /// Opens the base for reading, and opens or creates the overlay. If `terms` want locks, the base is shared
    /// with other readers, and the overlay is ours alone.
    ///
    /// # Errors
    ///
    /// What is wrong with either, or who has it.
    pub fn open(&self, terms: &Terms<'_>) -> Result<Image, OverlayError> {
        if !self.keep {
            return self.begin(Beginning::Base, terms);
        }
        let Image { backend, mut hold } = self.open_base(terms)?;
        let (base, identity) = self.identified(backend)?;
        let opened = match OverlayFile::open_leased(&self.path, terms) {
            Err(FileError::Missing { .. }) => {
                OverlayFile::create(&self.path, self.header(identity.clone())?)?;
                OverlayFile::open_leased(&self.path, terms)
            }
            opened => opened,
        };
        let (file, lease) = opened?;
        hold.extend(lease);
        self.check_file(&file, &identity)?;
        let bits = file.read_bits().map_err(|source| self.host(source))?;
        let (file, header) = file.into_parts();
        let overlay = Overlay::new(base, Arc::clone(&file), header, &bits, Lifetime::Kept);
        hold.shows(overlay.view(&file));
        let backend = Box::new(overlay);
        Ok(Image { backend, hold })
    }

    /// The places of this host's file system that [`Self::open`] needs.
    pub fn places(&self, lock: Lock, at: Option<&str>) -> Vec<Place> {
        let of_base = base_lock(lock);
        let mut places = open::places(&self.base, Access::ReadOnly, of_base, None);
        if self.path != MEMORY {
            places.extend([
                Place::new(&self.path, Need::Write),
                Place::new(directory_of(&self.path), Need::Make),
            ]);
            places.extend(open::beside(&self.path, lock, at));
        }
        places
    }

    /// Says whether the base could be opened now, and changes nothing.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or who has it.
    pub fn check_base(&self, terms: &Terms<'_>) -> Result<(), OverlayError> {
        self.open_base(terms).map(drop)
    }

    /// Says whether the file, which somebody is filling and has locked, is an overlay over the base.
    ///
    /// # Errors
    ///
    /// That it is none, or one over another.
    pub fn check_copied(&self, terms: &Terms<'_>) -> Result<(), OverlayError> {
        let (_, identity) = self.identified(self.open_base(terms)?.backend)?;
        self.check_file(&OverlayFile::open(&self.path)?, &identity)
    }

    fn open_base(&self, terms: &Terms<'_>) -> Result<Image, OverlayError> {
        self.check_fields()?;
        let shared = Terms {
            lock: base_lock(terms.lock),
            at: None,
            // It is the overlay that is written.
            succession: Succession::default(),
            ..*terms
        };
        Ok(open::open(&self.base, Access::ReadOnly, &shared)?)
    }

    pub(super) fn check_file(&self, file: &OverlayFile, base: &BaseIdentity) -> Result<(), OverlayError> {
        file.header().check_usable(&self.path)?;
        file.header().check_base(&self.path, base)
    }

    /// The base, and who it is.
    pub(super) fn identified(
        &self,
        base: Box<dyn Backend>,
    ) -> Result<(Box<dyn Backend>, BaseIdentity), OverlayError> {
        let mut base = Blocking::new(base).map_err(|source| self.host(source))?;
        // The overlay may be looked at from another directory.
        let path = if is_remote(&self.base) {
            None
        } else {
            std::path::absolute(&self.base).ok()
        };
        let path = path.as_deref().and_then(Path::to_str).unwrap_or(&self.base);
        let identity = BaseIdentity::of(path, &mut base).map_err(|source| OverlayError::BaseUnreadable {
            path: self.base.clone(),
            source,
        })?;
        Ok((base.into_image(), identity))
    }

    pub(super) fn header(&self, base: BaseIdentity) -> Result<Header, OverlayError> {
        let size_bytes = base.size_bytes;
        Header::new(size_bytes, base).ok_or_else(|| OverlayError::BaseTooLarge {
            path: self.base.clone(),
            size_bytes,
        })
    }

    pub(super) fn host(&self, source: io::Error) -> OverlayError {
        OverlayError::Host {
            path: self.path.clone(),
            source,
        }
    }
}

impl Header {
    /// Checks that no commit of the overlay `path` was interrupted.
    ///
    /// # Errors
    ///
    /// When one was.
    pub fn check_usable(&self, path: &str) -> Result<(), OverlayError> {
        match self.state {
            State::Usable => Ok(()),
            State::Committing => Err(OverlayError::Committing {
                path: path.to_owned(),
            }),
        }
    }

    /// Checks that `base` is the one that the overlay `path` was made on.
    ///
    /// # Errors
    ///
    /// Names both.
    pub fn check_base(&self, path: &str, base: &BaseIdentity) -> Result<(), OverlayError> {
        let recorded = &self.base;
        // Its path may be another one: a base is moved, or mounted elsewhere.
        if recorded.size_bytes == base.size_bytes && recorded.fingerprint == base.fingerprint {
            return Ok(());
        }
        Err(OverlayError::WrongBase {
            path: path.to_owned(),
            recorded: recorded.path.clone(),
            recorded_bytes: recorded.size_bytes,
            base: base.path.clone(),
            base_bytes: base.size_bytes,
        })
    }
}

/// How the base is locked under an overlay that is locked like this: others may stand on it, too.
fn base_lock(overlay: Lock) -> Lock {
    match overlay {
        Lock::None => Lock::None,
        Lock::Exclusive | Lock::Shared => Lock::Shared,
    }
}
