//! The two files of a snapshot that no machine is using: looked at, checked, and merged.

use coracle_storage::backend::Backend;
use coracle_storage::draft::{self, Draft, DraftError};
use coracle_storage::lease::Owner;
use coracle_storage::request::Failure;

use super::contents::MEMORY;
use super::disks::DamageError;
use super::load::{LoadError, Snapshot, StateFile};
use super::memory::{self, MergeError, Progress, ReadError, Seal, Source, file_bytes};
use super::unopened::{self, Part, UnopenedError};
use crate::keys::{KeyError, Protection, PublicKey, ReadingKeys, SigningKey, SnapshotCipher};
use crate::state::{State, StateError};

/// Where a snapshot is, or is to be: paths, or URLs of files on servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Files<'a> {
    /// Everything but the memory.
    pub state: &'a str,
    /// The memory.
    pub memory: &'a str,
}

/// Who reads a snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    /// In whose name files are opened.
    pub owner: &'a Owner,
    /// Whom it has to be from, and what it is decrypted with.
    pub keys: &'a ReadingKeys,
}

/// Why a snapshot's files are not done with as asked.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The state.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// What is merged would have lost a signature.
    #[error(
        "`{path}` was signed, by {signer}, and what comes of it would be by nobody: say who signs it (--signing-key)"
    )]
    NotSigned {
        /// The file.
        path: String,
        /// Who has signed it.
        signer: PublicKey,
    },
    /// The host has no random bytes to encrypt with.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A memory file cannot be opened.
    #[error(transparent)]
    Open(#[from] UnopenedError),
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
    /// Of two new files only one would be left.
    #[error("the merged state and the merged memory are both to be `{path}`: name two files")]
    OnePlace {
        /// The file.
        path: String,
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
    pub fn read(&self, reader: &Reader<'_>) -> Result<Snapshot, FilesError> {
        Ok(StateFile::read(self.state, reader.owner)?.parse(reader.keys)?)
    }

    /// Reads all of it, and checks that it is what was written.
    ///
    /// # Errors
    ///
    /// The first that is not.
    pub fn verify(&self, reader: &Reader<'_>, progress: &Progress) -> Result<Snapshot, FilesError> {
        let snapshot = self.read(reader)?;
        let verified = memory::verify(&snapshot.table, self.memory_image(reader.owner)?, progress);
        verified.map_err(|source| FilesError::Read {
            path: self.memory.to_owned(),
            source,
        })?;
        snapshot.overlays.verify()?;
        Ok(snapshot)
    }

    /// Makes `merged` of this snapshot and of `diff`, which goes on from it: what the machine was when `diff` was made. Others
    /// that go on from `diff` go on from `merged` as well. It is encrypted with the key that both are read with, if they are, and
    /// signed with `signing`.
    ///
    /// # Errors
    ///
    /// When either is damaged, or they do not follow each other, or one is signed and `merged` would not be; then nothing is
    /// left of the new files.
    pub fn merge(
        &self,
        diff: &Files<'_>,
        merged: &Files<'_>,
        reader: &Reader<'_>,
        signing: Option<SigningKey>,
        progress: &Progress,
    ) -> Result<(), FilesError> {
        if draft::is_one_place(merged.state, merged.memory) {
            return Err(FilesError::OnePlace {
                path: merged.state.to_owned(),
            });
        }
        let protection = Protection {
            signing,
            // A salt of its own, or the same key would encrypt other chunks under the same numbers.
            cipher: reader
                .keys
                .encryption
                .clone()
                .map(SnapshotCipher::new)
                .transpose()?,
        };
        let base_snapshot = self.read(reader)?;
        let diff_state = StateFile::read(diff.state, reader.owner)?;
        let diff_snapshot = diff_state.parse(reader.keys)?;
        check_signed(self, &base_snapshot, &protection)?;
        check_signed(diff, &diff_snapshot, &protection)?;
        let size_bytes = file_bytes(base_snapshot.table.size_bytes());
        let memory = Draft::create(merged.memory, size_bytes).map_err(not_made(merged.memory))?;
        let image = memory.image().map_err(not_made(merged.memory))?;
        let id = diff_snapshot.table.id();
        let table = memory::merge(
            self.source(&base_snapshot, reader)?,
            diff.source(&diff_snapshot, reader)?,
            (id, Seal::new(id, &protection)),
            image,
            progress,
        );
        let table = table.map_err(|source| FilesError::Merge {
            base: self.memory.to_owned(),
            diff: diff.memory.to_owned(),
            source,
        })?;
        let state = State::parse(diff_state.bytes(), reader.keys);
        let state = state.map_err(|source| FilesError::State {
            path: diff.state.to_owned(),
            source,
        })?;
        let state = state.with(MEMORY, &table.save()).finish_with(&protection);
        let state = merged.write_state(&state)?;
        memory.publish().map_err(not_made(merged.memory))?;
        state.publish().map_err(not_made(merged.state))
    }

    fn source<'t>(&self, snapshot: &'t Snapshot, reader: &Reader<'_>) -> Result<Source<'t>, FilesError> {
        Ok(Source {
            table: &snapshot.table,
            image: self.memory_image(reader.owner)?,
        })
    }

    fn write_state(&self, state: &[u8]) -> Result<Draft, FilesError> {
        let draft = Draft::create(self.state, state.len() as u64).map_err(not_made(self.state))?;
        let image = draft.image().map_err(not_made(self.state))?;
        super::write_whole(image, state).map_err(|source| FilesError::Write {
            path: self.state.to_owned(),
            source,
        })?;
        Ok(draft)
    }

    /// The memory file, to be read.
    pub(super) fn memory_image(&self, owner: &Owner) -> Result<Box<dyn Backend>, UnopenedError> {
        unopened::open(Part::Memory, self.memory, owner)
    }
}

fn not_made(path: &str) -> impl FnOnce(DraftError) -> FilesError + '_ {
    move |source| FilesError::Draft {
        path: path.to_owned(),
        source: Box::new(source),
    }
}

/// What was signed does not become what is not.
fn check_signed(files: &Files<'_>, snapshot: &Snapshot, protection: &Protection) -> Result<(), FilesError> {
    match (snapshot.signer, &protection.signing) {
        (Some(signer), None) => Err(FilesError::NotSigned {
            path: files.state.to_owned(),
            signer,
        }),
        _ => Ok(()),
    }
}
