//! The two files of a snapshot that no machine is using: looked at, checked, and merged.

use coracle_storage::backend::{Access, Backend};
use coracle_storage::draft::{Draft, DraftError};
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::{self, OpenError};
use coracle_storage::request::Failure;

use super::contents::MEMORY;
use super::disks::DamageError;
use super::load::{LoadError, Snapshot, StateFile};
use super::memory::{self, MergeError, Progress, ReadError, Source, file_bytes};
use crate::state::{State, StateError};

/// Where a snapshot is, or is to be: paths, or URLs of files on servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Files<'a> {
    /// Everything but the memory.
    pub state: &'a str,
    /// The memory.
    pub memory: &'a str,
}

/// Why a snapshot's files are not done with as asked.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The state.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A memory file cannot be opened.
    #[error("cannot read the snapshot's memory")]
    Open(#[from] OpenError),
    /// It is not what was written.
    #[error("`{path}` is not the memory of the snapshot")]
    Read {
        /// The file.
        path: String,
        /// What is wrong.
        #[source]
        source: ReadError,
    },
    /// An overlay is not what was written.
    #[error(transparent)]
    Overlay(#[from] DamageError),
    /// Two memories do not become one.
    #[error("cannot merge `{diff}` into `{base}`")]
    Merge {
        /// The first.
        base: String,
        /// The second.
        diff: String,
        /// Why.
        #[source]
        source: MergeError,
    },
    /// A new file cannot be made, or not get its name.
    #[error("cannot write `{path}`")]
    Draft {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: Box<DraftError>,
    },
    /// Or not be written.
    #[error("cannot write `{path}`")]
    Write {
        /// The file.
        path: String,
        /// What the storage answers.
        #[source]
        source: Failure,
    },
    /// The state cannot be written anew.
    #[error("`{path}` cannot be merged")]
    State {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: StateError,
    },
}

impl Files<'_> {
    /// Reads the state, and checks it.
    ///
    /// # Errors
    ///
    /// When there is none, or it is damaged.
    pub fn read(&self, owner: &Owner) -> Result<Snapshot, FilesError> {
        Ok(StateFile::read(self.state, owner)?.parse()?)
    }

    /// Reads all of it, and checks that it is what was written.
    ///
    /// # Errors
    ///
    /// The first that is not.
    pub fn verify(&self, owner: &Owner, progress: &Progress) -> Result<Snapshot, FilesError> {
        let snapshot = self.read(owner)?;
        let verified = memory::verify(&snapshot.table, self.memory_image(owner)?, progress);
        verified.map_err(|source| FilesError::Read {
            path: self.memory.to_owned(),
            source,
        })?;
        snapshot.overlays.verify()?;
        Ok(snapshot)
    }

    /// Makes `merged` of this snapshot and of `diff`, which goes on from it: what the machine was when `diff` was made. Others
    /// that go on from `diff` go on from `merged` as well.
    ///
    /// # Errors
    ///
    /// When either is damaged, or they do not follow each other; then nothing is left of the new files.
    pub fn merge(
        &self,
        diff: &Files<'_>,
        merged: &Files<'_>,
        owner: &Owner,
        progress: &Progress,
    ) -> Result<(), FilesError> {
        let base_table = self.read(owner)?.table;
        let diff_state = StateFile::read(diff.state, owner)?;
        let diff_table = diff_state.parse()?.table;
        let not_made = |path: &str| {
            let path = path.to_owned();
            move |source| FilesError::Draft {
                path,
                source: Box::new(source),
            }
        };
        let size_bytes = file_bytes(base_table.size_bytes());
        let memory = Draft::create(merged.memory, size_bytes).map_err(not_made(merged.memory))?;
        let image = memory.image().map_err(not_made(merged.memory))?;
        let base = Source {
            table: &base_table,
            image: self.memory_image(owner)?,
        };
        let next = Source {
            table: &diff_table,
            image: diff.memory_image(owner)?,
        };
        let table = memory::merge(base, next, diff_table.id(), image, progress);
        let table = table.map_err(|source| FilesError::Merge {
            base: self.memory.to_owned(),
            diff: diff.memory.to_owned(),
            source,
        })?;
        let bytes = State::parse(diff_state.bytes()).map(|state| state.with(MEMORY, &table.save()));
        let bytes = bytes.map_err(|source| FilesError::State {
            path: diff.state.to_owned(),
            source,
        })?;
        let length = bytes.len() as u64;
        let state = Draft::create(merged.state, length).map_err(not_made(merged.state))?;
        let image = state.image().map_err(not_made(merged.state))?;
        super::write_whole(image, &bytes).map_err(|source| FilesError::Write {
            path: merged.state.to_owned(),
            source,
        })?;
        memory.publish().map_err(not_made(merged.memory))?;
        state.publish().map_err(not_made(merged.state))
    }

    /// The memory file, to be read.
    pub(super) fn memory_image(&self, owner: &Owner) -> Result<Box<dyn Backend>, OpenError> {
        // Nobody writes a memory file once it has its name.
        let terms = Terms::new(Lock::None, owner);
        Ok(open::open(self.memory, Access::ReadOnly, &terms)?.backend)
    }
}
