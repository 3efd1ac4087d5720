//! The overlays that belong to a snapshot: files beside its state, and what they add up to.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use coracle_storage::draft::DraftError;
use coracle_storage::draft::directory::DirectoryDraft;
use coracle_storage::overlay::copy::{self, CopyError, Digest, View};
use serde::{Deserialize, Serialize};

use super::memory::Progress;
use crate::state::Body;

/// The overlays of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayStates(pub Vec<OverlayState>);

/// What the overlay of one drive adds up to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayState {
    /// The drive.
    pub drive_id: String,
    /// How long its file is.
    pub length_bytes: u64,
    /// CRC32C of its blocks that are not zeros, as [`Digest::crc32c`] has it.
    pub crc32c: u32,
}

/// The section of [`OverlayStates`]: in snapshots that include their disks.
pub const DISKS: &str = "disks";

/// The files of a snapshot that is a directory; beside them each drive has its [`overlay_file`].
pub const STATE_FILE: &str = "state";
/// The memory.
pub const MEMORY_FILE: &str = "memory";

impl Body for OverlayStates {
    const VERSION: u32 = 1;
}

impl OverlayStates {
    /// What the overlay of drive `id` adds up to, if the snapshot has it.
    pub fn digest(&self, id: &str) -> Option<Digest> {
        let state = self.0.iter().find(|state| state.drive_id == id)?;
        Some(Digest {
            length_bytes: state.length_bytes,
            crc32c: state.crc32c,
        })
    }
}

/// The name of the overlay of drive `id` beside the state.
pub fn overlay_file(id: &str) -> String {
    format!("{id}.overlay")
}

/// Where the state of the snapshot `path` is: in it, if that is a directory on this host.
pub fn state_file(path: &str) -> String {
    if Path::new(path).is_dir() {
        return Path::new(path).join(STATE_FILE).to_string_lossy().into_owned();
    }
    path.to_owned()
}

/// Where the memory of the snapshot `path` is, which is a directory.
pub fn memory_file(path: &str) -> String {
    Path::new(path).join(MEMORY_FILE).to_string_lossy().into_owned()
}

/// A directory in the making, for a snapshot that includes its disks.
pub struct Directory {
    draft: DirectoryDraft,
}

/// Why an overlay is not in the snapshot.
#[derive(Debug, thiserror::Error)]
#[error("cannot save the overlay of drive `{drive_id}`")]
pub struct OverlayError {
    /// The drive.
    pub drive_id: String,
    /// Why.
    #[source]
    pub source: CopyError,
}

impl Directory {
    /// Begins a directory to become `path`.
    ///
    /// # Errors
    ///
    /// When something else is there, or what the host says.
    pub fn create(path: &str) -> Result<Self, DraftError> {
        let draft = DirectoryDraft::create(path, is_part)?;
        Ok(Self { draft })
    }

    /// The path of a file in it.
    pub fn file(&self, name: &str) -> String {
        self.draft.path().join(name).to_string_lossy().into_owned()
    }

    /// Writes what `overlay` has, that of drive `id`, which nobody writes meanwhile, and has it on the medium.
    ///
    /// # Errors
    ///
    /// Why it is not there; [`CopyError::Cancelled`] when `progress` says so.
    pub fn write(&self, id: &str, overlay: &View, progress: &Progress) -> Result<OverlayState, OverlayError> {
        let failed = |source| OverlayError {
            drive_id: id.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.draft.path().join(overlay_file(id)));
        let file = file.map_err(|error| failed(error.into()))?;
        let digest = overlay.write_to(&file, |_| !progress.is_cancelled());
        let digest = digest.map_err(failed)?;
        file.sync_all().map_err(|error| failed(error.into()))?;
        Ok(OverlayState {
            drive_id: id.to_owned(),
            length_bytes: digest.length_bytes,
            crc32c: digest.crc32c,
        })
    }

    /// Gives the directory its name, in one step, and removes what had it.
    ///
    /// # Errors
    ///
    /// When that fails; then what had it is as it was, unless the host cannot tell what it has done.
    pub fn publish(self) -> Result<(), DraftError> {
        self.draft.publish()
    }
}

/// Whether a file of that name belongs to a snapshot that is a directory: what may be beside the state and the memory begins
/// with their names.
fn is_part(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let begins = |of: &str| {
        let rest = name.strip_prefix(of);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    begins(STATE_FILE) || begins(MEMORY_FILE) || name.ends_with(".overlay")
}

/// The overlays beside a state.
#[derive(Debug)]
pub struct SavedOverlays {
    directory: PathBuf,
    states: OverlayStates,
}

impl SavedOverlays {
    /// Those that `states` names, beside the state at `path`.
    pub fn beside(path: &str, states: OverlayStates) -> Self {
        let directory = Path::new(path).parent().unwrap_or(Path::new("")).to_owned();
        Self { directory, states }
    }

    /// Whether the snapshot has none.
    pub fn is_empty(&self) -> bool {
        self.states.0.is_empty()
    }

    /// The overlay of drive `id`, if the snapshot has it, and what it adds up to.
    pub fn of(&self, id: &str) -> Option<(PathBuf, Digest)> {
        let digest = self.states.digest(id)?;
        Some((self.directory.join(overlay_file(id)), digest))
    }

    /// Reads all of them, and checks that they are what was written.
    ///
    /// # Errors
    ///
    /// The first that is not.
    pub fn verify(&self) -> Result<(), DamageError> {
        for state in &self.states.0 {
            let path = self.directory.join(overlay_file(&state.drive_id));
            let found = File::open(&path).and_then(|file| copy::digest(&file));
            let expected = self.states.digest(&state.drive_id);
            match found {
                Ok(found) if Some(found) == expected => {}
                Ok(_) => return Err(DamageError::Damaged(path)),
                Err(source) => return Err(DamageError::Unreadable { path, source }),
            }
        }
        Ok(())
    }
}

/// What is wrong with an overlay of a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum DamageError {
    /// It is another.
    #[error("overlay `{}` of the snapshot is damaged: it is not what was written; take another copy of it", .0.display())]
    Damaged(PathBuf),
    /// It is not there, or not for us.
    #[error("cannot read overlay `{}` of the snapshot", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_replaced_with_files_of_a_snapshot_in_it_only() {
        for name in [
            "state",
            "memory",
            "memory.ws",
            "memory.0123456789abcdef.draft",
            "root.overlay",
        ] {
            assert!(is_part(OsStr::new(name)), "{name}");
        }
        for name in ["statement", "a", "overlay", "memory-2", ".git"] {
            assert!(!is_part(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn overlays_are_beside_the_state_whatever_it_is_called() {
        let states = OverlayStates(vec![OverlayState {
            drive_id: "d".to_owned(),
            length_bytes: 5,
            crc32c: 6,
        }]);
        let saved = SavedOverlays::beside("/s/other", states);
        let digest = Digest {
            length_bytes: 5,
            crc32c: 6,
        };
        assert_eq!(saved.of("d"), Some((PathBuf::from("/s/d.overlay"), digest)));
        assert_eq!(saved.of("e"), None);
        assert!(matches!(saved.verify(), Err(DamageError::Unreadable { .. })));
    }
}
