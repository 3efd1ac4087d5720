//! Making a snapshot of a machine, and going on from one.

use std::path::{Path, PathBuf};

use coracle_storage::open::is_remote;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DriveOverride, KeyPlace};
use crate::snapshot::disks::MEMORY_FILE;

/// The body of `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Where the guest's memory goes: a path, or nfs://HOST/EXPORT/FILE. What is there is replaced once the snapshot is whole.
    pub mem_file_path: String,
    /// Where everything else goes.
    pub snapshot_path: String,
    /// How much of the memory goes there.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Who signs it: an Ed25519 private key in PEM (PKCS#8). Its memory then has hashes in place of checksums. (Not in
    /// Firecracker.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signing_key: Option<KeyPlace>,
    /// What it is encrypted with, by AES-256-GCM: 32 bytes, or 64 hexadecimal digits. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption_key: Option<KeyPlace>,
    /// Whether the overlays of drives are saved as well: `snapshot_path` is then a directory on this host, which gets the files
    /// `state`, `memory` and `<drive_id>.overlay`, and replaces what it was in one step; `mem_file_path` has to name `memory` in
    /// it. Every drive that writes needs an overlay. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub include_disks: bool,
}

/// How much of the guest's memory a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SnapshotType {
    /// What was written since the last snapshot, or since the machine was loaded: to be merged with that. Needs
    /// `track_dirty_pages`.
    Diff,
    /// All of it.
    #[default]
    Full,
}

impl SnapshotCreate {
    /// Says whether the fields fit each other.
    ///
    /// # Errors
    ///
    /// Those that do not.
    pub fn check(&self) -> Result<(), SnapshotCreateError> {
        if self.mem_file_path == self.snapshot_path {
            return Err(SnapshotCreateError::OneFile);
        }
        if !self.include_disks {
            return Ok(());
        }
        if is_remote(&self.snapshot_path) {
            return Err(SnapshotCreateError::RemoteDirectory);
        }
        if self.snapshot_type == SnapshotType::Diff {
            return Err(SnapshotCreateError::DiffOfDisks);
        }
        if self.signing_key.is_some() || self.encryption_key.is_some() {
            return Err(SnapshotCreateError::ProtectedDisks);
        }
        let memory = Path::new(&self.snapshot_path).join(MEMORY_FILE);
        if Path::new(&self.mem_file_path) != memory {
            let memory = memory.display().to_string();
            return Err(SnapshotCreateError::MemoryElsewhere { memory });
        }
        Ok(())
    }
}

/// Why a snapshot is not made as it was asked for.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum SnapshotCreateError {
    #[error("mem_file_path and snapshot_path are the same file")]
    OneFile,
    #[error("include_disks: snapshot_path is a directory on this host then, and cannot be on a server")]
    RemoteDirectory,
    #[error("include_disks: snapshot_type has to be Full")]
    DiffOfDisks,
    #[error(
        "include_disks: overlays are saved with checksums, and are neither signed nor encrypted: leave signing_key and \
         encryption_key out, or the disks"
    )]
    ProtectedDisks,
    #[error("include_disks: snapshot_path is a directory then, and mem_file_path has to be `{memory}`")]
    MemoryElsewhere { memory: String },
}

/// The body of `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// Where everything but the memory is.
    pub snapshot_path: String,
    /// Deprecated: see `track_dirty_pages`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enable_diff_snapshots: Option<bool>,
    /// Whether the pages that the guest writes are recorded from now on, for incremental snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Deprecated: a `mem_backend` of type File.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<String>,
    /// Where the memory is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemBackend>,
    /// Whether the guest runs on at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other images for drives, or other names of theirs. Only with `disks` `Detached`: nothing in a snapshot says which image it
    /// was. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drive_overrides: Vec<DriveOverride>,
    /// Interfaces that are on other taps than when the snapshot was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another path for the vsock device, whose socket is made anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// What is checked of the memory. (Not in Firecracker.)
    #[serde(default)]
    pub verify: Verify,
    /// A file with the Ed25519 public keys, in PEM, of which one must have signed the snapshot. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trusted_keys: Option<PathBuf>,
    /// What the snapshot was encrypted with; one that is not encrypted is refused then. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption_key: Option<KeyPlace>,
    /// How the disks are gone on with. (Not in Firecracker.)
    #[serde(default)]
    pub disks: Disks,
    /// The directory where the overlays lie that `Clone` and `Detached` make; they have no name there, and nothing is left of
    /// them. If absent, they are in memory. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_directory: Option<String>,
}

/// How the disks of a snapshot that are written are gone on with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Disks {
    /// By writing them, if nobody has since the snapshot: so it is gone on from once. A temporary overlay that the snapshot
    /// includes is copied.
    #[default]
    Continue,
    /// Each by a temporary overlay over it, if nobody has written it since the snapshot; any number of machines may have one at a
    /// time, and nobody writes the disk meanwhile. An overlay that was kept is copied into the temporary one: that of the
    /// snapshot, if it includes its disks.
    Clone,
    /// The same for disks that may have been written since, or are others: what the guest remembers of them may not be so any
    /// more. It is told to look at their sizes again.
    Detached,
}

/// Where a guest's memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    /// The memory file, or the socket of whoever fills the memory.
    pub backend_path: String,
    /// Which of the two it is.
    pub backend_type: MemBackendType,
}

/// Who fills a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MemBackendType {
    /// This program, from the memory file: a path, or nfs://HOST/EXPORT/FILE.
    File,
    /// Another process, by userfaultfd.
    Uffd,
}

/// What is checked of a snapshot's memory before its guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// The checksum of each part, as it is loaded, before the guest sees a byte of it.
    #[default]
    Lazy,
    /// Nothing: the file is mapped as it is. Only for a file of this host that nobody else can change.
    Off,
}

/// Another tap device for a network interface of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// The tap device.
    pub host_dev_name: String,
}

/// Another socket for the vsock device of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The path of the socket.
    pub uds_path: String,
}

/// The body of `PATCH /snapshot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotPatch {
    /// What is to become of the snapshot that is being made.
    pub state: SnapshotWish,
}

/// What is to become of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SnapshotWish {
    /// It is given up, and nothing of it is left.
    Cancelled,
}

/// The answer to `GET /snapshot`: how far the snapshot is that is being made or loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotProgress {
    /// What is being done.
    pub state: SnapshotStage,
    /// How much of the memory is done, in bytes.
    pub done_bytes: u64,
    /// How much there is to do, in bytes.
    pub total_bytes: u64,
}

/// What is being done with a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SnapshotStage {
    /// Nothing.
    Idle,
    /// It is being made: the machine stays paused until it is whole.
    Creating,
    /// The guest's memory is being loaded, also while the guest runs.
    Loading,
}

/// Why a snapshot is not loaded as it was asked for.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum SnapshotLoadError {
    #[error(
        "`drive_overrides` can name another image than the guest remembers, and nothing in the snapshot says which it was: set \
         `disks` to `Detached` if you know"
    )]
    OtherDisks,
    #[error("missing field: either `mem_backend` or `mem_file_path` is required")]
    NoMemory,
    #[error("too many fields: either `mem_backend` or `mem_file_path` exclusively is required")]
    TwoMemories,
    #[error(
        "mem_backend of type Uffd: memory filled by another process is not built into this version; use File"
    )]
    Uffd,
    #[error(
        "only what a key in `{keys}` has signed may be loaded, and of memory that is not checked nobody can tell: leave `verify` \
         at `lazy`, and take a `mem_backend` of type File"
    )]
    NotChecked { keys: String },
    #[error(
        "memory that is encrypted is decrypted as it is checked: leave `verify` at `lazy`, and take a `mem_backend` of type File"
    )]
    NotDecrypted,
}

impl SnapshotLoad {
    /// Where the memory comes from, and what is there.
    ///
    /// # Errors
    ///
    /// What is asked for that is not built, or is contradictory.
    pub fn memory(&self) -> Result<(&str, MemBackendType), SnapshotLoadError> {
        match (&self.mem_backend, &self.mem_file_path) {
            (None, None) => Err(SnapshotLoadError::NoMemory),
            (Some(_), Some(_)) => Err(SnapshotLoadError::TwoMemories),
            (None, Some(path)) => Ok((path, MemBackendType::File)),
            (Some(backend), None) => Ok((&backend.backend_path, backend.backend_type)),
        }
    }

    /// Says whether the other fields fit each other.
    ///
    /// # Errors
    ///
    /// Those that do not.
    pub fn check(&self) -> Result<(), SnapshotLoadError> {
        match (&self.drive_overrides[..], self.disks) {
            ([], _) | (_, Disks::Detached) => Ok(()),
            (_, Disks::Continue | Disks::Clone) => Err(SnapshotLoadError::OtherDisks),
        }
    }

    /// Whether pages that are written are recorded from now on.
    pub fn tracks_dirty_pages(&self) -> bool {
        self.track_dirty_pages || self.enable_diff_snapshots == Some(true)
    }

    /// Whether a field was used that Firecracker has deprecated.
    pub fn is_deprecated(&self) -> bool {
        self.mem_file_path.is_some() || self.enable_diff_snapshots.is_some()
    }
}
