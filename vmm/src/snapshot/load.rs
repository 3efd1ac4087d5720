//! Going on from a snapshot: everything is read and checked before the first image is leased.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::blocking::Blocking;
use coracle_storage::lease::Owner;
use coracle_storage::request::Failure;
use coracle_storage::secret::SecretSource;
use vm_memory::{Address, Bytes, GuestMemoryMmap};

use super::contents::{CONFIG, ConfigState, MEMORY, ORIGIN, OriginState};
use super::disks::{DISKS, OverlayStates, SavedOverlays, state_file};
use super::memory::{MemoryTable, MemoryTableState, TableError};
use super::unopened::{self, Part, UnopenedError};
use crate::arch::x86_64::cpuid::compatibility::CompatibilityError;
use crate::config::{
    Config, ConfigFileError, Disks, MemBackendType, NetworkError, OverrideError, SnapshotLoad,
    SnapshotLoadError, Verify, VsockError,
};
use crate::end::{End, Ending};
use crate::keys::{KeyError, PublicKey, ReadingKeys, TrustedKeys};
use crate::machine::disks::Wanted;
use crate::machine::plan::{MemorySource, Plan, PlanError, SavedOrigin, page_size};
use crate::machine::state::{Counts, MachineState};
use crate::machine::{GENERATION_MEMORY, PlatformError, check_compatible, tell_restored};
use crate::memory::external::{self, ExternalError, Returns};
use crate::memory::pager::{BringError, Pager};
use crate::memory::restore::{self, SavedMemory};
use crate::state::{Header, STATE_BYTES_MAX, State, StateError};

/// What is needed to load a snapshot.
pub struct Job {
    /// What was asked for.
    pub load: SnapshotLoad,
    /// What the process was told before: where logs go, what may be taken over.
    pub process: Config,
    /// Who asks.
    pub owner: Owner,
    /// Whose snapshots this process loads, if not everybody's; beside those whom the request names.
    pub trusted: Option<TrustedKeys>,
    /// Where it is announced that the memory is damaged: an ending of its own, which counts once there is a machine.
    pub ending: Ending,
}

/// A machine that can go on.
pub struct Loaded {
    /// What it is built from.
    pub plan: Plan,
    /// Its configuration.
    pub config: Config,
    /// How its disks are gone on with.
    pub disks: Disks,
    /// Where it is announced that some of its memory is lost.
    pub ending: Ending,
}

/// Why a snapshot is not loaded. No image was leased, unless the error is of one.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// What was asked for makes no sense.
    #[error(transparent)]
    Asked(#[from] SnapshotLoadError),
    /// Other images for drives that it does not have, or has otherwise.
    #[error("drive_overrides {}", joined(.0))]
    Drives(Vec<OverrideError>),
    /// Other taps for interfaces that it does not have.
    #[error("network_overrides")]
    Network(#[from] NetworkError),
    /// Another path for a socket that it does not have.
    #[error("vsock_override")]
    Vsock(#[from] VsockError),
    /// A key, or a list of them.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The state file cannot be opened.
    #[error(transparent)]
    Open(#[from] UnopenedError),
    /// Or not be read.
    #[error("cannot read the snapshot's state `{path}`")]
    Read {
        /// The file.
        path: String,
        /// What the storage answers.
        #[source]
        source: Failure,
    },
    /// The host has no descriptor left.
    #[error("cannot read the snapshot's state")]
    Host(#[source] io::Error),
    /// It is not one, or damaged.
    #[error("`{path}` cannot be loaded")]
    State {
        /// The file.
        path: String,
        /// What is wrong.
        #[source]
        source: StateError,
    },
    /// Its configuration breaks a rule.
    #[error("`{path}` cannot be loaded")]
    Config {
        /// The file.
        path: String,
        /// Which.
        #[source]
        source: Box<ConfigFileError>,
    },
    /// Its memory table is wrong.
    #[error("`{path}` cannot be loaded")]
    Table {
        /// The file.
        path: String,
        /// How.
        #[source]
        source: TableError,
    },
    /// The host is another.
    #[error(transparent)]
    Compatibility(#[from] CompatibilityError),
    /// The memory.
    #[error(transparent)]
    Memory(#[from] restore::RestoreError),
    /// The memory that another process fills.
    #[error(transparent)]
    External(#[from] ExternalError),
    /// What is needed of the memory at once.
    #[error(transparent)]
    Bring(#[from] BringError),
    /// The same, and why.
    #[error("guest memory cannot be loaded: {0}")]
    MemoryLost(String),
    /// The generation ID.
    #[error(transparent)]
    Renew(#[from] PlatformError),
    /// The disks, or what else the machine needs.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// A state file that was read and checked, and not looked into.
pub struct StateFile {
    path: String,
    bytes: Vec<u8>,
}

/// What a state file says.
pub struct Snapshot {
    /// What it is of.
    pub origin: OriginState,
    /// Its configuration.
    pub config: Config,
    /// The machine.
    pub state: MachineState,
    /// What its memory file has.
    pub table: MemoryTable,
    /// Who has signed it.
    pub signer: Option<PublicKey>,
    /// The overlays that belong to it.
    pub overlays: SavedOverlays,
}

/// How long the first pages of the memory may take.
const FIRST_PAGES_MAX: Duration = Duration::from_secs(30);

impl StateFile {
    /// What was read elsewhere, and errors call `path`.
    pub fn of(path: &Path, bytes: Vec<u8>) -> Self {
        Self {
            path: path.display().to_string(),
            bytes,
        }
    }

    /// Reads the file at `path`, here or on a server; or that in it, if it is a directory.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or is larger than any state.
    pub fn read(path: &str, owner: &Owner) -> Result<Self, LoadError> {
        let path = &state_file(path);
        let image = unopened::open(Part::State, path, owner)?;
        let length = image.geometry().size_bytes;
        if length > STATE_BYTES_MAX as u64 {
            return Err(LoadError::State {
                path: path.to_owned(),
                source: StateError::Long,
            });
        }
        let mut bytes = vec![0; usize::try_from(length).expect("it is no longer than a state")];
        let mut image = Blocking::new(image).map_err(LoadError::Host)?;
        image.read_at(0, &mut bytes).map_err(|source| LoadError::Read {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
        })
    }

    /// Checks all of it, as `keys` demand, and takes it apart.
    ///
    /// # Errors
    ///
    /// What is wrong, by the name of the section.
    pub fn parse(&self, keys: &ReadingKeys) -> Result<Snapshot, LoadError> {
        let path = || self.path.clone();
        let wrong = |source| LoadError::State { path: path(), source };
        let mut state = State::parse(&self.bytes, keys).map_err(wrong)?;
        let signer = state.signer();
        let origin = state.take::<OriginState>(ORIGIN).map_err(wrong)?;
        let config = state.take::<ConfigState>(CONFIG).map_err(wrong)?.config();
        let config = config.map_err(|source| LoadError::Config {
            path: path(),
            source: Box::new(source),
        })?;
        let table = state.take::<MemoryTableState>(MEMORY).map_err(wrong)?;
        let size_bytes = config.memory_layout().size_bytes();
        let table = MemoryTable::restore(&table, size_bytes, signer, state.cipher())
            .map_err(|source| LoadError::Table { path: path(), source })?;
        let counts = Counts {
            vcpus: config.machine().vcpu_count,
            virtio: config.virtio_devices(),
        };
        let machine = MachineState::read(&mut state, counts).map_err(wrong)?;
        let overlays = state.take_if_there::<OverlayStates>(DISKS).map_err(wrong)?;
        state.finish().map_err(wrong)?;
        Ok(Snapshot {
            origin,
            config,
            state: machine,
            table,
            signer,
            overlays: SavedOverlays::beside(&self.path, overlays.unwrap_or_default()),
        })
    }

    /// The version of the program that wrote it, if it is a state at all.
    pub fn written_by(&self) -> String {
        Header::parse(&self.bytes)
            .map(|header| header.written_by)
            .unwrap_or_default()
    }

    /// The bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Job {
    /// Does it all. Waits for the storage.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; then nothing is left of it.
    pub fn run(self) -> Result<Loaded, LoadError> {
        let (path, backend) = self.load.memory()?;
        let keys = self.keys()?;
        let file = StateFile::read(&self.load.snapshot_path, &self.owner)?;
        let snapshot = file.parse(&keys)?;
        check_compatible(&snapshot.state)?;
        let mut config = snapshot.config.continued_by(&self.process);
        config.track_dirty_pages(self.load.tracks_dirty_pages());
        config
            .override_drives(&self.load.drive_overrides)
            .map_err(LoadError::Drives)?;
        config.override_networks(&self.load.network_overrides)?;
        config.override_vsock(self.load.vsock_override.as_ref())?;
        let wanted = Wanted {
            disks: self.load.disks,
            overlay_directory: self.load.overlay_directory.as_deref(),
            saved: &snapshot.overlays,
        };
        let courses = wanted.courses(&mut config, &snapshot.state)?;
        let id = snapshot.table.id();
        let pages = page_size(config.machine().huge_pages);
        let (memory, pager) = match backend {
            MemBackendType::File => {
                let saved = SavedMemory {
                    path,
                    table: Arc::new(snapshot.table),
                    hotplug: config.memory_layout().hotplug(),
                    verify: match self.load.verify {
                        Verify::Lazy => restore::Verify::Chunks,
                        Verify::Off => restore::Verify::Off,
                    },
                    pages,
                    owner: &self.owner,
                };
                restore::restore(saved, &self.ending)?
            }
            MemBackendType::Uffd => {
                let layout = config.memory_layout();
                let returns = match (config.balloon(), layout.hotplug()) {
                    (None, None) => Returns::None,
                    _ => Returns::Some,
                };
                // Its guard stays, whatever becomes of what is returned.
                let (memory, _guard) = external::restore_by(path, layout, pages, returns)?;
                (memory, None)
            }
        };
        self.bring_first_pages(&snapshot.state, &memory, pager.as_ref())?;
        tell_restored(&memory)?;
        let saved = SavedOrigin {
            memory: MemorySource {
                memory,
                pager,
                fetcher: None,
                id: Some(id),
            },
            state: snapshot.state,
        };
        let plan = Plan::restore(&config, (&courses, self.load.disks), &self.owner, saved)?;
        Ok(Loaded {
            plan,
            config,
            disks: self.load.disks,
            ending: self.ending,
        })
    }

    /// Has there what the host itself touches when it builds the machine: on the thread that does that nobody may wait for a
    /// server, or for another process, or for what will never come.
    fn bring_first_pages(
        &self,
        state: &MachineState,
        memory: &GuestMemoryMmap,
        pager: Option<&Pager>,
    ) -> Result<(), LoadError> {
        let mut ranges = state.memory_of_kvm();
        ranges.extend(GENERATION_MEMORY);
        if let Some(pager) = pager {
            // Whoever waits for it is this thread, and not for ever.
            return pager
                .bring(&ranges, FIRST_PAGES_MAX)
                .map_err(|error| match self.ending.announced() {
                    Some(End::MemoryLost { reason }) => LoadError::MemoryLost(reason.clone()),
                    _ => error.into(),
                });
        }
        for (start, len_bytes) in ranges {
            for at in [Some(start), start.checked_add(len_bytes - 1)]
                .into_iter()
                .flatten()
            {
                // What is no memory, KVM touches as little.
                let _ = memory.read_obj::<u8>(at);
            }
        }
        Ok(())
    }

    /// What the snapshot is read with.
    fn keys(&self) -> Result<ReadingKeys, LoadError> {
        let encryption = self.load.encryption_key.as_ref().map(SecretSource::from);
        let mut keys = ReadingKeys::read(self.load.trusted_keys.as_deref(), encryption.as_ref())?;
        keys.trusted.extend(self.trusted.clone());
        self.check_protection(&keys)?;
        Ok(keys)
    }

    /// Whether the memory will be checked and decrypted, where it has to be.
    fn check_protection(&self, keys: &ReadingKeys) -> Result<(), SnapshotLoadError> {
        let (_, backend) = self.load.memory()?;
        if self.load.verify == Verify::Lazy && backend == MemBackendType::File {
            return Ok(());
        }
        match (&keys.trusted[..], &keys.encryption) {
            ([], None) => Ok(()),
            ([], Some(_)) => Err(SnapshotLoadError::NotDecrypted),
            ([list, ..], _) => Err(SnapshotLoadError::NotChecked {
                keys: list.path().display().to_string(),
            }),
        }
    }
}

fn joined(errors: &[OverrideError]) -> String {
    let errors: Vec<String> = errors.iter().map(OverrideError::to_string).collect();
    errors.join("; ")
}
