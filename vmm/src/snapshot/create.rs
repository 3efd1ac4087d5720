//! Making a snapshot of a machine that stands still: on a thread of its own, into two files that replace others when both are
//! whole.

use std::sync::Arc;

use coracle_storage::draft::{Draft, DraftError};
use coracle_storage::overlay::copy::{CopyError, View};
use coracle_storage::request::Failure;
use coracle_storage::secret::SecretSource;
use vm_memory::GuestMemoryMmap;

use super::contents::MEMORY;
use super::disks::{self, DISKS, Directory, MEMORY_FILE, OverlayStates, STATE_FILE};
use super::memory::{Content, MemoryId, PageSet, Progress, Seal, Untouched, WriteError, file_bytes, write};
use crate::config::SnapshotCreate;
use crate::keys::{KeyError, Protection};
use crate::state::Sections;

/// Everything that it takes to make a snapshot.
pub struct Job {
    /// Where it goes.
    pub files: SnapshotCreate,
    /// The sections of the machine.
    pub sections: Sections,
    /// The guest's memory, which nobody writes meanwhile.
    pub memory: Arc<GuestMemoryMmap>,
    /// Which pages of it go to the file.
    pub pages: Pages,
    /// The overlays that belong to it, by the ids of their drives; nobody writes them meanwhile. If there are to be none, it is
    /// no directory.
    pub overlays: Option<Vec<(String, View)>>,
    /// How far it is, and how it is given up.
    pub progress: Arc<Progress>,
}

/// Which pages of a memory are written.
#[derive(Debug)]
pub enum Pages {
    /// All that are not zeros.
    All(Untouched),
    /// Those of these that somebody has touched, and that are not zeros: the others are none of the guest's, or began as zeros.
    Touched(PageSet),
    /// Those of these that are not zeros: the others are none of the guest's.
    Among(PageSet),
    /// Those that were written since another snapshot.
    Written {
        /// The memory of that.
        parent: MemoryId,
        /// The pages.
        written: PageSet,
        /// The pages that the guest has, if not all: it has had others, which nobody looks at.
        there: Option<PageSet>,
    },
}

/// Why there is no snapshot. What was there under its names is as it was, unless the error says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A key is none.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// There is no identity for it.
    #[error("the host has no random bytes for the snapshot's id")]
    Random(#[source] std::io::Error),
    /// One of the files cannot be made, or not get its name.
    #[error("cannot write `{path}`")]
    Draft {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: Box<DraftError>,
    },
    /// The memory cannot be written.
    #[error("cannot write `{path}`")]
    Memory {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: WriteError,
    },
    /// The state cannot be written.
    #[error("cannot write `{path}`")]
    State {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: Failure,
    },
    /// The memory has its name and the state has not.
    #[error(
        "cannot give the snapshot's state its name `{path}`: the new memory is under `{memory_path}` already, and what is \
         under the other name does not belong to it; make the snapshot again"
    )]
    Halfway {
        /// The file.
        path: String,
        /// The other.
        memory_path: String,
        /// Why.
        #[source]
        source: Box<DraftError>,
    },
    /// An overlay cannot be written.
    #[error(transparent)]
    Overlay(#[from] disks::OverlayError),
    /// Somebody wanted it no more.
    #[error("the snapshot was cancelled; nothing of it is left")]
    Cancelled,
}

impl Job {
    /// Does it all, and returns the name of the memory that was written. Waits for the storage.
    ///
    /// # Errors
    ///
    /// [`CreateError`]; then nothing is left of the new files.
    pub fn run(mut self) -> Result<MemoryId, CreateError> {
        let Some(overlays) = self.overlays.take() else {
            return self.write();
        };
        let path = self.files.snapshot_path.clone();
        let directory = Directory::create(&path).map_err(failed(&path))?;
        let progress = Arc::clone(&self.progress);
        let saved = overlays
            .iter()
            .map(|(id, overlay)| directory.write(id, overlay, &progress));
        let saved = saved
            .collect::<Result<_, _>>()
            .map_err(|error| match error.source {
                CopyError::Cancelled => CreateError::Cancelled,
                _ => error.into(),
            })?;
        self.sections.add(DISKS, &OverlayStates(saved));
        // In the directory both get their names, and then it its own.
        self.files.mem_file_path = directory.file(MEMORY_FILE);
        self.files.snapshot_path = directory.file(STATE_FILE);
        let id = self.write()?;
        if progress.is_cancelled() {
            return Err(CreateError::Cancelled);
        }
        directory.publish().map_err(failed(&path))?;
        Ok(id)
    }

    /// Writes memory and state.
    fn write(mut self) -> Result<MemoryId, CreateError> {
        // Before anything is written: a key that cannot be read costs nothing.
        let protection = self.protection()?;
        let id = MemoryId::random().map_err(CreateError::Random)?;
        let SnapshotCreate {
            mem_file_path,
            snapshot_path,
            ..
        } = &self.files;
        let (memory_draft, table) = self.write_memory(id, Seal::new(id, &protection))?;
        self.sections.add(MEMORY, &table.save());
        let state = std::mem::take(&mut self.sections).finish_with(&protection);
        let state_draft = self.write_state(&state)?;
        if self.progress.is_cancelled() {
            return Err(CreateError::Cancelled);
        }
        // From here on there is no way back: whoever loads the old state finds that the memory is another's.
        memory_draft.publish().map_err(failed(mem_file_path))?;
        state_draft.publish().map_err(|source| CreateError::Halfway {
            path: snapshot_path.clone(),
            memory_path: mem_file_path.clone(),
            source: Box::new(source),
        })?;
        Ok(id)
    }

    fn protection(&self) -> Result<Protection, KeyError> {
        let signing = self.files.signing_key.as_ref().map(SecretSource::from);
        let encryption = self.files.encryption_key.as_ref().map(SecretSource::from);
        Protection::read(signing.as_ref(), encryption.as_ref())
    }

    fn write_memory(
        &self,
        id: MemoryId,
        seal: Seal,
    ) -> Result<(Draft, super::memory::MemoryTable), CreateError> {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        let path = &self.files.mem_file_path;
        let size_bytes = self.memory.iter().map(GuestMemoryRegion::len).sum();
        let draft = Draft::create(path, file_bytes(size_bytes)).map_err(failed(path))?;
        let content = match &self.pages {
            Pages::All(untouched) => Content::Full(*untouched),
            Pages::Touched(pages) => Content::Touched(pages),
            Pages::Among(pages) => Content::Among(pages),
            Pages::Written {
                parent,
                written,
                there,
            } => Content::Diff {
                parent: *parent,
                written,
                there: there.as_ref(),
            },
        };
        let image = draft.image().map_err(failed(path))?;
        let table =
            write(&self.memory, (id, seal), content, image, &self.progress).map_err(
                |source| match source {
                    WriteError::Cancelled => CreateError::Cancelled,
                    source => CreateError::Memory {
                        path: path.clone(),
                        source,
                    },
                },
            )?;
        Ok((draft, table))
    }

    fn write_state(&self, state: &[u8]) -> Result<Draft, CreateError> {
        let path = &self.files.snapshot_path;
        let draft = Draft::create(path, state.len() as u64).map_err(failed(path))?;
        let image = draft.image().map_err(failed(path))?;
        let written = super::write_whole(image, state);
        written.map_err(|source| CreateError::State {
            path: path.clone(),
            source,
        })?;
        Ok(draft)
    }
}

fn failed(path: &str) -> impl FnOnce(DraftError) -> CreateError + '_ {
    move |source| CreateError::Draft {
        path: path.to_owned(),
        source: Box::new(source),
    }
}
