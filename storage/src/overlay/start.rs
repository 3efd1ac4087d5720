//! Temporary overlays: how one begins.

use std::path::Path;
use std::sync::Arc;

use super::copy::{self, Digest};
use super::file::{self, OverlayFile};
use super::open::{MEMORY, OverlayConfig, OverlayError};
use super::{Lifetime, Overlay};
use crate::backend::Access;
use crate::lease::{Lock, Succession, Terms};
use crate::open::{self, Image};

/// What a temporary overlay shows from the start.
#[derive(Clone, Copy, Debug)]
pub enum Beginning<'a> {
    /// Its base, whoever has written that before.
    Base,
    /// Its base, which is a disk that is gone on with, if that is as the terms want it.
    Disk,
    /// What the overlay file of another machine has, over the same base, if that file is as the terms want it.
    Overlay(&'a str),
    /// What an overlay file of a snapshot has, over the same base, if it still adds up to so much.
    Saved(&'a Path, Digest),
}

impl OverlayConfig {
    /// Opens the base for reading, and makes a temporary overlay over it that begins with `beginning`; [`Self::keep`] is not
    /// looked at.
    ///
    /// Nobody can write the base from now on if `terms` want locks, nor, while it is copied, the overlay that is begun with.
    /// Both are only read, and keep their generations. Where the terms say which one is wanted, or where its records are, they
    /// say it of what is begun with.
    ///
    /// # Errors
    ///
    /// What is wrong with either, or who has it; [`OverlayError::Damaged`] for what does not add up.
    pub fn begin(&self, beginning: Beginning<'_>, terms: &Terms<'_>) -> Result<Image, OverlayError> {
        let reader = Terms {
            lock: match terms.lock {
                Lock::None => Lock::None,
                Lock::Exclusive | Lock::Shared => Lock::Shared,
            },
            ..*terms
        };
        let anyhow_written = Terms {
            at: None,
            succession: Succession::Raises,
            ..reader
        };
        self.check_fields()?;
        let of_base = match beginning {
            Beginning::Disk => &reader,
            Beginning::Base | Beginning::Overlay(_) | Beginning::Saved(..) => &anyhow_written,
        };
        let Image { backend, mut hold } = open::open(&self.base, Access::ReadOnly, of_base)?;
        // A snapshot may take the overlay along: then somebody will ask for its base.
        let (base, identity) = self.identified(backend)?;
        let file = match beginning {
            Beginning::Base | Beginning::Disk => {
                let header = self.header(identity)?;
                if self.path == MEMORY {
                    OverlayFile::in_memory(header)?
                } else {
                    OverlayFile::temporary(&self.path, header)?
                }
            }
            Beginning::Overlay(path) => {
                let (other, lease) = OverlayFile::read_leased(path, &reader)?;
                let copied = self.copied(&other, None);
                // The lease ends with the copy, and after whoever uses the file.
                drop(other);
                drop(lease);
                let file = copied?;
                self.check_file(&file, &identity)?;
                file
            }
            Beginning::Saved(path, expected) => {
                let path = path.to_string_lossy();
                // Nobody writes what belongs to a snapshot.
                let (saved, _) = OverlayFile::read_leased(&path, &Terms::new(Lock::None, terms.owner))?;
                let file = self.copied(&saved, Some((&path, expected)))?;
                self.check_file(&file, &identity)?;
                file
            }
        };
        let bits = match beginning {
            // A new one has none, and those of a large one would take long to read.
            Beginning::Base | Beginning::Disk => Vec::new(),
            Beginning::Overlay(_) | Beginning::Saved(..) => {
                file.read_bits().map_err(|source| self.host(source))?
            }
        };
        let (file, header) = file.into_parts();
        let overlay = Overlay::new(base, Arc::clone(&file), header, &bits, Lifetime::Temporary);
        hold.shows(overlay.view(&file));
        let backend = Box::new(overlay);
        Ok(Image { backend, hold })
    }

    /// A temporary overlay file that is the same as `other`, which adds up to what is `expected` of it.
    fn copied(
        &self,
        other: &OverlayFile,
        expected: Option<(&str, Digest)>,
    ) -> Result<OverlayFile, OverlayError> {
        let empty = if self.path == MEMORY {
            file::memory_file()?
        } else {
            file::temporary_file(&self.path)?
        };
        // Copying a file of another length would be for nothing, and could take long.
        let length_bytes = other.file().metadata().map(|metadata| metadata.len());
        let length_bytes = length_bytes.map_err(|source| self.host(source))?;
        let damaged = |path: &str| OverlayError::Damaged {
            path: path.to_owned(),
        };
        if let Some((path, _)) = expected.filter(|(_, expected)| expected.length_bytes != length_bytes) {
            return Err(damaged(path));
        }
        let found = copy::copy(other.file(), &empty).map_err(|source| self.host(source))?;
        if let Some((path, _)) = expected.filter(|(_, expected)| *expected != found) {
            return Err(damaged(path));
        }
        Ok(OverlayFile::of(empty, &self.path)?)
    }
}
