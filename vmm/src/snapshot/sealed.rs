//! A snapshot for many machines at once: checked as a whole, and then where nobody can change it.
//!
//! ```text
//!   state, memory: here or on a server ──read, checked──► two memfds ──sealed──► each machine maps the memory, copy-on-write
//! ```
//!
//! Whoever may write the snapshot's own files could do so between a check and the last machine's mapping, and to a mapped file
//! for as long as the guests live. A sealed memfd is written by nobody, this process included, and nobody makes it shorter. It
//! takes the place of the memory once in the host's memory, holes left out, for as long as one machine maps it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::files::{Files, FilesError, Reader};
use super::load::{LoadError, Snapshot, StateFile};
use super::memory::{self, CopyError, Kind, Progress, file_bytes};
use crate::state::StateError;

/// A snapshot that was checked, and that nobody can change any more.
pub struct Sealed {
    /// What it says.
    pub snapshot: Snapshot,
    state: File,
    memory: File,
    /// The state's own file, if overlays lie beside it.
    beside: Option<String>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The files.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// Its memory is not to lie about as it is.
    #[error(
        "snapshot `{path}` is encrypted, and clones share its memory as it is: load it with its key, and save it again without \
         one where clones may be made of it"
    )]
    Encrypted {
        /// The file.
        path: String,
    },
    /// The memory file has only what was written since another snapshot.
    #[error(
        "the snapshot of memory file `{path}` is a diff: merge it into the one that it goes on from, and clone what comes of it"
    )]
    Diff {
        /// The file.
        path: String,
    },
    /// The memory is damaged, cannot be read, or finds no room.
    #[error("cannot take `{path}` into memory")]
    Copy {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: CopyError,
    },
    /// The host gives no memory.
    #[error("the host has no memory to hold the snapshot `{path}`")]
    Host {
        /// The file.
        path: String,
        /// What it says.
        #[source]
        source: io::Error,
    },
}

impl Files<'_> {
    /// Reads all of it once, checks that it is what was written, and holds it where nobody changes it. One that is encrypted is
    /// not decrypted by that.
    ///
    /// # Errors
    ///
    /// When it is damaged, cannot be read, or finds no room.
    pub fn seal(&self, reader: &Reader<'_>, progress: &Progress) -> Result<Sealed, SealError> {
        let file = StateFile::read(self.state, reader.owner).map_err(FilesError::from)?;
        let snapshot = file.parse(reader.keys).map_err(|error| match error {
            LoadError::State {
                path,
                source: StateError::NoKey,
            } => SealError::Encrypted { path },
            error => FilesError::from(error).into(),
        })?;
        let host = |path: &str| {
            let path = path.to_owned();
            move |source| SealError::Host { path, source }
        };
        if snapshot.table.kind() != Kind::Full {
            let path = self.memory.to_owned();
            return Err(SealError::Diff { path });
        }
        let image = self.memory_image(reader.owner).map_err(FilesError::from)?;
        let size_bytes = file_bytes(snapshot.table.size_bytes());
        let memory = memfd("snapshot-memory", size_bytes).map_err(host(self.memory))?;
        memory::copy(&snapshot.table, image, &memory, progress).map_err(|source| SealError::Copy {
            path: self.memory.to_owned(),
            source,
        })?;
        seal(&memory).map_err(host(self.memory))?;
        let bytes = file.bytes();
        let state = memfd("snapshot-state", bytes.len() as u64).map_err(host(self.state))?;
        let written = state.write_all_at(bytes, 0).and_then(|()| seal(&state));
        written.map_err(host(self.state))?;
        let beside = (!snapshot.overlays.is_empty()).then(|| self.state.to_owned());
        Ok(Sealed {
            snapshot,
            state,
            memory,
            beside,
        })
    }
}

impl Sealed {
    /// Where other processes of this user open the state, as long as this is there: the file itself, where overlays lie beside
    /// that. Whoever loads a state checks it, and takes no memory but its own.
    pub fn state_path(&self) -> String {
        match &self.beside {
            Some(path) => path.clone(),
            None => path_of(&self.state),
        }
    }

    /// The same for the memory; a mapping of it stays when this is gone.
    pub fn memory_path(&self) -> String {
        path_of(&self.memory)
    }
}

fn path_of(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

fn memfd(name: &str, size_bytes: u64) -> io::Result<File> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, size_bytes)?;
    Ok(file.into())
}

fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    Ok(fcntl_add_seals(file, seals)?)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn what_is_sealed_is_read_by_its_path_and_written_by_nobody() {
        let file = memfd("test", 8192).unwrap();
        file.write_all_at(b"content", 0).unwrap();
        seal(&file).unwrap();
        let mut options = OpenOptions::new();
        let other = options.read(true).write(true).open(path_of(&file)).unwrap();
        for file in [&file, &other] {
            let mut bytes = [0; 7];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(&bytes, b"content");
            assert!(file.write_all_at(b"other", 0).is_err());
            assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
        }
    }
}
