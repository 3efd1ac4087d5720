//! A machine whose disks are on their way to another owner.
//!
//! ```text
//!   Paused ──hand_over──► Yielded ──the step that decides is won, all fences are up──► Paused
//!                            └── it is lost: retire
//! ```

use std::time::{Duration, Instant};

use coracle_storage::backend::Access;
use coracle_storage::lease::{Contest, Incarnation, Offer, Opposition, Record, TakenBack};
use coracle_storage::open::OpenError;

use super::{DriveSlot, Machine, Paused};

/// The phase in which the guest stands still and whoever wins the next step of the leases has its disks.
#[derive(Debug)]
pub struct Yielded {
    /// Who has to take its fences down before this machine can go on.
    other: Option<Incarnation>,
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
    pub source: Box<OpenError>,
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

impl<P> Machine<P> {
    /// What there is to offer, the drive that decides first: those that are written, in the order of the configuration.
    pub fn offers(&self) -> Vec<DriveOffer> {
        let written = self.parts.drives.iter().filter(|drive| drive.is_written());
        written
            .map(|drive| DriveOffer {
                id: drive.id.clone(),
                offer: drive.hold.offer(),
            })
            .collect()
    }
}

impl Machine<Paused> {
    /// Takes the fences of all disks down. Everything that was written is on its medium.
    ///
    /// # Errors
    ///
    /// Why one stays up; then all are up.
    pub fn hand_over(mut self) -> Result<Machine<Yielded>, (Self, HandoverError)> {
        let written = self.parts.drives.iter_mut().filter(|drive| drive.is_written());
        let mut outcome = Ok(());
        for drive in written {
            outcome = drive
                .hold
                .yield_fence()
                .map_err(|source| drive.not_handed(source));
            if outcome.is_err() {
                break;
            }
        }
        match outcome {
            Ok(()) => Ok(self.in_phase(Yielded { other: None })),
            Err(error) => match self
                .in_phase(Yielded { other: None })
                .settle(Opposition::Cancel, FENCE_MAX)
            {
                Ok(Outcome::Back(machine)) => Err((machine, error)),
                _ => unreachable!("nobody was told that the fences are down"),
            },
        }
    }
}

/// How long the fence of a loser may stay up.
const FENCE_MAX: Duration = Duration::from_secs(2);
const FENCE_PERIOD: Duration = Duration::from_millis(1);

impl Machine<Yielded> {
    /// Makes the opposing step, and if that is won, has the disks back.
    ///
    /// # Errors
    ///
    /// When that cannot be told; to be tried again.
    pub fn settle(
        mut self,
        opposition: Opposition,
        limit: Duration,
    ) -> Result<Outcome, (Self, HandoverError)> {
        let Some(lead) = self
            .parts
            .drives
            .iter_mut()
            .find(|drive| drive.is_written() && drive.hold.offer().is_some())
        else {
            return Ok(Outcome::Lost(self, None));
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
        for drive in self.parts.drives.iter_mut().filter(|drive| drive.is_written()) {
            loop {
                match drive.hold.take_back(other) {
                    Ok(TakenBack::Done) => break,
                    Ok(TakenBack::Fenced) if Instant::now() < deadline => std::thread::sleep(FENCE_PERIOD),
                    Ok(TakenBack::Fenced) => return Ok(Outcome::Open(self)),
                    Ok(TakenBack::Gone(record)) => return Ok(Outcome::Lost(self, Some(Box::new(record)))),
                    Err(source) => {
                        let error = drive.not_handed(source);
                        return Err((self, error));
                    }
                }
            }
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

    fn not_handed(&self, source: OpenError) -> HandoverError {
        HandoverError {
            id: self.id.clone(),
            source: Box::new(source),
        }
    }
}
