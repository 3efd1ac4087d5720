//! Persistent memory: the files that a machine's guest has in its address space, and where it has them.
//!
//! ```text
//!   0 ┌──────────────┐
//!     │ memory       │ and the devices among it
//!     ├──────────────┤
//!     │              │ nothing
//!     ├──────────────┤ PMEM_START, or the end of memory that reaches further
//!     │ files        │ one after the other, each at a multiple of 1 GiB
//!     └──────────────┘ PMEM_END
//! ```
//!
//! A file is no part of the guest's memory: it is in no snapshot of that and no migration, no device reaches it, and KVM's log of
//! dirty pages does not cover it.

use std::sync::Arc;

use coracle_devices::virtio::device::Notice;
use coracle_devices::virtio::pmem::{
    FlushError, HeldPmem, Medium, PartialPmem, PmemConfig, PmemControl, PmemRange, REGION_ALIGNMENT_BYTES,
};
use coracle_storage::backend::Access;
use coracle_storage::lease::{Owner, Succession};
use coracle_storage::open::Hold;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::flush::{Flush, Flusher, PmemFlushError};
use super::plan::PlanError;
use super::state::MachineState;
use super::{BuildError, Machine};
use crate::arch::x86_64::layout::{PMEM_END, PMEM_START};
use crate::config::Disks;
use crate::end::{End, Ending};
use crate::memory::mapped::Mapping;
use crate::state::Body;

/// Where files begin at boot is a multiple of this, in bytes: large pages of the guest's fit.
const SPACING_BYTES: u64 = 1 << 30;

/// Room for files, and for memory before it, in GiB.
const ROOM_GIB: u64 = (PMEM_END.0 - PMEM_START.0) >> 30;
const MEMORY_GIB: u64 = PMEM_START.0 >> 30;

/// A file that was opened and leased.
pub(super) struct PmemPlan {
    pub(super) config: PmemConfig,
    held: HeldPmem,
    range: PmemRange,
}

/// The control end of one device.
pub(super) struct PmemSlot {
    pub(super) id: String,
    pub(super) control: PmemControl,
    pub(super) range: PmemRange,
    pub(super) medium: Arc<Medium>,
    pub(super) flusher: Arc<Flusher>,
    /// After the file: its lease ends when nobody uses it any more.
    pub(super) hold: Hold,
}

/// A file that is mapped, and what is made of it next.
pub(super) struct MappedPmem {
    pub(super) config: PmemConfig,
    pub(super) mapping: Arc<Mapping>,
    pub(super) medium: Arc<Medium>,
    pub(super) range: PmemRange,
    pub(super) hold: Hold,
}

/// Where the files of a machine were, and which.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PmemStates(pub(super) Vec<PmemState>);

/// Where one was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PmemState {
    /// The device.
    id: String,
    range: PmemRange,
    /// Its generation, if there is a record of it: a file of another has been written since.
    generation: Option<u64>,
}

impl Body for PmemStates {
    const VERSION: u32 = 1;
}

/// Why files cannot be where they should.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum PmemPlaceError {
    #[error(
        "pmem device `{0}` does not fit: all files together, each rounded up to 1 GiB, have room for {ROOM_GIB} GiB, less what \
         the guest has of memory beyond {MEMORY_GIB} GiB; leave one out, or make it smaller"
    )]
    Full(String),
    #[error("the snapshot says nothing of pmem device `{0}`: it was not saved by this program")]
    NoState(String),
    #[error("the snapshot has pmem device `{0}` where none can be: it was not saved by this program")]
    Misplaced(String),
    #[error(
        "the file of pmem device `{id}` has room for {here_bytes} bytes, and the guest knows one of {saved_bytes}: bring back \
         the file that it had when it was saved"
    )]
    OtherSize {
        id: String,
        saved_bytes: u64,
        here_bytes: u64,
    },
    #[error("the file of pmem device `{id}` is not the one that the guest had: bring that back")]
    Cut {
        id: String,
        #[source]
        source: FlushError,
    },
}

impl PmemPlan {
    /// Opens the files of `configs` and leases them to `owner`, for a guest that boots with `memory_end` of memory, or goes on
    /// from `saved`, with disks gone on with as it says.
    ///
    /// # Errors
    ///
    /// What is wrong with one, or who has it.
    pub(super) fn all(
        configs: &[PmemConfig],
        owner: &Owner,
        memory_end: GuestAddress,
        saved: Option<(&MachineState, Disks)>,
    ) -> Result<Vec<Self>, PlanError> {
        let mut next = first_after(memory_end);
        let mut plans: Vec<Self> = Vec::new();
        for config in configs {
            let succession = match saved {
                Some((state, disks)) => succession(config, state, disks)?,
                None => Succession::Raises,
            };
            let held = config.open(owner, succession)?;
            let size_bytes = held.medium.region_bytes();
            let full = || PmemPlaceError::Full(config.id.clone());
            let size_bytes = size_bytes.ok_or_else(full)?;
            let range = match saved {
                None => {
                    let start = next;
                    let end = start.checked_add(size_bytes).filter(|end| *end <= PMEM_END.0);
                    next = end.ok_or_else(full)?.next_multiple_of(SPACING_BYTES);
                    PmemRange { start, size_bytes }
                }
                Some((state, _)) => {
                    let others: Vec<_> = plans.iter().map(|plan| plan.range).collect();
                    saved_state(config, state)?.possible_range(&held.medium, memory_end, &others)?
                }
            };
            plans.push(Self {
                config: config.clone(),
                held,
                range,
            });
        }
        Ok(plans)
    }

    /// Maps the files.
    ///
    /// # Errors
    ///
    /// When the host has no address space for one.
    pub(super) fn map_all(plans: Vec<Self>) -> Result<(Vec<MappedPmem>, Vec<Arc<Mapping>>), BuildError> {
        let mapped: Result<Vec<_>, _> = plans.into_iter().map(Self::map).collect();
        let mapped = mapped?;
        let files = mapped.iter().map(|pmem| Arc::clone(&pmem.mapping)).collect();
        Ok((mapped, files))
    }

    fn map(self) -> Result<MappedPmem, BuildError> {
        let HeldPmem { medium, hold } = self.held;
        let mapping = Mapping::new(&medium, self.range).map_err(|source| BuildError::Device {
            id: self.config.id.clone(),
            source,
        })?;
        Ok(MappedPmem {
            config: self.config,
            mapping: Arc::new(mapping),
            medium,
            range: self.range,
            hold,
        })
    }
}

fn first_after(memory_end: GuestAddress) -> u64 {
    memory_end.max(PMEM_START).0.next_multiple_of(SPACING_BYTES)
}

/// Which generation of its file a device of a snapshot goes on with.
fn succession(config: &PmemConfig, state: &MachineState, disks: Disks) -> Result<Succession, PlanError> {
    let id = || config.id.clone();
    let saved = saved_state(config, state)?;
    match (config.access(), disks, saved.generation) {
        (Access::ReadOnly, ..) | (_, Disks::Detached, _) => Ok(Succession::Raises),
        (_, Disks::Clone, _) => Err(PlanError::PmemNotCloned(id())),
        (_, Disks::Continue, Some(generation)) => Ok(Succession::Keeps(generation)),
        (_, Disks::Continue, None) => Err(PlanError::PmemUnrecorded(id())),
    }
}

fn saved_state<'s>(config: &PmemConfig, state: &'s MachineState) -> Result<&'s PmemState, PmemPlaceError> {
    let saved = state.pmem.0.iter().find(|saved| saved.id == config.id);
    saved.ok_or_else(|| PmemPlaceError::NoState(config.id.clone()))
}

impl PmemState {
    /// Where the guest has the file, which is behind `memory_end` and beside `others`. The state may be anybody's.
    fn possible_range(
        &self,
        medium: &Medium,
        memory_end: GuestAddress,
        others: &[PmemRange],
    ) -> Result<PmemRange, PmemPlaceError> {
        let (range, id) = (self.range, || self.id.clone());
        let here_bytes = medium.region_bytes().unwrap_or(u64::MAX);
        if range.size_bytes != here_bytes {
            return Err(PmemPlaceError::OtherSize {
                id: id(),
                saved_bytes: range.size_bytes,
                here_bytes,
            });
        }
        let whole = medium.check_whole();
        whole.map_err(|source| PmemPlaceError::Cut { id: id(), source })?;
        let end = range.start.checked_add(range.size_bytes);
        let overlaps = |other: &PmemRange| {
            range.start < other.start + other.size_bytes && end.is_none_or(|end| other.start < end)
        };
        let is_possible = range.start.is_multiple_of(REGION_ALIGNMENT_BYTES)
            && range.start >= memory_end.max(PMEM_START).0
            && end.is_some_and(|end| end <= PMEM_END.0)
            && !others.iter().any(overlaps);
        if is_possible {
            Ok(range)
        } else {
            Err(PmemPlaceError::Misplaced(id()))
        }
    }
}

impl PmemSlot {
    /// Waits until the lease is recorded; then the file is made as long as what its guest sees.
    pub(super) fn settle(&mut self) -> Result<(), BuildError> {
        self.hold.settle().map_err(|source| BuildError::PmemLease {
            id: self.id.clone(),
            source,
        })?;
        self.medium.complete().map_err(|source| BuildError::PmemFile {
            id: self.id.clone(),
            source,
        })
    }

    /// What there is to be saved of it.
    pub(super) fn state(&self) -> PmemState {
        PmemState {
            id: self.id.clone(),
            range: self.range,
            generation: self.hold.generation(),
        }
    }

    /// Begins to put everything on the medium that was stored, on a thread of its own; `notice` rings when that is done.
    pub(super) fn begin_flush(&self, notice: &Notice) -> Result<Flush, PmemFlushError> {
        let medium = Arc::clone(&self.medium);
        self.flusher.begin(move || medium.flush(), notice)
    }
}

impl<P> Machine<P> {
    /// Gives a device other limits.
    pub fn limit_pmem(&self, patch: &PartialPmem) {
        let slot = self.parts.pmem.iter().find(|slot| slot.id == patch.id);
        if let (Some(slot), Some(limits)) = (slot, patch.rate_limiter) {
            slot.control.limit(limits);
        }
    }

    /// Which file of the guest's somebody has made shorter, if that has happened.
    pub fn cut_pmem(&self) -> Option<String> {
        self.parts.pmem.iter().find_map(|slot| {
            let error = slot.medium.check_whole().err()?;
            matches!(error, FlushError::Cut { .. }).then(|| cut(&slot.id, &error))
        })
    }
}

/// Ends the machine when the file of device `id` is cut: what the guest had there it would look for in vain.
pub(super) fn on_cut(id: &str, ending: &Ending) -> impl FnMut(&FlushError) + Send + 'static {
    let (id, ending) = (id.to_owned(), ending.clone());
    move |error| {
        let reason = cut(&id, error);
        ending.announce(End::MemoryLost { reason });
    }
}

fn cut(id: &str, error: &FlushError) -> String {
    format!("pmem device `{id}`: {error}")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn files_begin_behind_all_memory() {
        assert_eq!(first_after(GuestAddress(128 << 20)), PMEM_START.0);
        let beyond = first_after(GuestAddress(PMEM_START.0 + 1));
        assert_eq!(beyond, PMEM_START.0 + SPACING_BYTES);
    }

    #[test]
    fn a_place_that_no_machine_has_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(REGION_ALIGNMENT_BYTES).unwrap();
        let medium = Medium::new(Arc::new(file), REGION_ALIGNMENT_BYTES, Access::ReadWrite);
        let found = |start, size_bytes| {
            let state = PmemState {
                id: "p".to_owned(),
                range: PmemRange { start, size_bytes },
                generation: None,
            };
            let other = PmemRange {
                start: PMEM_START.0 + SPACING_BYTES,
                size_bytes: 2 * REGION_ALIGNMENT_BYTES,
            };
            state.possible_range(
                &medium,
                GuestAddress(PMEM_START.0 + REGION_ALIGNMENT_BYTES),
                &[other],
            )
        };
        let (size, taken) = (REGION_ALIGNMENT_BYTES, PMEM_START.0 + SPACING_BYTES);
        for start in [
            PMEM_START.0 + size,
            taken - size,
            taken + 2 * size,
            PMEM_END.0 - size,
        ] {
            assert_eq!(found(start, size).unwrap().start, start);
        }
        for start in [
            0,
            4 << 30,
            PMEM_START.0,
            taken,
            taken + size,
            taken + 3 * size + 4096,
            PMEM_END.0,
            u64::MAX - size + 1,
        ] {
            let refused = found(start, size);
            assert!(
                matches!(refused, Err(PmemPlaceError::Misplaced(_))),
                "{start:#x}: {refused:?}"
            );
        }
        for other_size in [0, 2 * size, u64::MAX] {
            let refused = found(taken - size, other_size);
            assert!(
                matches!(refused, Err(PmemPlaceError::OtherSize { .. })),
                "{refused:?}"
            );
        }
    }
}
