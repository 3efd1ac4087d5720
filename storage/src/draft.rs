//! A new file, here or on an NFS server, that gets its name when it is complete.

pub mod directory;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::backend::{Access, Backend, Discard, Geometry};
use crate::lease::{Lock, Owner, Terms};
use crate::nfs::{NfsUrl, Operator};
use crate::open::{self, OpenError};
use crate::overlay::file::sync_directory_of;
use crate::raw::Raw;

/// A file beside the one that it is to become.
///
/// ```text
///   create ──► draft ──image(), written and flushed──► publish: it has the name, and what had it before is gone
///                └── dropped: nothing is left of it, and what has the name is as it was
/// ```
///
/// A process that is killed leaves the draft, under a name that ends in `.draft`; nobody opens that.
#[derive(Debug)]
pub struct Draft {
    path: String,
    /// The name until it is published.
    draft: String,
    size_bytes: u64,
    place: Place,
    is_there: bool,
}

#[derive(Debug)]
enum Place {
    Host(Arc<File>),
    Export {
        owner: Owner,
        target: Operator,
        draft: Operator,
    },
}

/// Why a file cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// Not a place for files.
    #[error("cannot make a file `{path}`: give it a path on this host, or nfs://HOST/EXPORT/FILE")]
    Scheme {
        /// As configured, without what could be a password.
        path: String,
    },
    /// Something that a file does not replace.
    #[error("`{path}` is there and is no file: name another, or remove it")]
    NotAFile {
        /// As configured.
        path: String,
    },
    /// Something that a directory does not replace.
    #[error("`{path}` is there and is no directory: name another, or remove it")]
    NotADirectory {
        /// As configured.
        path: String,
    },
    /// A directory with something else in it.
    #[error(
        "`{path}` is there and is not replaced: `{name}` in it would be lost; name another, or move that away"
    )]
    Stranger {
        /// As configured.
        path: String,
        /// What is in it.
        name: String,
    },
    /// A directory that would have to be replaced in more than one step.
    #[error(
        "`{path}` is there, and its file system cannot replace a directory in one step: name another, or remove it"
    )]
    Unexchangeable {
        /// As configured.
        path: String,
    },
    /// What the host says.
    #[error("cannot make the file `{path}`")]
    Host {
        /// As configured.
        path: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// What the server says.
    #[error("cannot make the file")]
    Export(#[source] OpenError),
}

/// What the leases of a server know a draft's writer as.
const OWNER: &str = "draft";

impl Draft {
    /// Begins a file of `size_bytes` zeros, which take no space, to become `path`: one on this host, or nfs://HOST/EXPORT/FILE.
    ///
    /// # Errors
    ///
    /// When it cannot be made there.
    pub fn create(path: &str, size_bytes: u64) -> Result<Self, DraftError> {
        let (draft, place) = if NfsUrl::is_url(path) {
            let draft = draft_of(path);
            let place = on_export(path, &draft, size_bytes);
            (draft, place.map_err(DraftError::Export)?)
        } else if open::is_remote(path) {
            let path = crate::iscsi::shown(path);
            return Err(DraftError::Scheme { path });
        } else {
            let draft = draft_beside(path);
            let place = on_host(path, &draft, size_bytes)?;
            (draft, place)
        };
        Ok(Self {
            path: path.to_owned(),
            draft,
            size_bytes,
            place,
            is_there: true,
        })
    }

    /// The file as an image for whoever writes it; on a server each has a session of its own. It is to be flushed and dropped
    /// before [`Self::publish`].
    ///
    /// # Errors
    ///
    /// When the server refuses.
    pub fn image(&self) -> Result<Box<dyn Backend>, DraftError> {
        match &self.place {
            Place::Host(file) => Ok(Box::new(Raw::new(Arc::clone(file), self.geometry()))),
            Place::Export { owner, .. } => {
                // Nobody else knows its name, so there is nobody to tell of a lease.
                let terms = Terms::new(Lock::None, owner);
                let image = open::open(&self.draft, Access::ReadWrite, &terms);
                Ok(image.map_err(DraftError::Export)?.backend)
            }
        }
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            access: Access::ReadWrite,
            discard: Discard::Supported,
        }
    }

    /// Gives the file its name, in one step, instead of what had it. When it returns, that is on the medium.
    ///
    /// # Errors
    ///
    /// When that fails; then nothing is left of the draft, unless the host cannot tell what it has done.
    pub fn publish(mut self) -> Result<(), DraftError> {
        match &self.place {
            Place::Host(file) => {
                let renamed = file.sync_all().and_then(|()| fs::rename(&self.draft, &self.path));
                renamed.map_err(|error| host(&self.path, error))?;
                self.is_there = false;
                sync_directory_of(&self.path).map_err(|error| host(&self.path, error))
            }
            Place::Export { target, draft, .. } => {
                let renamed = target.give_way_to(draft);
                renamed.map_err(|error| DraftError::Export(OpenError::of_nfs(&self.path, error)))?;
                self.is_there = false;
                Ok(())
            }
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_there {
            return;
        }
        let removed = match &self.place {
            Place::Host(_) => fs::remove_file(&self.draft).map_err(|error| error.to_string()),
            Place::Export { draft, .. } => draft.remove().map_err(|error| error.to_string()),
        };
        if let Err(error) = removed {
            log::warn!("`{}` is of no use and can be removed: {error}", self.draft);
        }
    }
}

/// Whether two drafts would become one file, of which the one that is published last would be all that is left: what the names
/// lead to counts, not how they are written.
pub fn is_one_place(one: &str, other: &str) -> bool {
    let image = |path: &str| path.parse::<NfsUrl>().ok().map(|url| url.image);
    match (open::is_remote(one), open::is_remote(other)) {
        (true, true) => one == other || image(one).is_some_and(|name| Some(name) == image(other)),
        (false, false) => entry(one) == entry(other),
        _ => false,
    }
}

/// The entry of a directory that a draft replaces. What has the name may be a link: that is what is replaced, not what it leads
/// to.
fn entry(path: &str) -> (PathBuf, Option<OsString>) {
    let path = Path::new(path);
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let parent = parent.canonicalize().unwrap_or_else(|_| parent.to_owned());
    (parent, path.file_name().map(OsString::from))
}

fn on_host(path: &str, draft: &str, size_bytes: u64) -> Result<Place, DraftError> {
    // What a link leads to is what it would be taken for.
    if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        let path = path.to_owned();
        return Err(DraftError::NotAFile { path });
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(draft)
        .map_err(|error| host(path, error))?;
    file.set_len(size_bytes).map_err(|error| {
        // If this fails, too, the first error is still the one to tell.
        let _ = fs::remove_file(draft);
        host(path, error)
    })?;
    Ok(Place::Host(Arc::new(file)))
}

fn on_export(url: &str, draft_url: &str, size_bytes: u64) -> Result<Place, OpenError> {
    let owner = Owner::of_this_process(OWNER);
    let failed = |error| OpenError::of_nfs(url, error);
    let target = Operator::new(url, None, &owner).map_err(failed)?;
    let draft = Operator::new(draft_url, None, &owner).map_err(failed)?;
    draft.create(size_bytes).map_err(failed)?;
    Ok(Place::Export { owner, target, draft })
}

fn host(path: &str, source: io::Error) -> DraftError {
    let path = path.to_owned();
    DraftError::Host { path, source }
}

/// The URL of a file beside that of `url`.
fn draft_of(url: &str) -> String {
    let (path, options) = url.split_at(url.find('?').unwrap_or(url.len()));
    format!("{}{options}", draft_beside(path))
}

/// A name beside `path` that nobody else takes.
fn draft_beside(path: &str) -> String {
    let number = RandomState::new().build_hasher().finish();
    format!("{path}.{number:016x}.draft")
}
