//! Guest memory from a memory file.
//!
//! | asked for | the host | how |
//! |---|---|---|
//! | checks off, a file of this host | | its pages are mapped, each is read when it is touched |
//! | checks on | has userfaultfd | a pager brings in what is touched, checked, and then the rest |
//! | checks on | refuses it, or huge pages of hugetlbfs | all is read and checked at once |

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use coracle_storage::backend::Backend;
use coracle_storage::blocking::Blocking;
use coracle_storage::lease::Owner;
use coracle_storage::open::{self, OpenError};
use coracle_storage::pipeline::PreparedPipeline;
use coracle_storage::request::Failure;
use coracle_storage::threads;
use vm_memory::GuestMemoryMmap;

use super::eager::{self, LoadError};
use super::pager::{Guarded, Pager};
use super::reading::{ChunkReader, DEPTH, Saved};
use super::userfault::UserfaultError;
use super::working_set;
use super::{Backing, HotplugRegion, Layout, MIB, MemoryError, PageSize, allocate};
use crate::end::Ending;
use crate::snapshot::memory::{Kind, MemoryTable, TRAILER_BYTES, Trailer, TrailerError, file_bytes};
use crate::snapshot::unopened::{self, Part, UnopenedError};

/// A guest's memory as it was saved, and how the guest is to get it.
#[derive(Debug)]
pub struct SavedMemory<'a> {
    /// The memory file: a path, or the URL of a file on a server.
    pub path: &'a str,
    /// What it has, as a full one: diffs are merged before.
    pub table: Arc<MemoryTable>,
    /// The region of it to which memory comes while the guest runs.
    pub hotplug: Option<HotplugRegion>,
    /// Whether that is checked.
    pub verify: Verify,
    /// The pages of the mapping.
    pub pages: PageSize,
    /// Who asks.
    pub owner: &'a Owner,
}

impl SavedMemory<'_> {
    /// Where the guest has what the table has.
    fn layout(&self) -> Layout {
        let hotplug_bytes = self.hotplug.map_or(0, |hotplug| hotplug.size_bytes);
        let boot_bytes = self.table.size_bytes().saturating_sub(hotplug_bytes);
        Layout {
            boot_mib: boot_bytes / MIB,
            hotplug: self.hotplug,
        }
    }
}

/// Whether memory is checked before anybody sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Every chunk.
    Chunks,
    /// Nothing but that the file belongs to the snapshot, where its pages can be mapped: for a file that nobody changes or cuts
    /// short while the guest lives. What is on a server, on hugetlbfs or encrypted is checked all the same.
    Off,
}

/// Why a guest cannot have its memory back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No memory like the saved one can be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The table is of no machine's memory.
    #[error("the snapshot has {size_bytes} bytes of memory, which is no whole number of MiB: it is damaged")]
    Size {
        /// What the table says.
        size_bytes: u64,
    },
    /// The file has only what was written since another snapshot.
    #[error(
        "the snapshot of memory file `{path}` is a diff: merge it into the one that it goes on from, and restore what comes of it"
    )]
    Diff {
        /// The file.
        path: String,
    },
    /// The file cannot be opened.
    #[error(transparent)]
    Open(#[from] UnopenedError),
    /// The file is another, or only a part.
    #[error(
        "memory file `{path}` has {found} bytes, and that of this snapshot has {expected}: it was cut off, or belongs to another \
         snapshot"
    )]
    Length {
        /// The file.
        path: String,
        /// Its length.
        found: u64,
        /// The length that the table asks for.
        expected: u64,
    },
    /// The trailer does not name this memory.
    #[error("memory file `{path}` does not belong to this snapshot")]
    Stranger {
        /// The file.
        path: String,
        /// What it says of itself.
        #[source]
        source: TrailerError,
    },
    /// The trailer cannot be read.
    #[error("cannot read the end of memory file `{path}`")]
    Trailer {
        /// The file.
        path: String,
        /// What the storage answers.
        #[source]
        source: Failure,
    },
    /// Nothing can be loaded.
    #[error("cannot load guest memory from `{path}`")]
    Load {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: LoadError,
    },
    /// The host has no thread, ring or descriptor left.
    #[error("cannot start to load guest memory from `{path}`")]
    Start {
        /// The file.
        path: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// How long a load waits for a server to say what the guest asked for first the last time, once it has the memory file itself.
const LEARN_MAX: Duration = Duration::from_millis(10);

/// Makes a guest's memory as it was saved. What the pager, if there is one, cannot load is announced to `ending`.
///
/// Memory that comes by a pager can be given to KVM and to devices at once. Whoever touches it may wait, as long as the storage
/// does.
///
/// # Errors
///
/// [`RestoreError`]: the file is not that of the snapshot, or the host lacks something.
pub fn restore(
    saved: SavedMemory<'_>,
    ending: &Ending,
) -> Result<(Arc<GuestMemoryMmap>, Option<Pager>), RestoreError> {
    let size_bytes = saved.table.size_bytes();
    if saved.table.kind() != Kind::Full {
        let path = saved.path.to_owned();
        return Err(RestoreError::Diff { path });
    }
    if saved.layout().size_bytes() != size_bytes || size_bytes == 0 {
        return Err(RestoreError::Size { size_bytes });
    }
    let can_be_mapped = saved.pages != PageSize::Huge2Mib
        && !open::is_remote(saved.path)
        && !saved.table.seal().is_encrypted();
    if saved.verify == Verify::Off && can_be_mapped {
        return Ok((mapped(&saved)?, None));
    }
    let first = learn_working_set(&saved);
    let image = opened(&saved)?;
    let pipeline = PreparedPipeline::new(image, DEPTH);
    let memory = allocate(saved.layout(), Backing::Anonymous, saved.pages)?;
    let guarded = guarded(&memory, saved.pages);
    let file = Arc::new(Saved {
        path: saved.path.to_owned(),
        table: Arc::clone(&saved.table),
        layout: saved.layout(),
    });
    let not_started = |source| RestoreError::Start {
        path: saved.path.to_owned(),
        source,
    };
    let Some(guarded) = guarded else {
        let reader = ChunkReader::bind(pipeline, Arc::clone(&file)).map_err(not_started)?;
        eager::load(reader, &saved.table, &memory).map_err(|source| RestoreError::Load {
            path: saved.path.to_owned(),
            source,
        })?;
        return Ok((memory, None));
    };
    let first = first.recv_timeout(LEARN_MAX).unwrap_or_default();
    let pager = Pager::start(guarded, file, pipeline, first, ending.clone()).map_err(not_started)?;
    Ok((memory, Some(pager)))
}

/// Guards `memory`, if the host does that for such memory; says so if not.
fn guarded(memory: &GuestMemoryMmap, pages: PageSize) -> Option<Guarded> {
    if pages == PageSize::Huge2Mib {
        log::info!("guest memory of huge pages is loaded as a whole before the guest runs");
        return None;
    }
    Guarded::new(memory)
        .map_err(|error| log::warn!("{}", eager_because(&error)))
        .ok()
}

fn eager_because(error: &UserfaultError) -> String {
    let remedy = if error.is_refusal() {
        "; to have it loaded while the guest runs, set vm.unprivileged_userfaultfd to 1, or give the monitor access to \
         /dev/userfaultfd"
    } else {
        ""
    };
    let reason = crate::api::chain(error);
    format!("guest memory is loaded as a whole before the guest runs, which takes longer: {reason}{remedy}")
}

/// Asks what the guest asked for first the last time; a server is asked while the memory file is being opened.
fn learn_working_set(saved: &SavedMemory<'_>) -> Receiver<Vec<usize>> {
    let (learned, answer) = channel();
    let (path, id, owner) = (saved.path.to_owned(), saved.table.id(), saved.owner.clone());
    let learn = move || {
        let read = working_set::read(&path, id, &owner);
        let chunks = read.unwrap_or_else(|error| {
            let reason = crate::api::chain(&error);
            log::debug!("no working set of memory file `{path}`: {reason}");
            Vec::new()
        });
        // Whoever asked may have gone on without.
        let _ = learned.send(chunks);
    };
    if open::is_remote(saved.path) {
        // Where there is no thread to be had, nothing is learned.
        let _ = threads::spawn(threads::Kind::Mover, "working-set", learn);
    } else {
        learn();
    }
    answer
}

/// The memory file, which is the one that belongs to the table.
fn opened(saved: &SavedMemory<'_>) -> Result<Box<dyn Backend>, RestoreError> {
    let path = || saved.path.to_owned();
    let image = unopened::open(Part::Memory, saved.path, saved.owner)?;
    let size_bytes = saved.table.size_bytes();
    check_length(saved, image.geometry().size_bytes)?;
    let mut trailer = [0; TRAILER_BYTES];
    let mut image = Blocking::new(image).map_err(|source| RestoreError::Start { path: path(), source })?;
    let read = image.read_at(size_bytes, &mut trailer);
    read.map_err(|source| RestoreError::Trailer { path: path(), source })?;
    check_trailer(saved, &trailer)?;
    Ok(image.into_image())
}

/// Maps the memory file, so that what is written stays with the guest.
fn mapped(saved: &SavedMemory<'_>) -> Result<Arc<GuestMemoryMmap>, RestoreError> {
    let host = |source: io::Error| {
        let path = saved.path.to_owned();
        let source = match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => OpenError::Missing { path },
            _ => OpenError::Host { path, source },
        };
        UnopenedError::new(Part::Memory, saved.path, source)
    };
    let file = open_regular(saved.path).map_err(host)?;
    check_length(saved, file.metadata().map_err(host)?.len())?;
    let mut trailer = [0; TRAILER_BYTES];
    let size_bytes = saved.table.size_bytes();
    file.read_exact_at(&mut trailer, size_bytes).map_err(host)?;
    check_trailer(saved, &trailer)?;
    Ok(super::map_copy_on_write(file, saved.layout(), saved.pages)?)
}

fn open_regular(path: &str) -> io::Result<File> {
    // O_NONBLOCK: opening a FIFO must not wait for its other end.
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other(
            "it is no regular file, and only such can be mapped",
        ));
    }
    Ok(file)
}

fn check_length(saved: &SavedMemory<'_>, found: u64) -> Result<(), RestoreError> {
    let expected = file_bytes(saved.table.size_bytes());
    if found != expected {
        return Err(RestoreError::Length {
            path: saved.path.to_owned(),
            found,
            expected,
        });
    }
    Ok(())
}

fn check_trailer(saved: &SavedMemory<'_>, trailer: &[u8; TRAILER_BYTES]) -> Result<(), RestoreError> {
    Trailer::check(trailer, &saved.table).map_err(|source| RestoreError::Stranger {
        path: saved.path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod mutations;
#[cfg(test)]
mod tests;
