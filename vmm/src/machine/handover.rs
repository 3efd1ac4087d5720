//! A machine whose disks are on their way to another owner.
//!
//! ```text
//!   Paused ──hand_over──► Yielded ──the step that decides is won, all fences are up──► Paused
//!                            └── it is lost: retire
//! ```
//!
//! The fence of a file is taken down and put up by whoever asks. That of an image of a network is its worker's: before the
//! hand-over a round asks for it to come down ([`Machine::begin_yield`]), and an errand for it to be up again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_devices::virtio::blk::{ControlError, Errand};
use coracle_devices::virtio::device::{Notice, Patience};
use coracle_storage::backend::Access;
use coracle_storage::copy::{Original, OriginalError};
use coracle_storage::lease::{Contest, Incarnation, Offer, Opposition, Record, TakenBack};
use coracle_storage::open::OpenError;

use super::{DriveSlot, Machine, Paused, Running};
use crate::kvm::state::CpuidEntryState;
use crate::kvm::vcpu::Vcpu;
use crate::migration::disks::Copied;

/// The phase in which the guest stands still and whoever wins the next step of the leases has its disks.
#[derive(Default)]
pub struct Yielded {
    /// Who has to take its fences down before this machine can go on.
    other: Option<Incarnation>,
    /// The disks that put their fences up, by their places.
    returning: Vec<(usize, Errand)>,
    offered: Box<Offered>,
}

/// What the other side has been offered.
#[derive(Default)]
struct Offered {
    /// The drives whose images are left behind for copies: their leases decide nothing.
    copied: Vec<String>,
    /// Whether somebody may have been told that the disks can be had.
    is_told: bool,
}

/// What is offered of a drive that is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveOffer {
    /// The drive.
    pub id: String,
    /// Its lease; `None` if there is no record of it, so that it cannot be handed over.
    pub offer: Option<Offer>,
}

/// Why a disk does not change its owner.
#[derive(Debug, thiserror::Error)]
#[error("drive `{id}`")]
pub struct HandoverError {
    /// The drive.
    pub id: String,
    /// Why.
    #[source]
    pub source: Box<Reason>,
}

/// Why it does not, as the image or its disk say.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// The image.
    #[error(transparent)]
    Image(#[from] OpenError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] ControlError),
}

/// How the contest for a machine's disks has ended for it.
pub enum Outcome {
    /// It has them all.
    Back(Machine<Paused>),
    /// They are another's, whose record that is; there is none if there is no lease that could have decided.
    Lost(Machine<Yielded>, Option<Box<Record>>),
    /// It is not decided yet: the new owner has taken them and has not started.
    Open(Machine<Yielded>),
}

impl Yielded {
    fn of(copied: &[String], is_told: bool) -> Self {
        let copied = copied.to_vec();
        Self {
            offered: Box::new(Offered { copied, is_told }),
            ..Self::default()
        }
    }
}

impl<P> Machine<P> {
    /// What the guest's first processor answers to CPUID: the others differ in their numbers only.
    pub fn cpuid(&self) -> &[CpuidEntryState] {
        self.parts.vcpus.first().map_or(&[], Vcpu::cpuid)
    }

    /// What there is to offer, the drive that decides first: those that are written and are not `copied`, in the order of the
    /// configuration.
    pub fn offers(&self, copied: &[String]) -> Vec<DriveOffer> {
        let written = self.parts.drives.iter().filter(|drive| drive.is_written());
        written
            .filter(|drive| !copied.contains(&drive.id))
            .map(|drive| DriveOffer {
                id: drive.id.clone(),
                offer: drive.hold.offer(),
            })
            .collect()
    }
}

impl Machine<Running> {
    /// Drive `id`, whose image, or the file of whose overlay, `path` names, as one that goes along. `None` if there is no such
    /// drive.
    ///
    /// # Errors
    ///
    /// When its image cannot be read.
    pub fn copied(&self, id: &str, path: &str) -> Option<Result<Copied, OriginalError>> {
        let drive = self.parts.drives.iter().find(|drive| drive.id == id)?;
        let size_bytes = drive.control.geometry().size_bytes;
        let original = match drive.hold.overlay() {
            Some(view) => Original::of_overlay(path, view),
            None => Original::open(path, &drive.hold, size_bytes),
        };
        Some(original.map(|original| Copied {
            id: id.to_owned(),
            size_bytes,
            original,
            changes: Arc::clone(drive.control.changes()),
        }))
    }
}

impl Machine<Paused> {
    /// Takes the fences of all disks down, but for those that a round was asked for, and those of `copied`, which stay behind.
    /// Everything that was written is on its medium.
    ///
    /// Where that fails, some may be up: nobody is to be told that the disks can be had, and [`Machine::settle`] has them back.
    pub fn hand_over(mut self, copied: &[String]) -> (Machine<Yielded>, Result<(), HandoverError>) {
        let mut outcome = Ok(());
        let written = self.parts.drives.iter_mut().filter(|drive| drive.is_written());
        for drive in written.filter(|drive| !copied.contains(&drive.id)) {
            let yielded = drive.hold.yield_fence();
            outcome = outcome.and(yielded.map_err(|source| drive.not_handed(source)));
        }
        let yielded = Yielded::of(copied, outcome.is_ok());
        (self.in_phase(yielded), outcome)
    }

    /// A round that asked for the fences has failed, and nobody was told of it: the leases are as they were, and
    /// [`Machine::settle`] has those fences up again that came down.
    pub fn stay(self, copied: &[String]) -> Machine<Yielded> {
        self.in_phase(Yielded::of(copied, false))
    }
}

/// How often it is looked whether a fence is up.
const FENCE_PERIOD: Duration = Duration::from_millis(1);
/// How long a disk is waited for to put its fence up: that of a machine that has died may stay as long as its server likes. Then
/// it is asked again.
const RETURN_MAX: Duration = Duration::from_secs(600);

impl Machine<Yielded> {
    /// Makes the opposing step, and if that is won, has the disks back. It takes as long as the servers of the disks do.
    ///
    /// # Errors
    ///
    /// When that cannot be told; to be tried again.
    pub fn settle(
        mut self,
        opposition: Opposition,
        limit: Duration,
    ) -> Result<Outcome, (Self, HandoverError)> {
        let Offered { copied, is_told } = &*self.phase.offered;
        let decides = |drive: &&mut DriveSlot| {
            drive.is_written() && !copied.contains(&drive.id) && drive.hold.offer().is_some()
        };
        let Some(lead) = self.parts.drives.iter_mut().find(decides) else {
            if *is_told {
                return Ok(Outcome::Lost(self, None));
            }
            return self.take_back(Instant::now() + limit);
        };
        match lead.hold.oppose(opposition) {
            Ok(Contest::Won) => {}
            Ok(Contest::Taken(record)) => {
                self.phase.other = Some(record.owner.incarnation);
                return Ok(Outcome::Open(self));
            }
            Ok(Contest::Gone(record)) => return Ok(Outcome::Lost(self, Some(Box::new(record)))),
            Err(source) => {
                let error = lead.not_handed(source);
                return Err((self, error));
            }
        }
        self.take_back(Instant::now() + limit)
    }

    fn take_back(mut self, deadline: Instant) -> Result<Outcome, (Self, HandoverError)> {
        let other = self.phase.other;
        let written = |(_, drive): &(usize, &mut DriveSlot)| drive.is_written();
        for (at, drive) in self.parts.drives.iter_mut().enumerate().filter(written) {
            loop {
                let back = match drive.hold.take_back(other) {
                    Ok(TakenBack::Done) => drive.put_fence_up(at, &mut self.phase.returning, deadline),
                    undone => undone.map_err(|error| Box::new(error.into())),
                };
                match back {
                    Ok(TakenBack::Done) => break,
                    Ok(TakenBack::Fenced) if Instant::now() < deadline => std::thread::sleep(FENCE_PERIOD),
                    Ok(TakenBack::Fenced) => return Ok(Outcome::Open(self)),
                    Ok(TakenBack::Gone(record)) => return Ok(Outcome::Lost(self, Some(Box::new(record)))),
                    Err(source) => {
                        let error = drive.not_handed_for(source);
                        return Err((self, error));
                    }
                }
            }
        }
        for drive in &mut self.parts.drives {
            drive.hold.is_back();
        }
        Ok(Outcome::Back(self.in_phase(Paused)))
    }

    /// Takes the machine apart: its disks are another's.
    pub fn retire(self) {
        drop(self.parts);
    }
}

impl DriveSlot {
    fn is_written(&self) -> bool {
        self.control.access() == Access::ReadWrite
    }

    /// Has the disk put its fence up, if that is its own, and waits until `deadline`. What is not done then goes on, and is found
    /// among those that are `returning`.
    fn put_fence_up(
        &self,
        at: usize,
        returning: &mut Vec<(usize, Errand)>,
        deadline: Instant,
    ) -> Result<TakenBack, Box<Reason>> {
        let begun = returning.iter().position(|(returns, _)| *returns == at);
        let errand = match begun {
            Some(place) => returning.swap_remove(place).1,
            None => {
                let begun = self.control.begin_take_back(RETURN_MAX, &Notice::default());
                begun.map_err(|error| Box::new(error.into()))?
            }
        };
        loop {
            if let Some(answer) = errand.poll(Patience::None) {
                let done = answer.map(|()| TakenBack::Done);
                return done.map_err(|error| Box::new(error.into()));
            }
            if Instant::now() >= deadline {
                returning.push((at, errand));
                return Ok(TakenBack::Fenced);
            }
            std::thread::sleep(FENCE_PERIOD);
        }
    }

    fn not_handed(&self, source: impl Into<Reason>) -> HandoverError {
        self.not_handed_for(Box::new(source.into()))
    }

    fn not_handed_for(&self, source: Box<Reason>) -> HandoverError {
        let id = self.id.clone();
        HandoverError { id, source }
    }
}
